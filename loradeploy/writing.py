"""Files and directories that are written whole or not at all, and never over somebody else's.

A writer works under a random name beside its target, which it holds a lock on for as long as it
lives, and renames that at the end. So two writers of one target never share anything: the last
whole one wins. What a killed writer left is known by its lock, which nobody holds any more, and is
removed by the next writer of the same target.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

from loradeploy.disk import explained
from loradeploy.errors import UsageError

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

# Given the directory that stands in the way: the files in it, relative and with "/", that a writer
# of its kind wrote and may therefore replace.
OwnFiles = Callable[[Path], Collection[str]]

# How old a leftover is before it is removed where the file system knows no locks.
_STALE_SECONDS: Final = 24 * 3600
_ATTEMPTS: Final = 100


def just_the_marker(directory: Path) -> Collection[str]:
    """No file but the one that the directory is known by."""
    return ()


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed on success and removed on failure.

    Raises:
        OutputError: the file cannot be written. What stood at `path` is still there.
    """
    target = Path(path)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target, _create_file) as temporary:
            try:
                with explained(target, temporary):
                    yield temporary
                    os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(
    path: str | os.PathLike[str], *, marker: str, own_files: OwnFiles = just_the_marker
) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that takes its place on success.

    A directory that stands at `path` survives any failure, a kill included. It is replaced only
    where it is empty, or holds a file named `marker` and nothing but that and `own_files`.

    Raises:
        UsageError: `path` is something that is not replaced, see `check_replaceable`.
        OutputError: something in it cannot be written. What stood at `path` is still there.
    """
    target = Path(path).absolute()
    with explained(target):
        check_replaceable(target, marker=marker, own_files=own_files)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target, Path.mkdir) as temporary:
            try:
                with explained(target, temporary):
                    yield temporary
                    _put_in_place(temporary, target, marker, own_files)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Make `directory` and be the only process that writes in it; removed where it stays empty.

    Raises:
        UsageError: another process is writing in it. OutputError: it cannot be made.
    """
    while True:
        with explained(directory):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            lock = _lock(directory.resolve())  # a link may lead to a larger disk
        except BlockingIOError:
            raise UsageError(_busy(directory)) from None
        except FileNotFoundError:
            continue  # removed by the one before
        try:
            if lock is None or _is_at(directory, lock):
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):
                        directory.rmdir()
                return
        finally:
            if lock is not None:
                os.close(lock)


def check_no_writer(directory: Path) -> None:
    """Raise UsageError where another process is writing in `directory`, see `only_writer`."""
    try:
        lock = _lock(directory.resolve())
    except BlockingIOError:
        raise UsageError(_busy(directory)) from None
    except OSError:
        return  # there is none
    if lock is not None:
        os.close(lock)


def _busy(directory: Path) -> str:
    return f"another process is writing in {directory}: wait for its end, or choose another output"


def check_replaceable(path: Path, *, marker: str, own_files: OwnFiles = just_the_marker) -> None:
    """Raise UsageError unless `path` is free, or a directory of which nothing is lost.

    That is an empty one, or one that holds `marker` and no file but that and `own_files`. A link, a
    mount point, a home directory and a root are refused whatever is in them.
    """
    if path.is_symlink():
        raise UsageError(f"{path} is a link: give the directory that is to be written itself")
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"{path} is a file: give the name of a directory")
    if path.resolve() == Path.home().resolve() or os.path.ismount(path):
        raise UsageError(f"{path} is a home directory or a mount point: choose one inside it")
    if not any(path.iterdir()):
        return
    if not (path / marker).is_file():
        raise UsageError(
            f"{path} is not empty and holds no {marker}: it is left alone, choose another directory"
        )
    others = _others(path, {marker, *own_files(path)})
    if others:
        count = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UsageError(
            f"{path} also holds {others[0]}{count}, which would be lost: move it, or choose another"
            " directory"
        )


def check_keeps_inputs(
    output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]
) -> None:
    """Raise UsageError where the directory `output` is one of `inputs`, or holds one.

    It would be replaced as a whole, and what it was made from be gone. An output inside an input,
    such as a directory onnx/ inside a checkpoint, takes nothing away.
    """
    place = Path(output).resolve()
    for given in inputs:
        if Path(given).exists() and Path(given).resolve().is_relative_to(place):
            raise UsageError(
                f"{given} would be replaced by the output {output}: choose another directory"
            )


def _others(directory: Path, own: Collection[str]) -> list[str]:
    """What is in `directory` besides the files `own` and the directories that hold them."""
    parents = {parent.as_posix() for name in own for parent in Path(name).parents}
    others: list[str] = []
    for place, folders, files in os.walk(directory):
        relative = Path(place).relative_to(directory)
        names = [(relative / name).as_posix() for name in sorted(files)]
        others += [name for name in names if name not in own]
        for folder in sorted(folders):
            name = (relative / folder).as_posix()
            if name not in parents or (directory / name).is_symlink():
                others.append(f"{name}/")
                folders.remove(folder)
    return others


def _put_in_place(new: Path, target: Path, marker: str, own_files: OwnFiles) -> None:
    """Let `new` take the place of `target`; `new` is what stood there then, if anything did."""
    for _ in range(_ATTEMPTS):
        # Again: files may have come since the writing began.
        check_replaceable(target, marker=marker, own_files=own_files)
        if not target.exists():
            # Another writer may be first: a directory is not renamed onto one that is not empty.
            with contextlib.suppress(OSError):
                os.rename(new, target)
                return
            if not target.exists():
                os.rename(new, target)  # for its error
                return
        with contextlib.suppress(FileNotFoundError):
            _exchange(new, target)
            return
    raise UsageError(f"{target} is being replaced all the time by others: choose another directory")


def _exchange(new: Path, old: Path) -> None:
    """Let `new` and `old` trade places: at no moment is there no directory at `old`."""
    if sys.platform == "linux":
        at_fdcwd, rename_exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        renameat2 = getattr(libc, "renameat2", None)
        if renameat2 is not None:
            source, target = os.fsencode(new), os.fsencode(old)
            if renameat2(at_fdcwd, source, at_fdcwd, target, rename_exchange) == 0:
                return
    # Elsewhere two renames: a kill between them leaves the old directory under the spare name.
    spare = _free_name(old, "old")
    os.rename(old, spare)
    os.rename(new, old)
    os.rename(spare, new)


def _free_name(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.{ending}")


def _create_file(path: Path) -> None:
    # As any new file is made: with the rights that the process's umask leaves.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


@contextlib.contextmanager
def _temporary(target: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """A path beside `target` that `create` made, locked while the caller uses it."""
    _remove_leftovers(target)
    while True:
        path = _free_name(target, "partial")
        create(path)
        try:
            lock = _lock(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # taken for a leftover in the moment before the lock
        try:
            if lock is None or _is_at(path, lock):
                yield path
                return
        finally:
            if lock is not None:
                os.close(lock)


def _is_at(path: Path, handle: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(handle))
    return False


def _lock(path: Path) -> int | None:
    """A handle that holds the lock of `path`; None where the file system has no locks.

    Raises:
        BlockingIOError: somebody else holds it. FileNotFoundError: there is no such path.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers of `target` left behind; those still alive keep theirs."""
    named = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-z_]+\.partial")
    for leftover in list(target.parent.iterdir()):
        if named.fullmatch(leftover.name) is None:
            continue
        with contextlib.suppress(OSError):
            lock = _lock(leftover)
            try:
                if lock is not None or time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    if leftover.is_dir():
                        shutil.rmtree(leftover, ignore_errors=True)
                    else:
                        leftover.unlink()
            finally:
                if lock is not None:
                    os.close(lock)
