"""`loradeploy convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loradeploy.bundle.names import NATIVE_SUFFIX
from loradeploy.cli.console import json_option, print_json, say, trust_option

if TYPE_CHECKING:
    from loradeploy.adapter import Adapter


@click.command(
    name="convert",
    short_help="Convert an adapter: to .onnx_adapter or back, to a lower rank, to a plain one.",
    epilog="Example: loradeploy convert adapters/sport --bundle bundle --output sport.onnx_adapter",
)
@click.argument("adapter", type=click.Path())
@click.option(
    "--bundle",
    type=click.Path(),
    help="Convert to an .onnx_adapter file for this bundle, or such a file of its back.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Reduce the adapter to this rank, and report the error.",
)
@click.option(
    "--model",
    help="Make an adapter that began with PiSSA or OLoRA on this base model standard LoRA.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(),
    help="Write to this .onnx_adapter file, or to this directory of a PEFT adapter.",
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
    """Convert ADAPTER in the one way that an option tells.

    --bundle: a PEFT directory for ONNX Runtime's own LoraAdapter, or such a file to a PEFT
    directory. The scaling is folded into the factors of an .onnx_adapter file; a PEFT directory
    made of one computes the same with alpha equal to the rank.

    --rank: the nearest adapter of a lower rank, by singular values.

    --model: an adapter that PEFT trained from PiSSA or OLoRA, whose factors only mean something on
    a changed base, to a plain one of twice the rank on the base as it is.
    """
    from loradeploy.errors import UsageError
    from loradeploy.files import check_keeps_inputs
    from loradeploy.lora.loading import custom_code

    if [bundle, rank, model].count(None) != 2:
        raise UsageError("give one of --bundle, --rank and --model: what to convert to")
    if trust_remote_code and model is None:
        raise UsageError("--trust-remote-code is for the model of --model")
    check_keeps_inputs(output, [place for place in (adapter, bundle, model) if place is not None])
    if bundle is not None:
        made, facts = _for_bundle(adapter, bundle, output)
    elif rank is not None:
        made, facts = _lower(adapter, rank, output)
    else:
        with custom_code(trust_remote_code):
            made, facts = _plain(adapter, str(model), output)
    if as_json:
        print_json({"output": output, "digest": made.digest, "targets": len(made.factors), **facts})
        return
    say(f"{output}: {len(made.factors)} target modules, digest {made.digest}")
    if "error" in facts:
        say(
            f"relative error of the update: {facts['error']:.3g} in all,"
            f" {facts['worst_error']:.3g} at most, in {facts['worst_module']}"
        )


def _for_bundle(adapter: str, bundle: str, output: str) -> tuple[Adapter, dict[str, Any]]:
    from loradeploy.adapter import load_adapter
    from loradeploy.bundle.adapter_inputs.base import BundleBase
    from loradeploy.bundle.adapter_inputs.factors import adapter_from_side_inputs
    from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter, write_onnx_adapter
    from loradeploy.bundle.manifest import read_manifest
    from loradeploy.errors import UsageError

    manifest = read_manifest(bundle)
    base = BundleBase(Path(bundle), manifest)
    to_native, from_native = (name.endswith(NATIVE_SUFFIX) for name in (output, adapter))
    if to_native == from_native:
        raise UsageError(
            f"one of ADAPTER and --output is an {NATIVE_SUFFIX} file, the other a PEFT directory"
        )
    if to_native:
        read = load_adapter(adapter)
        write_onnx_adapter(read, manifest, output, base)
    else:
        read = adapter_from_side_inputs(read_onnx_adapter(adapter), manifest, base)
        _save(read, output)
    return read, {}


def _lower(adapter: str, rank: int, output: str) -> tuple[Adapter, dict[str, Any]]:
    from loradeploy.adapter import load_adapter
    from loradeploy.adapter.reduce import reduce_rank
    from loradeploy.errors import UsageError

    read = load_adapter(adapter)
    highest = max((pair.rank for pair in read.factors.values()), default=0)
    if rank >= highest:
        raise UsageError(f"{adapter} has no module of a higher rank than {highest}: give a lower")
    reduced, report = reduce_rank(read, rank)
    _save(reduced, output)
    worst = max(report.errors, key=report.errors.__getitem__)
    return reduced, {
        "error": report.total,
        "worst_error": report.worst,
        "worst_module": worst,
        "errors": dict(report.errors),
    }


def _plain(adapter: str, model: str, output: str) -> tuple[Adapter, dict[str, Any]]:
    from loradeploy.adapter import load_adapter
    from loradeploy.errors import UsageError

    read = load_adapter(adapter)
    if not read.changes_base:
        raise UsageError(f"{adapter} is a plain adapter already: it can be used as it is")

    from loradeploy.lora.standard import plain_on_checkpoint

    made = plain_on_checkpoint(read, model)
    _save(made, output)
    return made, {}


def _save(adapter: Adapter, output: str) -> None:
    from loradeploy.adapter import save_adapter
    from loradeploy.adapter.config import CONFIG_NAME
    from loradeploy.adapter.peft import own_files
    from loradeploy.errors import UsageError
    from loradeploy.files import atomic_directory

    if output.endswith(NATIVE_SUFFIX):
        raise UsageError(f"{output}: an {NATIVE_SUFFIX} file is for a bundle, give --bundle")
    with atomic_directory(output, marker=CONFIG_NAME, own_files=own_files) as place:
        save_adapter(adapter, place)
