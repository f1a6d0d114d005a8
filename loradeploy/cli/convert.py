"""`loradeploy convert`."""

from __future__ import annotations

from pathlib import Path

import click

from loradeploy.bundle.names import NATIVE_SUFFIX
from loradeploy.cli.console import json_option, print_json


@click.command(
    name="convert",
    short_help="Convert an adapter to .onnx_adapter, or back.",
    epilog="Example: loradeploy convert adapters/sport --bundle bundle --output sport.onnx_adapter",
)
@click.argument("adapter", type=click.Path())
@click.option("--bundle", required=True, type=click.Path(), help="The bundle that it is for.")
@click.option(
    "--output",
    required=True,
    type=click.Path(),
    help="An .onnx_adapter file, or the directory of a PEFT adapter.",
)
@json_option
def command(adapter: str, bundle: str, output: str, as_json: bool) -> None:
    """Convert ADAPTER for ONNX Runtime's own LoraAdapter, or such a file to a PEFT directory.

    The scaling is folded into the factors of an .onnx_adapter file; a PEFT directory made of one
    computes the same with alpha equal to the rank.
    """
    from loradeploy.adapter import load_adapter, save_adapter
    from loradeploy.adapter.config import CONFIG_NAME
    from loradeploy.bundle.factors import adapter_from_side_inputs
    from loradeploy.bundle.manifest import read_manifest
    from loradeploy.bundle.native import read_onnx_adapter, write_onnx_adapter
    from loradeploy.errors import UsageError
    from loradeploy.files import atomic_directory

    manifest = read_manifest(bundle)
    to_native, from_native = (name.endswith(NATIVE_SUFFIX) for name in (output, adapter))
    if to_native == from_native:
        raise UsageError(
            f"one of ADAPTER and --output is an {NATIVE_SUFFIX} file, the other a PEFT directory"
        )
    if to_native:
        read = load_adapter(adapter)
        write_onnx_adapter(read, manifest, output)
    else:
        read = adapter_from_side_inputs(read_onnx_adapter(adapter), manifest)
        with atomic_directory(output, marker=CONFIG_NAME) as place:
            save_adapter(read, place)
    if as_json:
        print_json({"output": output, "digest": read.digest, "targets": len(read.factors)})
    else:
        click.echo(f"{Path(output)}: {len(read.factors)} target modules, digest {read.digest}")
