"""Arrays of zeros whose memory is taken page by page, when it is first written."""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SMALL_PAGES: Final = getattr(mmap, "MADV_NOHUGEPAGE", None)  # Linux alone


def zeros_by_page(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros of `shape`, on Linux in pages of the system's least size.

    numpy asks for huge pages there, and a system may give them unasked. With these a row that has
    one position takes the memory of thousands: a page of 2 MiB for each head, layer and row. The
    memory is the process's own, as numpy's is: a forked child's writes are not seen here.
    """
    size = math.prod(shape) * dtype.itemsize
    if _SMALL_PAGES is None or not size:
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that has no huge pages
        memory.madvise(_SMALL_PAGES)
    zeros: NDArray[Any] = np.ndarray(shape, dtype, memory)
    return zeros
