"""Write files and directories atomically, without overwriting files of the user.

A writer works on a temporary path with a random name beside its target, locks it, and renames it at
the end. Two writers of one target are independent: the last one to finish wins. Leftovers of killed
writers are not locked any more, and are removed by the next writer of the same target.
"""

from __future__ import annotations

import contextlib
import ctypes
import filecmp
import hashlib
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
from loradeploy.paths import expanded, resolved
from loradeploy.snapshot import FileState

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

# Given an existing directory: the relative paths of the files in it that loradeploy wrote, which
# may be replaced.
OwnFiles = Callable[[Path], Collection[str]]

# Age at which a leftover is removed if the file system has no locks.
_STALE_SECONDS: Final = 24 * 3600
_ATTEMPTS: Final = 100
_TURN_SECONDS: Final = 1.0  # how long a reader waits for the writers of a pair
# Bytes of a name to which a temporary one can still add its own part.
_LONG_NAME: Final = 200


def just_the_marker(directory: Path) -> Collection[str]:
    """No files other than the marker."""
    return ()


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed on success and removed on failure.

    Raises:
        OutputError: the file cannot be written. An existing `path` is unchanged.
    """
    target = Path(path)
    with _new_file(target) as temporary:
        yield temporary
        os.replace(temporary, target)


@contextlib.contextmanager
def atomic_pair(
    first: str | os.PathLike[str], last: str | os.PathLike[str]
) -> Iterator[tuple[Path, Path]]:
    """Yield temporary paths of two files, which replace `first` and `last` together.

    Neither is ever beside a file of another version, with other writers and after a kill too:
    `last` is missing while the contents of `first` change.

    Raises:
        OutputError: one of them cannot be written. Both are unchanged.
    """
    one, two = Path(first), Path(last)
    with _new_file(two) as new_two, _new_file(one) as new_one:
        yield new_one, new_two
        with _turn(two):
            before = FileState.of(one)
            spare = _free_name(two, "partial")  # the next writer removes what a kill leaves
            try:
                same = before is not None and filecmp.cmp(one, new_one, shallow=False)
                if two.is_file() and not same:
                    os.replace(two, spare)
                os.replace(new_one, one)
                os.replace(new_two, two)
            except BaseException:
                if spare.exists() and FileState.of(one) == before:
                    os.replace(spare, two)
                raise
            finally:
                spare.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(
    path: str | os.PathLike[str], *, marker: str, own_files: OwnFiles = just_the_marker
) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that is renamed to `path` on success.

    An existing directory at `path` survives any failure, even a kill. It is replaced only if it is
    empty, or has a file named `marker` and no files other than that and `own_files`.

    Raises:
        UsageError: `path` must not be replaced, see `check_replaceable`.
        OutputError: something in it cannot be written. An existing `path` is unchanged.
    """
    target = Path(path).absolute()
    with explained(target):
        check_replaceable(target, marker=marker, own_files=own_files)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target, Path.mkdir) as temporary, explained(target, temporary):
            yield temporary
            _replace(temporary, target, marker, own_files)


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Create and lock `directory` against other writers; remove it at the end if it is empty.

    Raises:
        UsageError: another process is writing in it. OutputError: it cannot be created.
    """
    while True:
        with explained(directory):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            lock = _lock(resolved(directory))  # a link may lead to a larger disk
        except BlockingIOError:
            raise UsageError(_busy(directory)) from None
        except FileNotFoundError:
            continue  # removed by the previous writer
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
    """Raise UsageError if another process is writing in `directory`, see `only_writer`."""
    try:
        lock = _lock(resolved(directory))
    except BlockingIOError:
        raise UsageError(_busy(directory)) from None
    except OSError:
        return  # no such directory
    if lock is not None:
        os.close(lock)


def _busy(directory: Path) -> str:
    return (
        f"another process is writing in {directory}: wait until it ends, or choose another output"
    )


def check_replaceable(path: Path, *, marker: str, own_files: OwnFiles) -> None:
    """Raise UsageError unless `path` does not exist, or is a directory that may be replaced.

    That is an empty directory, or one with `marker` and no files other than that and `own_files`.
    Links, mount points, the home directory and the root are always refused.
    """
    if path.is_symlink():
        raise UsageError(f"{path} is a link: give the directory that it refers to")
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"{path} is a file: give the name of a directory")
    if resolved(path) == resolved(expanded("~")) or os.path.ismount(path):
        raise UsageError(f"{path} is a home directory or a mount point: choose one inside it")
    if not any(path.iterdir()):
        return
    if not (path / marker).is_file():
        raise UsageError(f"{path} is not empty and has no {marker}: choose another directory")
    others = _others(path, {marker, *own_files(path)})
    if others:
        count = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UsageError(
            f"{path} also has {others[0]}{count}, which would be lost: move it, or choose another"
            " directory"
        )


def check_replaceable_file(path: Path, *, kind: str, own: Callable[[Path], bool]) -> None:
    """Raise UsageError unless `path` does not exist, or is a file that may be replaced.

    That is an empty file, or one for which `own` is true: loradeploy wrote it, as `kind`. Links,
    directories and special files are always refused.
    """
    if path.is_symlink():
        raise UsageError(f"{path} is a link: give the file that it refers to")
    if path.is_dir():
        raise UsageError(f"{path} is a directory: give the name of a file")
    if not path.exists():
        return
    if not path.is_file():
        raise UsageError(f"{path} is not a regular file: give another name")
    if path.stat().st_size > 0 and not own(path):
        raise UsageError(f"{path} exists and is not {kind}: move it, or give another name")


def check_writable(target: Path) -> None:
    """Raise UsageError if `target` cannot be created in its directory. Call it before long work."""
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{target} cannot be written: {parent} is not a writable directory")


def check_keeps_inputs(
    output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]
) -> None:
    """Raise UsageError if the directory `output` is one of `inputs`, or contains one.

    Replacing the output would delete the input. An output inside an input, such as a directory
    onnx/ inside a checkpoint, is allowed.
    """
    if not os.fspath(output):
        raise UsageError("the output is an empty path: give the name of a directory or file")
    replaced = resolved(output)
    for path in inputs:
        if Path(path).exists() and resolved(path).is_relative_to(replaced):
            raise UsageError(
                f"{path} would be replaced by the output {output}: choose another directory"
            )


def _others(directory: Path, kept: Collection[str]) -> list[str]:
    """The entries of `directory` other than the files `kept` and their parent directories."""
    parents = {parent.as_posix() for name in kept for parent in Path(name).parents}
    others: list[str] = []
    for parent, folders, files in os.walk(directory):
        relative = Path(parent).relative_to(directory)
        names = [(relative / name).as_posix() for name in sorted(files)]
        others += [name for name in names if name not in kept]
        for folder in sorted(folders):
            name = (relative / folder).as_posix()
            if name not in parents or (directory / name).is_symlink():
                others.append(f"{name}/")
                folders.remove(folder)
    return others


def _replace(new: Path, target: Path, marker: str, own_files: OwnFiles) -> None:
    """Rename `new` to `target`; an existing `target` is then at `new`."""
    for _ in range(_ATTEMPTS):
        # Checked again, because files may have been added meanwhile.
        check_replaceable(target, marker=marker, own_files=own_files)
        if not target.exists():
            # Fails if another writer was faster: only an empty directory can be renamed over.
            with contextlib.suppress(OSError):
                os.rename(new, target)
                return
            if not target.exists():
                os.rename(new, target)  # for its error
                return
        with contextlib.suppress(FileNotFoundError):
            _exchange(new, target)
            return
    raise UsageError(
        f"{target} is constantly being replaced by other processes: choose another directory"
    )


def _exchange(new: Path, old: Path) -> None:
    """Exchange `new` and `old`; `old` exists at every moment (on Linux)."""
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
    return target.with_name(f".{_beginning(target)}.{secrets.token_hex(8)}.{ending}")


def _beginning(target: Path) -> str:
    """What the names of temporary paths of `target` begin with: its name if that is not too long.

    File systems allow 255 bytes. Long names may have the same beginning, but not the same digest.
    """
    name = os.fsencode(target.name)
    return target.name if len(name) <= _LONG_NAME else hashlib.sha256(name).hexdigest()


def _create_file(path: Path) -> None:
    # With the permissions of any new file, by the umask of the process.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


@contextlib.contextmanager
def _new_file(target: Path) -> Iterator[Path]:
    """Yield a temporary file beside `target`, which is removed if it is still there at the end."""
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target, _create_file) as temporary, explained(target, temporary):
            yield temporary


def wait_for_pair(last: str | os.PathLike[str]) -> None:
    """Wait while `atomic_pair` replaces `last`, which may be missing in the meantime."""
    path = _turn_path(Path(last))
    end = time.monotonic() + _TURN_SECONDS
    while time.monotonic() < end:
        try:
            lock = _lock(path)
        except BlockingIOError:
            time.sleep(0.001)
            continue
        except OSError:
            return  # there is no writer
        if lock is not None:
            os.close(lock)
        return


def _turn_path(target: Path) -> Path:
    return target.with_name(f".{_beginning(target)}.turn.partial")


@contextlib.contextmanager
def _turn(target: Path) -> Iterator[None]:
    """Wait until no other writer of `target` is in this context, if the system has locks."""
    path = _turn_path(target)
    while fcntl is not None:
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(path, handle):  # not removed by the previous writer
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(handle)
    yield


@contextlib.contextmanager
def _temporary(target: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """A path beside `target` created by `create`, locked while the caller uses it.

    What is still there at the end is removed, whenever a signal comes from its creation on.
    """
    _remove_leftovers(target)
    while True:
        path = _free_name(target, "partial")
        lock = None
        try:
            with explained(target, path):
                create(path)
            try:
                lock = _lock(path)
            except (BlockingIOError, FileNotFoundError):
                continue  # removed as a leftover before it was locked
            if lock is None or _is_at(path, lock):
                yield path
                return
        finally:
            _remove(path)
            if lock is not None:
                os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_at(path: Path, handle: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(handle))
    return False


def _lock(path: Path) -> int | None:
    """A handle with the lock of `path`; None if the file system has no locks.

    Raises:
        BlockingIOError: another process has the lock. FileNotFoundError: `path` does not exist.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO must not block
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
    """Remove leftovers of killed writers of `target`, but not of running ones."""
    named = re.compile(rf"\.{re.escape(_beginning(target))}\.[0-9a-z_]+\.partial")
    for leftover in list(target.parent.iterdir()):
        if named.fullmatch(leftover.name) is None:
            continue
        with contextlib.suppress(OSError):
            lock = _lock(leftover)
            try:
                if lock is not None or time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    _remove(leftover)
            finally:
                if lock is not None:
                    os.close(lock)
