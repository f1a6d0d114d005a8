"""Cache of adapters from an object store, in a directory of limited size.

Other processes may use the same directory. Entries are added and removed by renaming, so that an
entry is always complete.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from loradeploy.errors import AdapterStoreError

_PARTIAL: Final = ".partial-"
# Seconds without progress after which a partial entry belongs to a process that has ended.
_ABANDONED: Final = 3600.0


class FetchedAdapters:
    """The entries in `directory`, of at most `max_bytes` in total.

    The least recently used entries are removed, unless they are being read.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._readers: Counter[str] = Counter()
        self._coming: dict[Path, int] = {}  # bytes of the entries that this process fetches
        self._sweep()

    def has(self, name: str) -> bool:
        """Whether the entry `name` exists; marks it as used."""
        with self._lock:
            return self._use(name)

    @contextmanager
    def reading(self, name: str, size: int, fetch: Callable[[Path], None]) -> Iterator[Path]:
        """Yield the path of the entry `name`, which is not removed during the context.

        `fetch`: writes the entry's `size` bytes into a directory; called if it does not exist.

        Raises:
            AdapterError: raised by `fetch`.
            AdapterStoreError: there is not enough room beside entries in use.
        """
        with self._lock:
            self._readers[name] += 1
            there = self._use(name)
        try:
            if not there:
                self._fetch(name, size, fetch)
            yield self.directory / name
        finally:
            with self._lock:
                self._readers[name] -= 1
                if not self._readers[name]:
                    del self._readers[name]

    def _use(self, name: str) -> bool:
        """Mark an entry as used, with a finer clock than the file system's; False if missing."""
        now = time.time_ns()
        try:
            os.utime(self.directory / name, ns=(now, now))
        except OSError:
            return False
        return True

    def _fetch(self, name: str, size: int, fetch: Callable[[Path], None]) -> None:
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.directory))
        try:
            self._make_room(partial, size)
            fetch(partial)
            try:
                partial.rename(self.directory / name)
            except OSError:
                if not self.has(name):  # another thread or process was faster
                    raise
            self.has(name)
        finally:
            with self._lock:
                self._coming.pop(partial, None)
            shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self, partial: Path, size: int) -> None:
        """Remove the least recently used entries until `partial` has room for `size` bytes."""
        self._sweep()
        with self._lock:
            sizes = {
                one: max(_size_of(one), self._coming.get(one, 0))
                for one in self.directory.iterdir()
            }
            idle = [
                one
                for one in sizes
                if not one.name.startswith(".") and one.name not in self._readers
            ]
            excess = sum(sizes.values()) + size - self._max_bytes
            if excess > sum(sizes[one] for one in idle):
                raise AdapterStoreError(
                    f"the cache of adapters takes {self._max_bytes:,} bytes (`max_cache_bytes`): no"
                    f" room for {size:,} beside adapters that are being read, try again"
                )
            for old in sorted(idle, key=_last_used):
                if excess <= 0:
                    break
                _remove(old)
                excess -= sizes[old]
            self._coming[partial] = size

    def _sweep(self) -> None:
        """Remove partial entries of processes that have ended."""
        for partial in self.directory.glob(f"{_PARTIAL}*"):
            with self._lock:
                ours = partial in self._coming
            if not ours and time.time() - _last_written(partial) > _ABANDONED:
                shutil.rmtree(partial, ignore_errors=True)


def _remove(entry: Path) -> None:
    """Remove an entry atomically, even if the process ends meanwhile."""
    gone = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=entry.parent))
    with suppress(OSError):  # another process was faster
        entry.rename(gone / entry.name)
    shutil.rmtree(gone, ignore_errors=True)


def _files(place: Path) -> list[os.stat_result]:
    """The states of the existing files in a directory."""
    found = []
    for file in place.rglob("*"):
        try:
            found.append(file.stat())
        except OSError:
            continue  # removed by another process
    return [state for state in found if stat.S_ISREG(state.st_mode)]


def _size_of(place: Path) -> int:
    return sum(state.st_size for state in _files(place))


def _last_written(place: Path) -> float:
    return max([_last_used(place) / 1e9, *(state.st_mtime for state in _files(place))])


def _last_used(place: Path) -> int:
    try:
        return place.stat().st_mtime_ns
    except OSError:
        return 0
