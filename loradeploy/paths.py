"""Paths as users give them, also ones that lead nowhere.

Path.resolve and Path.expanduser raise RuntimeError for links in a circle and for an unknown user.
`resolved` and `expanded` return a path then, whose opening fails with an error that names it.
`takes_paths` refuses what cannot be a path at all, before a function uses it.
"""

from __future__ import annotations

import errno
import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loradeploy.errors import UsageError, shown

if TYPE_CHECKING:
    from typing_extensions import ParamSpec

    _P = ParamSpec("_P")
_R = TypeVar("_R")


def resolved(path: str | os.PathLike[str]) -> Path:
    """`path` as an absolute path, with the links in it followed as far as they lead."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a null byte
        return Path(path)


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading ~ or ~USER replaced by that home directory, if there is one."""
    return Path(os.path.expanduser(path))


def takes_paths(*names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a public function: check the arguments `names`, which are paths.

    The function then raises UsageError for a value of another type, and for a path that the system
    does not support. None is allowed if it is the default, and a collection or a mapping of paths
    if the annotation has an `Iterable`.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        declared = {name: signature.parameters[name] for name in names}

        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            given = signature.bind(*args, **kwargs).arguments
            for name in given.keys() & declared.keys():
                several = "Iterable" in str(declared[name].annotation)
                if given[name] is not None or declared[name].default is not None:
                    for path in _paths(given[name]) if several else (given[name],):
                        _check_path(name, path)
            return function(*args, **kwargs)

        return checked

    return decorate


def _paths(given: object) -> Iterable[object]:
    """The paths in a collection or a mapping; none of a generator, which can be read only once."""
    if isinstance(given, Mapping):
        return given.values()
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        return (given,)
    return given if isinstance(given, Collection) else ()


def _check_path(name: str, value: object) -> None:
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise UsageError(f"`{name}` is {shown(value)}: give a path, as a str or a pathlib.Path")
    if not os.fspath(value):
        raise UsageError(f"`{name}` is empty: give a path")
    try:
        os.lstat(value)
    except UnicodeEncodeError:
        raise UsageError(
            f"`{name}` is {shown(value)}, with characters that the system does not support"
        ) from None
    except ValueError:
        raise UsageError(f"`{name}` is {shown(value)}: a path has no null bytes") from None
    except OSError as problem:  # a path that does not exist may be an output, or the id of a model
        if problem.errno == errno.ENAMETOOLONG:
            length = len(os.fspath(value))
            raise UsageError(
                f"`{name}` is {shown(value)}, of {length:,} characters: the system does not"
                " support a path, or a name in it, of this length"
            ) from None
