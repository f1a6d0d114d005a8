"""Memory in pages of its own, which the system gets back as soon as nothing refers to it.

The C library keeps freed blocks of up to 32 MiB for later use, once a session has opened a graph
(reading/weights.py): an adapter that was evicted would still be resident.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Final

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
