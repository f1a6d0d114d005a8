"""How the verbs speak: results on stdout, for people or for programs; progress on stderr.

A verb gathers its result in a dictionary of plain values, then prints it one of two ways:

    @json_option
    def command(..., as_json: bool) -> None:
        with progress("loradeploy.export"):      # what that package logs, on a terminal only
            result = ...
        if as_json:
            print_json(result)                   # numbers as numbers, names in snake_case
        else:
            print_pairs(title, result)           # and print_rows for what is a table

A verb raises `LoraDeployError` for a mistake, which `loradeploy.cli.main` prints as one line, and
returns an exit status where it has one to tell.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from loradeploy.printable import as_json, printable, readable
from loradeploy.runtime.devices.table import KNOWN

provider_option = click.option(
    "--provider",
    metavar="NAME[:NUMBER]",
    default="cpu",
    show_default=True,
    help="Run the graph on this execution provider of ONNX Runtime:"
    f" {', '.join(row.name for row in KNOWN)}, or one by ONNX Runtime's own name. cuda:1 is the"
    " second device.",
)
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python files that the model's config names; without it they are never run.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def say(line: str) -> None:
    """Print a line on stdout; names and values of others may be in it."""
    click.echo(printable(line))


def say_text(text: str, *, end: str = "\n") -> None:
    """Print a text that a model made, or a piece of it, at once.

    On a terminal nothing in it acts on the terminal; a program that reads it gets it as it is.
    """
    # click.echo would take colors out of it where there is no terminal.
    sys.stdout.write((readable(text) if sys.stdout.isatty() else text) + end)
    sys.stdout.flush()


def print_json(value: object) -> None:
    """Print `value` as JSON on stdout; a path is printed as its text."""
    click.echo(as_json(value, indent=2, default=str))


def print_pairs(title: str, pairs: Mapping[str, Any]) -> None:
    """Print names and values in two columns under a title; those that are None are left out."""
    rows = [
        (_words(name), printable(_plain(value)))
        for name, value in pairs.items()
        if value is not None
    ]
    width = max((len(name) for name, _ in rows), default=0)
    say(title)
    for name, text in rows:
        say(f"  {name:<{width}}  {text}")


def print_rows(title: str, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table with a header under a title; nothing where there are no rows."""
    lines = [[printable(_plain(cell)) for cell in row] for row in rows]
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
    """Show what `package` logs on stderr meanwhile; only warnings where that is no terminal."""
    logger = logging.getLogger(package)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False  # or a handler at the root would say it again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def size(count: int) -> str:
    """A number of bytes for people."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def _words(name: str) -> str:
    """A key of the JSON as people read it; what is no key stays as it is."""
    return name.replace("_", " ") if name.isidentifier() and not name.startswith("lora_") else name


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(name)} {_plain(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        text = ", ".join(map(str, value))
        # A list of numbers is a shape.
        return f"[{text}]" if value and isinstance(value[0], int) else text or "none"
    return str(value)
