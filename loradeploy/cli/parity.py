"""`loradeploy parity`."""

from __future__ import annotations

import sys

import click

from loradeploy.cli.console import json_option, print_json, progress
from loradeploy.parity.prompts import GENERATED


@click.command(
    name="parity",
    short_help="Prove that a bundle computes what PyTorch computes.",
    epilog="Example: loradeploy parity bundle --model ./smollm2 --report parity.json",
)
@click.argument("bundle", type=click.Path())
@click.option("--model", help="The base model: Hugging Face id or directory.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="PEFT adapter besides the bundle's own; the one that a merged bundle claims to hold.",
)
@click.option(
    "--report",
    "reports",
    multiple=True,
    metavar="FILE",
    help="Write a report: .json, .xml (JUnit), .md or .html; repeat for more.",
)
@click.option(
    "--backends",
    metavar="NAME,…",
    help="Only these: torch-merged, peft, onnx-merged, onnx-side-inputs, onnx-native, onnx-mixed.",
)
@click.option("--prompts", metavar="FILE", help="One prompt a line, or JSONL.")
@click.option(
    "--tokens",
    type=int,
    default=GENERATED,
    show_default=True,
    help="To generate after each prompt.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="For random tokens, without a tokenizer."
)
@click.option("--provider", "providers", multiple=True, help="onnxruntime execution provider.")
@click.option("--controls", is_flag=True, help="Make mistakes on purpose; each must be caught.")
@click.option(
    "--localise/--no-localise",
    default=None,
    help="Find the first module that diverges: always, or never; without, where something failed.",
)
@json_option
def command(
    bundle: str,
    model: str | None,
    adapters: tuple[str, ...],
    reports: tuple[str, ...],
    backends: str | None,
    prompts: str | None,
    tokens: int,
    seed: int,
    providers: tuple[str, ...],
    controls: bool,
    localise: bool | None,
    as_json: bool,
) -> int:
    """Hold every way to run BUNDLE against PyTorch; exit 0 only where all agree, 1 where not.

    The verdict is written into the bundle too, as parity.json.
    """
    from loradeploy.parity.api import parity

    with progress("loradeploy.parity"):
        found = parity(
            bundle,
            model=model,
            adapters=list(adapters),
            report=reports,
            backends=None if backends is None else [n.strip() for n in backends.split(",") if n],
            prompts=prompts,
            tokens=tokens,
            seed=seed,
            providers=providers or None,
            controls=controls,
            localise=localise,
        )
    if as_json:
        print_json(found.to_json())
    else:
        from rich.console import Console

        from loradeploy.parity.table import print_report

        print_report(found, Console(file=sys.stdout, highlight=False))
    return 0 if found.passed else 1
