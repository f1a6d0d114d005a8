"""`loradeploy convert`."""

from __future__ import annotations

from typing import Any

import click

from loradeploy.cli.console import GivenPath, json_option, print_json, say, trust_option


@click.command(
    name="convert",
    short_help="Convert an adapter: .onnx_adapter and back, other libraries, a lower rank.",
    epilog="Example: loradeploy convert adapters/sport --bundle bundle --output sport.onnx_adapter",
)
@click.argument("adapter", type=GivenPath())
@click.option(
    "--bundle",
    type=GivenPath(),
    help="Convert to or from an .onnx_adapter file for the graph of this bundle.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Reduce the adapter to this rank, and report the error.",
)
@click.option(
    "--model",
    type=GivenPath(),
    metavar="ID|PATH",
    help="Convert an adapter trained with PiSSA or OLoRA to standard LoRA on this base model, or"
    " give the base of another library's adapter if the conversion needs it.",
)
@click.option(
    "--name",
    help="Convert the adapter of this name, if another library's file has several.",
)
@click.option(
    "--output",
    required=True,
    type=GivenPath(),
    help="Write to this .onnx_adapter file or PEFT adapter directory.",
)
@trust_option
@json_option
def command(adapter: str, output: str, as_json: bool, **options: Any) -> None:
    """Convert ADAPTER in one of four ways.

    Without options, from another library's format to a PEFT directory. The format is detected from
    the content: mlx-lm, AdapterHub, Olive (.onnx_adapter too), torchtune, litgpt and llama.cpp (the
    last three need --model), text encoder adapters of kohya (needs --model) and diffusers, the
    tasks of jina-embeddings-v3 (--name), and a state_dict() with adapter names in its keys (--name,
    if there are several).

    With --bundle, from a PEFT directory to a file for ONNX Runtime's LoraAdapter, or back. The
    factors in an .onnx_adapter file include the scaling; a PEFT directory converted from one has
    alpha equal to the rank.

    With --rank, to the best approximation of a lower rank, by singular values.

    With --model, from an adapter that PEFT trained with PiSSA or OLoRA, which changes the base, to
    standard LoRA of twice the rank on the unchanged base.
    """
    from loradeploy.conversion import convert

    conversion = convert(adapter, output, **options)
    digest, targets = conversion.adapter.digest, len(conversion.adapter.factors)
    report = conversion.reduction
    if as_json:
        facts = {"output": output, "digest": digest, "targets": targets}
        if report is not None:
            facts["error"] = report.total
            facts["worst_error"] = report.worst
            facts["worst_module"] = report.worst_module
            facts["errors"] = dict(report.errors)
        print_json(facts)
        return
    say(f"{output}: {targets} target modules, digest {digest}")
    if report is not None:
        say(
            f"relative error of the update: {report.total:.3g} in total,"
            f" largest {report.worst:.3g} in {report.worst_module}"
        )
