"""`loradeploy operator`."""

from __future__ import annotations

import click

from loradeploy.cli.console import GivenPath, json_option, print_json, say


@click.command(
    name="operator",
    short_help="Build the library that computes low-rank updates in mixed batches.",
    epilog="Example: loradeploy operator lora_add.so",
)
@click.argument("output", type=GivenPath())
@json_option
def command(output: str, as_json: bool) -> None:
    """Compile the operator's library to the file OUTPUT, for this machine's processor.

    It needs a C++ compiler: $CXX, or g++ or clang++. `run`, `bench`, `parity` and `serve` take the
    library as --operator OUTPUT, for bundles that were exported with --operator.
    """
    from loradeploy.runtime.operator.build import build_operator

    path = build_operator(output)
    if as_json:
        print_json({"output": str(path)})
    else:
        say(f"wrote {path}")
