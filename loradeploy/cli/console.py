"""How the verbs print: results on stdout, as a table for people or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def print_json(value: object) -> None:
    """Print `value` as JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_pairs(title: str, pairs: Mapping[str, Any]) -> None:
    """Print names and values in two columns under a title; those that are None are left out."""
    rows = [(name, _plain(value)) for name, value in pairs.items() if value is not None]
    width = max((len(name) for name, _ in rows), default=0)
    click.echo(title)
    for name, text in rows:
        click.echo(f"  {name:<{width}}  {text}")


def print_rows(title: str, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table with a header under a title; nothing where there are no rows."""
    lines = [[_plain(cell) for cell in row] for row in rows]
    if not lines:
        return
    lines.insert(0, list(header))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    click.echo(title)
    for line in lines:
        padded = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        click.echo(f"  {'  '.join(padded)}".rstrip())


def size(count: int) -> str:
    """A number of bytes for people."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)
