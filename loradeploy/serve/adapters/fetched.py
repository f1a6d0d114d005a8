"""Adapters that were fetched from elsewhere, in a directory of limited size.

Other processes may use the same directory. An entry comes and goes by renaming, so that it is there
whole or not at all.
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
# Seconds after which what is fetched, and did not grow, is of a process that has ended.
_ABANDONED: Final = 3600.0


class FetchedAdapters:
    """The entries in `directory`, which have at most `max_bytes`.

    What was used the longest ago makes room for others, unless it is being read.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._readers: Counter[str] = Counter()
        self._coming: dict[Path, int] = {}  # bytes of what this process fetches
        self._sweep()

    def has(self, name: str) -> bool:
        """Whether there is the entry `name`, which is used now."""
        with self._lock:
            return self._use(name)

    @contextmanager
    def reading(self, name: str, size: int, fetch: Callable[[Path], None]) -> Iterator[Path]:
        """The entry `name`, which stays while it is read.

        `fetch` writes its `size` bytes into a directory, where it is not there.

        Raises:
            AdapterError: what `fetch` raises.
            AdapterStoreError: there is no room beside what is read and fetched now.
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
        """Note that an entry is used now, more finely than the system's clock of files."""
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
        """Remove what was used the longest ago, until `partial` may have `size` bytes."""
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
        """Remove what processes that have ended left."""
        for partial in self.directory.glob(f"{_PARTIAL}*"):
            with self._lock:
                ours = partial in self._coming
            if not ours and time.time() - _last_written(partial) > _ABANDONED:
                shutil.rmtree(partial, ignore_errors=True)


def _remove(entry: Path) -> None:
    """Remove an entry; a process that ends meanwhile leaves none that is cut."""
    gone = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=entry.parent))
    with suppress(OSError):  # another process was faster
        entry.rename(gone / entry.name)
    shutil.rmtree(gone, ignore_errors=True)


def _files(place: Path) -> list[os.stat_result]:
    """The states of the files below a place, as far as they are there."""
    found = []
    for file in place.rglob("*"):
        try:
            found.append(file.stat())
        except OSError:
            continue  # another process removes them
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
