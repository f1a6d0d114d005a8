"""Move memory of this process into huge pages, which the processor reads faster.

A decode step reads all weights once. In pages of 4 KiB, the misses of the TLB and the hardware's
prefetching, which ends with a page, limit how fast one core reads: on the machine of
docs/performance.md 13.5 GB/s, in pages of 2 MiB 16.5 GB/s. The C library allocates in small pages,
and the system's own thread would take minutes to join them. Linux 6.1 or later does it on request,
without a change of addresses or contents.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

_SYSTEM: Final = Path("/sys/kernel/mm/transparent_hugepage")
_COLLAPSE: Final = 25  # MADV_COLLAPSE, which Python does not have
_TOGETHER: Final = 16  # huge pages of one request
_FULL: Final = 0.95  # the least part of a huge page that must be in memory: the rest is allocated
_SECONDS: Final = 1.0  # after which no more is requested: the system may have to make room
# Addresses whose pages are looked up together. A process may have reserved terabytes.
_WINDOW: Final = 1 << 30


def use_huge_pages() -> int:
    """Move full blocks of private memory into huge pages, for at most about a second.

    Returns the number of bytes that were requested to be moved: 0 if the system cannot, or if its
    administrator has disabled huge pages.
    """
    size = _huge_page()
    call = getattr(ctypes.CDLL(None), "madvise", None) if size else None
    if call is None:
        return 0
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved, end = 0, time.monotonic() + _SECONDS
    with contextlib.suppress(OSError):  # a container may hide /proc
        for begin, length in full_blocks(size, end):
            if time.monotonic() > end:
                break
            # An error concerns single pages: they stay as they are.
            call(begin, length, _COLLAPSE)
            moved += length
    return moved


def _huge_page() -> int:
    """The size of a huge page; 0 if the system has none, or uses none."""
    if sys.platform != "linux":
        return 0
    try:
        if "[never]" in (_SYSTEM / "enabled").read_text(encoding="ascii"):
            return 0
        return int((_SYSTEM / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def full_blocks(size: int, end: float) -> Iterator[tuple[int, int]]:
    """Begin and length of private memory: huge pages of `size` that nearly have all their pages.

    Nothing is looked up after the time `end`, by `time.monotonic`.
    """
    with (
        open("/proc/self/maps", encoding="utf-8", errors="replace") as maps,
        open("/proc/self/pagemap", "rb", buffering=0) as pages,
    ):
        for line in maps.read().splitlines():
            place, access, _, _, _, *name = line.split()
            if access != "rw-p" or name not in ([], ["[heap]"]):
                continue
            first, last = (int(address, 16) for address in place.split("-"))
            first, last = -(-first // size) * size, last // size * size
            for begin in range(first, last, _WINDOW):
                if time.monotonic() > end:
                    return
                full = _is_full(pages.fileno(), begin, min(begin + _WINDOW, last), size)
                yield from _runs(begin, full, size)


def _is_full(pages: int, first: int, last: int, size: int) -> list[bool]:
    """For each huge page, whether enough of its pages are in memory."""
    each = size // mmap.PAGESIZE
    entries = os.pread(pages, (last - first) // mmap.PAGESIZE * 8, first // mmap.PAGESIZE * 8)
    present = np.frombuffer(entries, np.uint64) >> np.uint64(63)
    whole = present[: len(present) // each * each].reshape(-1, each)
    return [bool(full) for full in whole.sum(axis=1) >= _FULL * each]


def _runs(first: int, full: list[bool], size: int) -> Iterator[tuple[int, int]]:
    """Begin and length of adjacent full pages, `_TOGETHER` at most."""
    begin = 0
    for at in range(len(full) + 1):
        ends = at == len(full) or not full[at] or at - begin == _TOGETHER
        if ends and at > begin:
            yield first + begin * size, (at - begin) * size
        if ends:
            begin = at if at < len(full) and full[at] else at + 1
