"""`loradeploy operator`."""

from __future__ import annotations

import click

from loradeploy.cli.console import GivenPath, json_option, print_json, progress, say


@click.command(
    name="operator",
    short_help="Build the library of kernels for bundles that were exported with --operator.",
    epilog="Example: loradeploy operator operators.so",
)
@click.argument("output", type=GivenPath())
@json_option
def command(output: str, as_json: bool) -> None:
    """Compile the operators' library to the file OUTPUT, for this machine's processor.

    It needs a C++ compiler: $CXX, or g++ or clang++. `run`, `bench`, `parity` and `serve` take the
    library as --operator OUTPUT, for bundles that were exported with --operator.
    """
    from loradeploy.runtime.operator.build import build_operator
    from loradeploy.runtime.operator.library import check_library, instructions_of

    with progress("loradeploy.runtime.operator"):
        path = build_operator(output)
    operators, instructions = sorted(check_library(path)), instructions_of(path)
    if as_json:
        print_json({"output": str(path), "instructions": instructions, "operators": operators})
    else:
        say(f"wrote {path} for {instructions}, with kernels of {', '.join(operators)}")
