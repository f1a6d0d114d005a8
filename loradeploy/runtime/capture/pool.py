"""Buffers of decoders' caches that keep their addresses from one generation to the next."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import onnxruntime

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Positions of the smallest buffers; larger ones have twice as many as those before.
_LEAST: Final = 256

_Size = tuple[int, int]  # rows and positions


class CachePool:
    """The buffers of one session; `most`: positions of the model, None where unknown."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._free: dict[_Size, list[dict[str, onnxruntime.OrtValue]]] = {}
        # What came back: the garbage collector may give back in the midst of `borrow`.
        self._returned: deque[tuple[_Size, dict[str, onnxruntime.OrtValue]]] = deque()
        self._lock = threading.Lock()

    def room(self, needed: int, wanted: int) -> int:
        """The positions of a buffer, of few sizes, so that they come again.

        `wanted`: how many there may be; of them `needed` at least.
        """
        room = _LEAST
        while room < wanted:
            room *= 2
        return room if self._most is None else max(needed, min(room, self._most))

    def borrow(self, rows: int, positions: int) -> BorrowedBuffers:
        """Buffers of this size; of a size that none is free of, new ones."""
        with self._lock:
            while self._returned:
                size, values = self._returned.popleft()
                self._free.setdefault(size, []).append(values)
            free = self._free.get((rows, positions))
            return BorrowedBuffers(self, (rows, positions), free.pop() if free else {})

    def give_back(self, size: _Size, values: dict[str, onnxruntime.OrtValue]) -> None:
        """Let buffers serve another cache. Takes no lock."""
        self._returned.append((size, values))


class BorrowedBuffers:
    """Buffers that go back once nobody has them any more. What they hold at first is of others."""

    def __init__(
        self, pool: CachePool, size: _Size, values: dict[str, onnxruntime.OrtValue]
    ) -> None:
        self._pool, self._size, self._values = pool, size, values

    def put(self, name: str, array: NDArray[Any], device: tuple[str, int]) -> onnxruntime.OrtValue:
        """The buffer `name`, which holds `array` from now on."""
        if name in self._values:
            self._values[name].update_inplace(array)
        else:
            self._values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array, *device)
        return self._values[name]

    def __del__(self) -> None:
        self._pool.give_back(self._size, self._values)
