"""`loradeploy export`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Final

import click

from loradeploy.adapter.tasks import TASKS
from loradeploy.bundle.graph_form import FORM_OPTIONS, FormOption
from loradeploy.cli.console import (
    GivenPath,
    given_options,
    json_option,
    print_json,
    print_pairs,
    progress,
    trust_option,
)
from loradeploy.errors import UsageError
from loradeploy.files import json_values

_PAIR: Final = re.compile(r"\s*(\w+)\s*=\s*(\d+)\s*")
_METAVARS = {"side_inputs": "KIND[,KIND…]", "fixed": "NAME=SIZE[,…]"}


def parse_sizes(text: str) -> dict[str, int]:
    """The sizes in "NAME=SIZE,NAME=SIZE…".

    Raises:
        UsageError: the form is invalid, or a dimension is given twice.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        pair = _PAIR.fullmatch(part)
        if pair is None or pair[1] in sizes:
            raise UsageError(f"--fixed {text}: give each dimension once, as batch=1,sequence=128")
        sizes[pair[1]] = int(pair[2])
    return sizes


def form_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of FORM_OPTIONS to a command."""
    for option in reversed(FORM_OPTIONS):
        command = _form_option(option)(command)
    return command


def _form_option(option: FormOption) -> Callable[[Callable[..., None]], Callable[..., None]]:
    kept = "; a bundle that is exported again keeps its value" if option.inherited else ""
    text = f"{option.help} [default: {option.default}{kept}]"
    if option.switch:
        return click.option(option.flag, is_flag=True, help=text)
    if "/" in option.flag:
        return click.option(option.flag, default=None, help=text)
    kind = click.Choice(option.values) if option.values else None
    return click.option(option.flag, type=kind, metavar=_METAVARS.get(option.name), help=text)


@click.command(
    name="export",
    short_help="Export a model to a bundle, with side inputs or an adapter merged.",
    epilog="Example: loradeploy export --model ./smollm2 --output bundle --adapter sport=./sport",
)
@click.option(
    "--model",
    type=GivenPath(),
    metavar="ID|PATH",
    required=True,
    help="The model to export: a Hugging Face id or directory, an ONNX file, or a bundle.",
)
@click.option(
    "--output",
    required=True,
    type=GivenPath(),
    help="The directory that the bundle is written to.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="A PEFT adapter to include in the bundle, or the name of one that the bundle --model has."
    " Repeat the option for more.",
)
@click.option(
    "--task",
    type=click.Choice(TASKS),
    help="The task of the model. Needed if neither adapters nor the architecture determine it.",
)
@form_options
@click.option(
    "--requantize",
    "--requantise",  # the former spelling
    "requantize",
    is_flag=True,
    help="Merge into int8, int4 or float8 weights and quantize them again. The merge error is"
    " reported.",
)
@click.option(
    "--checkpoint",
    type=GivenPath(),
    help="The checkpoint that an ONNX model was exported from. Its weights identify the modules.",
)
@click.option(
    "--map",
    "module_map",
    type=GivenPath(),
    help="A JSON file that maps nodes of an ONNX model to modules.",
)
@click.option(
    "--triton",
    type=GivenPath(),
    metavar="DIR",
    help="Write the bundle as a model of Triton Inference Server too, into this model repository."
    " Give --merge or --required-inputs with it.",
)
@trust_option
@json_option
def command(model: str, output: str, as_json: bool, **options: Any) -> None:
    """Write a bundle that ONNX Runtime runs.

    Without --merge the graph takes adapters as inputs: one file runs the base, any adapter, and
    batches with a different adapter in each row. With --merge it is a standard ONNX graph with the
    adapter merged into its weights.
    """
    from loradeploy.export.api import export

    given = given_options(options)
    if "side_inputs" in given:
        given["side_inputs"] = [kind.strip() for kind in given["side_inputs"].split(",")]
    if "fixed" in given:
        given["fixed"] = parse_sizes(given["fixed"])
    started = time.monotonic()
    with progress("loradeploy.export"):
        manifest = export(model, output, **given)
    values = {
        "bundle": output,
        "task": manifest.task,
        "mode": manifest.mode,
        "precision": manifest.precision,
        "base": manifest.base.name,
        "base_digest": manifest.base.digest,
        "targets": len(manifest.targets),
        "adapters": sorted(manifest.adapters),
        "merged_adapter": manifest.merged_adapter and manifest.merged_adapter.digest,
        "merge_error": json_values(manifest.merge_error),
        "seconds": round(time.monotonic() - started, 1),
    }
    if as_json:
        print_json(values)
    else:
        print_pairs(f"Exported {output}", {k: v for k, v in values.items() if k != "bundle"})
