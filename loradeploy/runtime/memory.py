"""What happens to memory when it is freed: whether it is kept for reuse or returned to the system.

Once a session has opened a graph, the C library keeps freed blocks of up to 32 MiB for reuse
(`keep_freed_memory`). For what would then stay resident for long, there are pages of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from typing import Final

import numpy as np

_LARGEST_HEAP_BLOCK: Final = (32 << 20) - (8 << 10)  # glibc's limit, without its overhead
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


def return_freed_memory() -> None:
    """Return memory to the system that the C library keeps, because much was freed at once.

    After onnxruntime packed the weights of SmolLM2-135M in fp32 for its kernels, glibc would keep a
    fifth of the memory of the session.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if trim is not None:
            trim(0)
