"""Allocate arrays in one block of memory.

A decode step reads every factor once, which is more than fits into the CPU's caches. Hundreds of
small arrays are spread over as many pages of 4 KiB, and reading each page costs a TLB miss. A
block of 4 MiB or more has huge pages of its own (Linux, transparent_hugepage), which the system
gets back when its last array is released. docs/performance.md has measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.runtime.memory import own_pages

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LINE: Final = 64  # bytes; no two arrays share a cache line
# The size of a block from which on it has huge pages; the alignment of a huge page.
_LARGE: Final = 1 << 22
_HUGE_PAGE: Final = 1 << 21


def empty_block(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]) -> dict[str, Any]:
    """Uninitialized arrays of `shapes`, consecutive in memory in this order."""
    size = dtype.itemsize
    begins, end = {}, 0
    for name, shape in shapes.items():
        begins[name] = end
        end += -(-math.prod(shape) * size // _LINE) * _LINE
    alignment = _HUGE_PAGE if end >= _LARGE else _LINE
    pages = own_pages(end + alignment, huge=True) if end >= _LARGE else None
    memory = np.empty(end + alignment, np.uint8) if pages is None else np.frombuffer(pages, "u1")
    first = -memory.ctypes.data % alignment
    return {
        name: np.ndarray(shape, dtype, memory.data, first + begins[name])
        for name, shape in shapes.items()
    }


def in_one_block(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Copy the arrays, all of one dtype, into one block."""
    if not arrays:
        return {}
    dtype = next(iter(arrays.values())).dtype
    block = empty_block({name: values.shape for name, values in arrays.items()}, dtype)
    for name, values in arrays.items():
        block[name][...] = values
    return block
