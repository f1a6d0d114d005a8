"""Read `[NAME=]DIR`, as commands and functions take adapters."""

from __future__ import annotations

from pathlib import Path


def named_directory(text: str) -> tuple[str, Path]:
    """The name and the path of the adapter that `text` gives; a directory names itself.

    A path may contain '=' too (folders of a sweep, lr=1e-4): one that exists is taken as it is,
    otherwise the first '=' ends the name. The shell expands no ~ behind it, which is done here.
    """
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        return Path(text).resolve().name, Path(text)
    try:
        path = Path(rest).expanduser()
    except RuntimeError:  # a user who is not known
        path = Path(rest)
    return name or path.resolve().name, path
