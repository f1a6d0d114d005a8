"""A pool of decoder cache buffers, which keep their addresses from one generation to the next.

All buffers, used or free, take at most twice the memory that was ever in use at one time. Beyond
that, the buffers that were free the longest are dropped, with the recorded runs that read them.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import onnxruntime

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Positions of the smallest buffers; larger sizes double.
_LEAST: Final = 256
# Maximum memory of all buffers, as a multiple of what was in use at one time.
_KEPT: Final = 2


@dataclass(eq=False)
class _Buffers:
    """The buffers of one cache, by name; `nbytes` is their total size."""

    rows: int
    positions: int
    nbytes: int
    values: dict[str, onnxruntime.OrtValue] = field(default_factory=dict)


class CachePool:
    """The cache buffers of one session.

    `most`: the model's number of positions, None if unknown. `forget`: a method that is called with
    the addresses of dropped buffers; its object is not kept alive.
    """

    def __init__(self, most: int | None, forget: Callable[[Collection[int]], None] | None) -> None:
        self._most = most
        self._forget = None if forget is None else weakref.WeakMethod(forget)
        self._free: list[_Buffers] = []  # ordered by return
        # Returned buffers, which the garbage collector may return during `borrow`.
        self._returned: deque[_Buffers] = deque()
        self._used = self._most_used = 0  # bytes
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers, in use or not."""
        with self._lock:
            return self._used + sum(own.nbytes for own in self._free)

    def room(self, needed: int, wanted: int) -> int:
        """The positions to allocate, rounded up to few sizes so that buffers are reused.

        `wanted`: the desired number; `needed`: the minimum.
        """
        room = _LEAST
        while room < wanted:
            room *= 2
        return room if self._most is None else max(needed, min(room, self._most))

    def borrow(self, rows: int, positions: int, nbytes: int) -> BorrowedBuffers:
        """Borrow buffers of this size, in total `nbytes`; new ones if none are free."""
        with self._lock:
            while self._returned:
                back = self._returned.popleft()
                self._used -= back.nbytes
                self._free.append(back)
            fitting = [own for own in self._free if (own.rows, own.positions) == (rows, positions)]
            own = fitting[-1] if fitting else _Buffers(rows, positions, nbytes)
            if fitting:
                self._free.remove(own)
            self._used += own.nbytes
            self._most_used = max(self._most_used, self._used)
            gone = self._evicted()
        forget = None if self._forget is None else self._forget()
        if gone and forget is not None:
            forget({value.data_ptr() for one in gone for value in one.values.values()})
        return BorrowedBuffers(self, own)

    def _evicted(self) -> list[_Buffers]:
        """Remove and return buffers beyond the limit: those that were free the longest."""
        kept = sum(own.nbytes for own in self._free)
        count = 0
        while self._used + kept > _KEPT * self._most_used:
            kept -= self._free[count].nbytes
            count += 1
        gone, self._free = self._free[:count], self._free[count:]
        return gone

    def give_back(self, buffers: _Buffers) -> None:
        """Return buffers to the pool. Acquires no lock."""
        self._returned.append(buffers)


class BorrowedBuffers:
    """Buffers that return to the pool on deletion. Their initial contents are undefined."""

    def __init__(self, pool: CachePool, own: _Buffers) -> None:
        self._pool, self._own = pool, own

    def put(self, name: str, array: NDArray[Any], device: tuple[str, int]) -> onnxruntime.OrtValue:
        """Write `array` into the buffer `name` and return it."""
        values = self._own.values
        if name in values:
            values[name].update_inplace(array)
        else:
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array, *device)
        return values[name]

    def __del__(self) -> None:
        self._pool.give_back(self._own)
