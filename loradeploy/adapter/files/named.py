"""Read `[NAME=]DIR`, as commands and functions take adapters."""

from __future__ import annotations

from pathlib import Path


def named_directory(text: str) -> tuple[str, Path]:
    """The name and the path in `text`. The default name is that of the directory.

    A path may contain '=', too (lr=1e-4, as in sweeps): if the whole `text` is an existing path, it
    is used as the path, otherwise the first '=' ends the name. A ~ after it is expanded here,
    because shells do not.
    """
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        return Path(text).resolve().name, Path(text)
    try:
        path = Path(rest).expanduser()
    except RuntimeError:  # an unknown user
        path = Path(rest)
    return name or path.resolve().name, path
