"""What keeps a file from being written, told in one line that names the file.

Python's errors of a write have no path, and libraries in other languages have errors of their own,
or hide the reason: these ask the disk again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from loradeploy.errors import LoraDeployError, OutputError, first_line

# What keeps a file from being written, whatever it is, and what to do about it.
_ADVICE: Final = {
    errno.ENOSPC: "free some space there, or choose another place",
    errno.EDQUOT: "free some space there, or choose another place",
    errno.EFBIG: "a limit on the size of files is in the way, see ulimit -f",
    errno.EROFS: "choose a place that can be written to",
    errno.EIO: "look at the disk, or choose another place",
}
_PROBE_BYTES: Final = 1 << 16


@contextlib.contextmanager
def explained(
    target: str | os.PathLike[str], temporary: str | os.PathLike[str] | None = None
) -> Iterator[None]:
    """Raise what keeps `target` from being written as an OutputError that names it.

    `temporary` is where it is written, a file or a directory. Errors of other kinds come out as
    they are, such as those of a file that is read meanwhile.
    """
    place = None if temporary is None else Path(temporary).absolute()
    try:
        yield
    except OutputError as problem:
        if place is None or not Path(problem.filename).absolute().is_relative_to(place):
            raise
        raise OutputError(target, problem.strerror or "", problem.errno) from problem
    except LoraDeployError:
        raise
    except Exception as problem:
        found: Exception = problem
        silent = not isinstance(problem, OSError) or problem.errno in (None, errno.EIO)
        if silent and place is not None:
            found = _probe(place if place.is_dir() else place.parent) or problem
        reason = _reason(found, Path(target).absolute(), place)
        if reason is None:
            raise
        number = found.errno if isinstance(found, OSError) else None
        raise OutputError(target, reason, number) from problem


@contextlib.contextmanager
def scratch_directory(prefix: str = "loradeploy-") -> Iterator[Path]:
    """A directory for what is needed for a while, where the system keeps such.

    Raises:
        OutputError: something in it cannot be written.
    """
    with explained(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix=prefix) as name:
        place = Path(name)
        with explained(place.parent, place):
            yield place


def _reason(problem: Exception, target: Path, temporary: Path | None) -> str | None:
    """Why `target` cannot be written, or None where `problem` is something else."""
    if not isinstance(problem, OSError):
        return None
    if problem.errno is None:  # numpy counts what it wrote, and says no more
        return f"{first_line(problem)}: is the disk full?"
    names = [name for name in (problem.filename, problem.filename2) if name is not None]
    ours = any(_is_of(name, target, temporary) for name in names)
    if problem.errno in _ADVICE and (ours or not names):
        return f"{problem.strerror}: {_ADVICE[problem.errno]}"
    return problem.strerror if ours else None


def _is_of(name: object, target: Path, temporary: Path | None) -> bool:
    """Whether `name` is the file that is written, a directory around it, or something in it."""
    if not isinstance(name, str | bytes | os.PathLike):
        return False
    path = Path(os.fsdecode(name)).absolute()
    return target.is_relative_to(path) or (temporary is not None and path.is_relative_to(temporary))


def _probe(directory: Path) -> OSError | None:
    """What happens when a little is written into `directory`."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        return problem
    return None
