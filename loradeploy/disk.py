"""Turn failures of writing a file into an OutputError that names the file and the reason.

Python's write errors have no path, and libraries in other languages raise other errors or hide the
reason, which a test write then finds.
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

# What to do about errors that affect any write.
_ADVICE: Final = {
    errno.ENOSPC: "free some space there, or choose another directory",
    errno.EDQUOT: "free some space there, or choose another directory",
    errno.EFBIG: "the limit on file sizes is exceeded, see ulimit -f",
    errno.EROFS: "choose a writable directory",
    errno.EIO: "check the disk, or choose another directory",
}
_PROBE_BYTES: Final = 1 << 16


@contextlib.contextmanager
def explained(
    target: str | os.PathLike[str], temporary: str | os.PathLike[str] | None = None
) -> Iterator[None]:
    """Raise an OutputError that names `target` if it cannot be written.

    `temporary`: the file or directory that is actually written. Other errors, such as of reading
    another file, pass unchanged.
    """
    written = None if temporary is None else Path(temporary).absolute()
    try:
        yield
    except OutputError as problem:
        if written is None or not Path(problem.filename).absolute().is_relative_to(written):
            raise
        raise OutputError(target, problem.strerror or "", problem.errno) from problem
    except LoraDeployError:
        raise
    except Exception as problem:
        found: Exception = problem
        silent = not isinstance(problem, OSError) or problem.errno in (None, errno.EIO)
        if silent and written is not None:
            found = _probe(written if written.is_dir() else written.parent) or problem
        reason = _reason(found, Path(target).absolute(), written)
        if reason is None:
            raise
        number = found.errno if isinstance(found, OSError) else None
        raise OutputError(target, reason, number) from problem


@contextlib.contextmanager
def scratch_directory(prefix: str = "loradeploy-") -> Iterator[Path]:
    """A temporary directory of the system, removed on exit.

    Raises:
        OutputError: something in it cannot be written.
    """
    with explained(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix=prefix) as name:
        directory = Path(name)
        with explained(directory.parent, directory):
            yield directory


def _reason(problem: Exception, target: Path, temporary: Path | None) -> str | None:
    """Why `target` cannot be written, or None if `problem` has another cause."""
    if not isinstance(problem, OSError):
        return None
    if problem.errno is None:  # numpy reports only the count of bytes
        return f"{first_line(problem)}: is the disk full?"
    names = [name for name in (problem.filename, problem.filename2) if name is not None]
    ours = any(_is_of(name, target, temporary) for name in names)
    if problem.errno in _ADVICE and (ours or not names):
        return f"{problem.strerror}: {_ADVICE[problem.errno]}"
    return problem.strerror if ours else None


def _is_of(name: object, target: Path, temporary: Path | None) -> bool:
    """Whether `name` is the written file, a parent directory, or a file in it."""
    if not isinstance(name, str | bytes | os.PathLike):
        return False
    path = Path(os.fsdecode(name)).absolute()
    return target.is_relative_to(path) or (temporary is not None and path.is_relative_to(temporary))


def _probe(directory: Path) -> OSError | None:
    """The error of a small test write into `directory`, or None."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        return problem
    return None
