"""Paths that cannot leave their directory, and JSON; how files are written is in writing.py."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loradeploy.errors import BundleError, LoraDeployError, first_line, shown
from loradeploy.parsing import parse_json
from loradeploy.printable import as_json
from loradeploy.writing import (
    atomic_directory,
    atomic_file,
    check_keeps_inputs,
    check_replaceable,
)

__all__ = [
    "MAX_JSON_BYTES",
    "atomic_directory",
    "atomic_file",
    "check_keeps_inputs",
    "check_replaceable",
    "inside",
    "plain",
    "read_json",
    "write_json",
]

MAX_JSON_BYTES = 16 * 1024 * 1024


def inside(root: str | os.PathLike[str], relative: str) -> Path:
    """The path of `relative` below `root`.

    Raises:
        BundleError: `relative` is absolute or leads out of `root`, by `..` or through a link, or is
            no path at all.
    """
    top = Path(root).resolve()
    try:
        path = (top / relative).resolve()
        path.is_file()  # a name that is too long is found out only here
    except (OSError, RuntimeError, ValueError):  # a null byte, links in a circle
        raise BundleError(f"{shown(relative)} is no path of a file in {root}") from None
    if os.path.isabs(relative) or not path.is_relative_to(top):
        raise BundleError(f"{shown(relative)} leads out of {root}: only files inside it are read")
    return path


def read_json(
    path: str | os.PathLike[str],
    *,
    error: type[LoraDeployError],
    limit: int = MAX_JSON_BYTES,
    finite: bool = True,
) -> dict[str, Any]:
    """The JSON object in the file `path`, of at most `limit` bytes.

    `finite`: whether infinite numbers and NaN are refused, which configs of models may have.

    Raises:
        error: the file is missing, too large, no JSON as `parse_json` reads it, or not an object.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if size > limit:
            raise error(f"{file} has {size:,} bytes, more than the {limit:,} that are read")
        value = parse_json(file.read_bytes(), finite=finite)
    except FileNotFoundError:
        raise error(f"{file} does not exist") from None
    except (OSError, ValueError) as problem:
        raise error(f"{file} is not readable as JSON: {first_line(problem)}") from None
    if not isinstance(value, dict):
        raise error(f"{file} holds a JSON {type(value).__name__}, an object is needed")
    return value


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as indented JSON, atomically, the same bytes for the same value."""
    with atomic_file(path) as temporary:
        temporary.write_text(as_json(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """`value` as JSON holds it, with the same text for the same value.

    Dataclasses and mappings become objects, the latter in the order of their names; numbers that
    are not finite become null.
    """
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(value[name]) for name in sorted(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
