"""Paths as users give them, also ones that lead nowhere.

Path.resolve and Path.expanduser raise RuntimeError for links in a circle and for an unknown user.
These functions return a path then, whose opening fails with an error that names it.
"""

from __future__ import annotations

import os
from pathlib import Path


def resolved(path: str | os.PathLike[str]) -> Path:
    """`path` as an absolute path, with the links in it followed as far as they lead."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a null byte
        return Path(path)


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading ~ or ~USER replaced by that home directory, if there is one."""
    return Path(os.path.expanduser(path))
