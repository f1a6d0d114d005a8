"""Freed memory: keep it for reuse, or return it to the system.

Once a session has opened a graph, the C library keeps freed blocks of up to 32 MiB for reuse
(`keep_freed_memory`). Data that would then stay resident for long gets its own pages (`own_pages`).
Other memory is returned when nothing runs (`return_freed_memory`), or when enough work was done
since the last time (`return_after`), because the next run has to allocate it again.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading
import time
from pathlib import Path
from typing import Final

import numpy as np

_LARGEST_HEAP_BLOCK: Final = (32 << 20) - (8 << 10)  # glibc's limit, without its overhead
# Seconds to return 1 MiB and allocate it again, with 256 page faults: twice what a process with one
# thread takes in a virtual machine.
_SECONDS_PER_MIB: Final = 0.5e-3
_PART: Final = 0.01  # of the time of work, which returning memory may take
_LEAST: Final = 8 << 20  # bytes that are worth returning
_ADVICE: Final = {True: "MADV_HUGEPAGE", False: "MADV_NOHUGEPAGE"}  # only on Linux


def own_pages(size: int, *, huge: bool) -> mmap.mmap | None:
    """`size` zero bytes that are private to the process; None if the system is not Linux.

    A page is allocated when it is first written; with `huge`, if the system can, in pages of 2 MiB.

    Raises:
        MemoryError: there is no room for them.
    """
    advice = getattr(mmap, _ADVICE[huge], None)
    if advice is None or not size:
        return None
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as problem:
        raise MemoryError(f"no room for {size} bytes") from problem
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(advice)
    return memory


def keep_freed_memory() -> None:
    """Make the C library keep memory that onnxruntime frees while it opens a graph, for reuse.

    glibc returns a freed block to the system immediately, until a program has freed a larger one.
    Every weight would then be copied into new pages, which the system has to clear. Therefore the
    largest possible block is freed first.
    """
    if sys.platform == "linux":
        np.empty(_LARGEST_HEAP_BLOCK, np.uint8)


class _Returns:
    """When memory was returned: how much stayed resident, and how long work took since then.

    The C library's memory is that of the process, and so is this state.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._stayed = 0

    def affordable_after(self, seconds: float) -> bool:
        """Add the time of work; return whether there is memory to return, and time for it."""
        with self._lock:
            self._seconds += seconds
            affordable = self._seconds * _PART / _SECONDS_PER_MIB * (1 << 20)
            if affordable < _LEAST:
                return False
            return _LEAST <= resident_memory() - self._stayed <= affordable

    def returned(self) -> None:
        """Record that memory was returned."""
        with self._lock:
            self._seconds, self._stayed = 0.0, resident_memory()


_RETURNS: Final = _Returns()


def return_freed_memory() -> None:
    """Return memory to the system that the C library keeps, because much was freed at once.

    After onnxruntime packed the weights of SmolLM2-135M in fp32 for its kernels, glibc would keep a
    fifth of the memory of the session.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if trim is not None:
            trim(0)
            _RETURNS.returned()


def worked() -> tuple[float, float]:
    """The time and the processor time of this process, in seconds, for `return_after`."""
    return time.monotonic(), time.process_time()


def return_after(began: tuple[float, float]) -> None:
    """Return freed memory, if that costs at most a hundredth of the work since `began`.

    The time of work is the shorter of elapsed time, which a busy machine makes longer, and
    processor time, which several threads make longer. The cost is estimated from how much more
    memory is resident than after the last time. Short work adds up, so that a few short generations
    after a long one return its memory.
    """
    seconds = min(now - then for now, then in zip(worked(), began, strict=True))
    if sys.platform == "linux" and _RETURNS.affordable_after(seconds):
        return_freed_memory()


def resident_memory() -> int:
    """The resident memory of this process in bytes; 0 if it is unknown."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * mmap.PAGESIZE
    except OSError:  # not Linux, or a container hides it
        return 0
