"""Sessions on a weights file that onnxruntime maps, which return no result if the file is written.

onnxruntime computes with the pages of a mapped file, so a process that writes the file changes the
numbers of an open session. One of two things prevents that:

lease   On Linux, the owner of a file gets a lease for reading (fcntl(2)) if no process has it open
        for writing, or mapped for that. A process that opens it for writing or truncates it later
        waits until the session is closed, at most 45 seconds (/proc/sys/fs/lease-break-time), and
        the session knows about it at its next run. So no byte can change, or disappear, unnoticed.
times   Otherwise size and times are compared at each run. A file that was written in the last
        seconds could be written again within one tick of its clock, so it is waited for.
        This does not detect a process that had the file mapped for writing when it was opened:
        the system notes the time of its first write to a page only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import weakref
from pathlib import Path
from typing import Any, Final

import onnxruntime

from loradeploy.errors import BundleError
from loradeploy.files import open_file
from loradeploy.snapshot import ATTEMPTS, FileState

# Types of Linux's local file systems (statfs(2)) on which a lease holds for every writer. Others
# are written to by other machines, or through another directory (overlayfs).
_LOCAL: Final = {
    0xEF53: "ext4",  # also ext2 and ext3
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x01021994: "tmpfs",
}
_STATFS_SIZE: Final = 256  # at least that of struct statfs
_SETTLED: Final = 2_000_000_000  # ns; the coarsest clock of a file system (FAT)
_ADVICE: Final = "open the session again; replace files by renaming (docs/bundles.md)"


class MappedFile:
    """The open file `descriptor`, which was at `path`. `state`: None if it has a lease."""

    def __init__(self, path: Path, descriptor: int, state: FileState | None) -> None:
        self._path, self._descriptor, self._state = path, descriptor, state
        weakref.finalize(self, _close, descriptor, os.getpid())

    @property
    def leased(self) -> bool:
        """Whether the system granted a lease."""
        return self._state is None

    def check(self) -> None:
        """Raise BundleError if the file was written to since it was opened, or is about to be."""
        if self._state is None:
            if not _has_lease(self._descriptor):
                raise BundleError(
                    f"{self._path} was opened for writing, and this session maps it: {_ADVICE}"
                )
        elif differences := _differences(self._state, FileState.of(self._descriptor)):
            raise BundleError(
                f"{self._path} has changed ({', '.join(differences)}), and this session maps it:"
                f" {_ADVICE}"
            )


def mapped_file(path: Path, *, unleased: bool) -> MappedFile | None:
    """Open the file at `path` with a lease; `unleased`: or without one if the system grants none.

    None if there is no lease.

    Raises:
        BundleError: it cannot be opened; or it has no lease and is being written to.
    """
    with open_file(path, error=BundleError) as file:
        descriptor = file.fileno()
        leased = _lease(descriptor)
        if not leased and not unleased:
            return None
        state = None if leased else _settled(descriptor, path)
        return MappedFile(path, os.dup(descriptor), state)


def _settled(descriptor: int, path: Path) -> FileState:
    """The state of an open file, once it is old enough for a later write to change its times."""
    for _ in range(ATTEMPTS):
        state = FileState.of(descriptor)
        if state is None:
            break
        age = time.time_ns() - max(state.written, state.touched)
        if not 0 <= age < _SETTLED:
            return state
        time.sleep((_SETTLED - age) / 1e9)
    raise BundleError(f"{path} is being written to: try again when it is complete")


class MappedSession(onnxruntime.InferenceSession):  # type: ignore[misc]
    """A session whose weights are mapped from `file`: it returns no results if that changed.

    A run of a file that changed before is refused: its pages may no longer exist.
    """

    def __init__(self, file: MappedFile, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._file = file

    def run(self, *arguments: Any, **options: Any) -> Any:
        """As onnxruntime's.

        Raises:
            BundleError: the file has changed.
        """
        self._file.check()
        results = super().run(*arguments, **options)
        self._file.check()
        return results

    def run_with_iobinding(self, *arguments: Any, **options: Any) -> None:
        """As onnxruntime's; see `run`."""
        self._file.check()
        super().run_with_iobinding(*arguments, **options)
        self._file.check()


def _lease(descriptor: int) -> bool:
    """Take a lease on an open file; False if the system grants none."""
    if sys.platform != "linux" or not _is_local(descriptor):
        return False
    import fcntl

    try:
        # A writer causes a signal: by default SIGIO, which ends the process. SIGURG is ignored.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:  # the file is open for writing, or is another user's
        return False
    return True


def _close(descriptor: int, process: int) -> None:
    """Close a file that `process` opened, and end its lease.

    A forked process has the same lease: it would keep a writer waiting after this one closed the
    file, and must not end the lease itself.
    """
    if sys.platform == "linux" and os.getpid() == process:
        import fcntl

        with contextlib.suppress(OSError):  # there is none
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    os.close(descriptor)


def _has_lease(descriptor: int) -> bool:
    """Whether the lease is there, and no process waits for its end."""
    if sys.platform != "linux":
        return False
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK


def _is_local(descriptor: int) -> bool:
    """Whether the file system of an open file is one of `_LOCAL`."""
    found = ctypes.create_string_buffer(_STATFS_SIZE)
    fstatfs = getattr(ctypes.CDLL(None), "fstatfs", None)
    if fstatfs is None or fstatfs(descriptor, found) != 0:
        return False
    kind = ctypes.c_long.from_buffer(found).value  # the first field
    return kind & 0xFFFFFFFF in _LOCAL


def _differences(before: FileState, now: FileState | None) -> list[str]:
    """The fields in which two states of a file differ, in words."""
    if now is None:
        return ["it is gone"]
    differs = {
        "size": before.size != now.size,
        "modification time": before.written != now.written,
        "change time": before.touched != now.touched,
    }
    return [name for name, changed in differs.items() if changed]
