"""`loradeploy inspect`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from loradeploy.cli.console import GivenPath, json_option, print_json, print_pairs, print_rows, size

Facts = dict[str, Any]


@click.command(
    name="inspect",
    short_help="Describe an adapter, a bundle or an ONNX file.",
    epilog="Example: loradeploy inspect adapters/sport",
)
@click.argument("path", type=GivenPath())
@json_option
def command(path: str, as_json: bool) -> None:
    """Describe PATH: an adapter, a bundle, an ONNX file, an .onnx_adapter or a .safetensors file.

    Tables join rows that are alike in every layer, with a count; --json has all rows.
    """
    from loradeploy.inspection.api import inspect
    from loradeploy.inspection.facts import as_facts

    facts = as_facts(inspect(Path(path)))
    if as_json:
        print_json(facts)
        return
    tables = {name: value for name, value in facts.items() if _is_table(value)}
    pairs = {
        name: size(value) if name.endswith("bytes") else value
        for name, value in facts.items()
        if name != "kind" and name not in tables
    }
    print_pairs(f"{path}: {facts['kind']}", pairs)
    for name, rows in tables.items():
        shown = _alike(_filled(rows))
        print_rows(name, shown[0] if shown else (), [row.values() for row in shown])


def _filled(rows: list[Facts]) -> list[Facts]:
    """Return `rows` with the same fields: a row has no field for what is unknown."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "") for name in names} for row in rows]


def _alike(rows: list[Facts]) -> list[Facts]:
    """Return `rows`, with those that differ only in a layer's index joined and counted."""
    groups: dict[tuple[Any, ...], list[Facts]] = {}
    for row in rows:
        groups.setdefault(tuple(_cell(value) for value in row.values()), []).append(row)
    if len(groups) == len(rows):
        return rows
    return [
        {
            **(dict(zip(group[0], cells, strict=True)) if len(group) > 1 else group[0]),
            "count": len(group),
        }
        for cells, group in groups.items()
    ]


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return f"[{', '.join(str(_cell(part)) for part in value)}]"
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", value) if isinstance(value, str) else value


def _is_table(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(row, Mapping) for row in value)
