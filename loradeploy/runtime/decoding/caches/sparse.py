"""Zero arrays whose memory is allocated page by page, when it is first written."""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SMALL_PAGES: Final = getattr(mmap, "MADV_NOHUGEPAGE", None)  # only on Linux


def zeros_by_page(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros of `shape`, on Linux in pages of the smallest size.

    numpy requests huge pages there, and a system may use them by default. Then a row with one
    position takes the memory of thousands: a page of 2 MiB for each head, layer and row. The memory
    is private, like numpy's: writes of a forked child are not visible here.
    """
    size = math.prod(shape) * dtype.itemsize
    if _SMALL_PAGES is None or not size:
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(_SMALL_PAGES)
    zeros: NDArray[Any] = np.ndarray(shape, dtype, memory)
    return zeros
