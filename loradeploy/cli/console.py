"""Output of the commands: results on stdout, as text or JSON; progress on stderr.

A command collects its result in a dictionary of JSON values, and prints it in one of two ways:

    @json_option
    def command(..., as_json: bool) -> None:
        with progress("loradeploy.export"):      # log lines of that package, on a terminal only
            result = ...
        if as_json:
            print_json(result)                   # numbers as numbers, names in snake_case
        else:
            print_pairs(title, result)           # and print_rows for tables

A verb raises `LoraDeployError` for a mistake, which `loradeploy.cli.main` prints as one line, and
returns an exit status if it has one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from loradeploy.printable import as_json, printable, readable
from loradeploy.runtime.devices.table import KNOWN


class GivenPath(click.Path):
    """A path that is not empty: an unset variable of the shell must not mean this directory."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        """The path `value`, or a usage error."""
        if not os.fspath(value):
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


provider_option = click.option(
    "--provider",
    metavar="NAME[:NUMBER]",
    default="cpu",
    show_default=True,
    help="Run the graph on this execution provider of ONNX Runtime:"
    f" {', '.join(row.name for row in KNOWN)}, or one by ONNX Runtime's own name. cuda:1 is the"
    " second device.",
)
capture_option = click.option(
    "--capture-graphs",
    is_flag=True,
    help="Record runs on the device and replay them (CUDA graphs). Requires cuda or webgpu, with"
    " every node on the device.",
)
operator_option = click.option(
    "--operator",
    type=GivenPath(),
    metavar="FILE",
    help="Compute with the kernels of this library, which `loradeploy operator` built. The bundle"
    " must be exported with --operator.",
)
certificate_option = click.option(
    "--require-certificate",
    is_flag=True,
    help="Refuse a bundle or adapter that `loradeploy parity` has not passed in its current state.",
)
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python files that the model's config names. By default they are never run.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def flag_of(name: str) -> str:
    """The flag of the option that sets the parameter `name`."""
    return f"--{name.replace('_', '-')}"


def given_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the options that were given or have a default, by parameter."""
    return {name: value for name, value in values.items() if value is not None and value != ()}


def say(line: str) -> None:
    """Print a line on stdout, which may contain untrusted names and values."""
    click.echo(printable(line))


def say_text(text: str, *, end: str = "\n") -> None:
    """Print a generated text, or a piece of it, immediately.

    On a terminal, control characters are escaped; otherwise the text is printed unchanged.
    """
    # Not click.echo, which removes colors without a terminal.
    sys.stdout.write((readable(text) if sys.stdout.isatty() else text) + end)
    sys.stdout.flush()


def print_json(value: object) -> None:
    """Print `value` as JSON on stdout; a path is printed as its text."""
    click.echo(as_json(value, indent=2, default=str))


def print_pairs(title: str, pairs: Mapping[str, Any]) -> None:
    """Print names and values in two columns under a title, without those that are None."""
    rows = [
        (_words(name), printable(_as_text(value)))
        for name, value in pairs.items()
        if value is not None
    ]
    width = max((len(name) for name, _ in rows), default=0)
    say(title)
    for name, text in rows:
        say(f"  {name:<{width}}  {text}")


def print_rows(title: str, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table with a header under a title; nothing without rows."""
    lines = [[printable(_as_text(cell)) for cell in row] for row in rows]
    if not lines:
        return
    names = [_words(name) for name in header]
    if any(names):
        lines.insert(0, names)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    say(_words(title))
    for line in lines:
        padded = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        say(f"  {'  '.join(padded)}".rstrip())


@contextlib.contextmanager
def progress(package: str) -> Iterator[None]:
    """Print log lines of `package` on stderr, without a terminal only warnings."""
    logger = logging.getLogger(package)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False  # or a handler of the root logger would print it again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def size(count: int) -> str:
    """A number of bytes with a unit."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def _words(name: str) -> str:
    """A JSON key with spaces for underscores; other texts are unchanged."""
    return name.replace("_", " ") if name.isidentifier() and not name.startswith("lora_") else name


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(name)} {_as_text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        text = ", ".join(map(str, value))
        # A list of numbers is a shape.
        return f"[{text}]" if value and isinstance(value[0], int) else text or "none"
    return str(value)
