"""Zero arrays whose memory is allocated page by page, when it is first written."""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.runtime.memory import own_pages

if TYPE_CHECKING:
    from numpy.typing import NDArray


def zeros_by_page(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros of `shape`, on Linux in pages of the smallest size.

    numpy requests huge pages there, and a system may use them by default. Then a row with one
    position takes the memory of thousands: a page of 2 MiB for each head, layer and row. The memory
    is private, like numpy's: writes of a forked child are not visible here.
    """
    memory = own_pages(math.prod(shape) * dtype.itemsize, huge=False)
    if memory is None:
        return np.zeros(shape, dtype)
    zeros: NDArray[Any] = np.ndarray(shape, dtype, memory)
    return zeros


def return_pages(zeros: NDArray[Any]) -> None:
    """Return the memory of an array of `zeros_by_page`, whose contents are not needed any more.

    On Linux, it is zeros again, at the same address, unless the process locked its memory.
    """
    memory = zeros.base
    if isinstance(memory, mmap.mmap):
        with contextlib.suppress(OSError):  # locked pages (mlock, mlockall) stay
            memory.madvise(mmap.MADV_DONTNEED)
