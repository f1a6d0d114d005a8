"""`loradeploy export`."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator

import click

_TASKS = ("causal-lm", "sequence-classification", "feature-extraction")
_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")


@click.command(
    name="export",
    short_help="Export a model to a bundle, with side inputs or an adapter merged.",
    epilog="Example: loradeploy export --model ./smollm2 --output bundle --adapter sport=./sport",
)
@click.option("--model", required=True, help="Hugging Face id or directory, ONNX file, or bundle.")
@click.option("--output", required=True, type=click.Path(), help="Directory of the bundle.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="PEFT adapter to put into the bundle; repeat for more.",
)
@click.option("--merge", is_flag=True, help="Fold the one adapter in; no side inputs.")
@click.option(
    "--precision",
    type=click.Choice(_PRECISIONS),
    help="Of the base's weights [default: fp32, or what an ONNX model has].",
)
@click.option(
    "--task",
    type=click.Choice(_TASKS),
    help="Where adapters and architecture do not tell it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: str,
    output: str,
    adapters: tuple[str, ...],
    merge: bool,
    precision: str | None,
    task: str | None,
    as_json: bool,
) -> None:
    """Write a bundle that ONNX Runtime runs.

    Without --merge its graph takes adapters as inputs: one file serves the base, any adapter, and
    batches in which each row has its own. With --merge it is a plain graph with the adapter in its
    weights.
    """
    from loradeploy.export.api import export

    started = time.monotonic()
    with _progress():
        manifest = export(
            model,
            output,
            adapters=list(adapters),
            merge=merge,
            precision=precision,
            task=task,
        )
    seconds = time.monotonic() - started
    if as_json:
        result = {
            "bundle": output,
            "task": manifest.task,
            "mode": manifest.mode,
            "precision": manifest.precision,
            "base": {"name": manifest.base.name, "digest": manifest.base.digest},
            "targets": len(manifest.targets),
            "adapters": sorted(manifest.adapters),
            "seconds": round(seconds, 1),
        }
        click.echo(json.dumps(result, indent=2))
        return
    took = f"{len(manifest.targets)} target modules" if manifest.targets else "adapter merged"
    click.echo(
        f"{output}: {manifest.task}, {manifest.mode}, {manifest.precision}, {took}, {seconds:.1f} s"
    )


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """Show the export's steps on stderr while it runs; only warnings where that is no terminal."""
    logger = logging.getLogger("loradeploy.export")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logger.level
    logger.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
