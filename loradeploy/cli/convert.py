"""`loradeploy convert`."""

from __future__ import annotations

import click

from loradeploy.cli.console import json_option, print_json, say, trust_option


@click.command(
    name="convert",
    short_help="Convert an adapter: to .onnx_adapter or back, to a lower rank, to standard LoRA.",
    epilog="Example: loradeploy convert adapters/sport --bundle bundle --output sport.onnx_adapter",
)
@click.argument("adapter", type=click.Path())
@click.option(
    "--bundle",
    type=click.Path(),
    help="Convert to or from an .onnx_adapter file for the graph of this bundle.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Reduce the adapter to this rank, and report the error of doing so.",
)
@click.option(
    "--model",
    help="Convert an adapter that began with PiSSA or OLoRA to standard LoRA on this base model.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(),
    help="Write to this .onnx_adapter file or PEFT adapter directory.",
)
@trust_option
@json_option
def command(
    adapter: str,
    bundle: str | None,
    rank: int | None,
    model: str | None,
    output: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Convert ADAPTER in one of three ways; give the option of one.

    --bundle: a PEFT directory to a file for ONNX Runtime's own LoraAdapter, or such a file to a
    PEFT directory. The scaling is folded into the factors of an .onnx_adapter file; a PEFT
    directory made of one computes the same with alpha equal to the rank.

    --rank: the nearest adapter of a lower rank, by singular values.

    --model: an adapter that PEFT trained from PiSSA or OLoRA, whose factors only mean something on
    a changed base, to standard LoRA of twice the rank on the base as it is.
    """
    from loradeploy.conversion import convert

    conversion = convert(
        adapter,
        output,
        bundle=bundle,
        rank=rank,
        model=model,
        trust_remote_code=trust_remote_code,
    )
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
            f"relative error of the update: {report.total:.3g} in all,"
            f" {report.worst:.3g} at most, in {report.worst_module}"
        )
