"""Read `[NAME=]DIR`, as commands and functions take adapters."""

from __future__ import annotations

from pathlib import Path

from loradeploy.errors import UsageError, shown
from loradeploy.paths import expanded, resolved


def named_directory(text: str) -> tuple[str, Path]:
    """The name and the path in `text`. The default name is that of the directory.

    A path may contain '=', too (lr=1e-4, as in sweeps): if the whole `text` is an existing path, it
    is used as the path, otherwise the first '=' ends the name. A ~ after it is expanded here,
    because shells do not.

    Raises:
        UsageError: the path is empty, such as from an unset shell variable.
    """
    name, equals, rest = text.partition("=")
    if not (rest if equals else text):
        raise UsageError(f"{shown(text)} names no directory: give an adapter as [NAME=]DIR")
    if not equals or Path(text).exists():
        return resolved(text).name, Path(text)
    path = expanded(rest)
    return name or resolved(path).name, path
