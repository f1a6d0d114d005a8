"""Arrays in one block of memory.

A decode step reads every factor once, more bytes than caches hold. Hundreds of small arrays lie on
as many pages of 4 KiB all over memory, and each page is waited for again; for one block of 4 MiB or
more numpy asks the system for huge pages (Linux, transparent_hugepage). docs/performance.md tells
what that is worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LINE: Final = 64  # bytes; no two arrays share a cache line
# From which size on numpy asks for huge pages, and how these are aligned.
_LARGE: Final = 1 << 22
_HUGE_PAGE: Final = 1 << 21


def empty_block(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]) -> dict[str, Any]:
    """Arrays of `shapes`, in their order one behind the other, not filled."""
    size = dtype.itemsize
    begins, end = {}, 0
    for name, shape in shapes.items():
        begins[name] = end
        end += -(-math.prod(shape) * size // _LINE) * _LINE
    alignment = _HUGE_PAGE if end >= _LARGE else _LINE
    memory = np.empty(end + alignment, np.uint8)
    first = -memory.ctypes.data % alignment
    return {
        name: np.ndarray(shape, dtype, memory.data, first + begins[name])
        for name, shape in shapes.items()
    }


def in_one_block(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The same numbers, of one dtype, in one block."""
    if not arrays:
        return {}
    dtype = next(iter(arrays.values())).dtype
    block = empty_block({name: values.shape for name, values in arrays.items()}, dtype)
    for name, values in arrays.items():
        block[name][...] = values
    return block
