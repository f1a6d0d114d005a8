"""Arrays in one block of memory.

A decode step reads every factor once, more bytes than caches hold. Hundreds of small arrays lie on
as many pages of 4 KiB all over memory, and each is waited for anew; one block is read in order, and
of 4 MiB or more numpy asks the system for huge pages (Linux, transparent_hugepage).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LINE: Final = 64  # bytes; no two arrays share a cache line
_HUGE_PAGE: Final = 1 << 21


def empty_block(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]) -> dict[str, Any]:
    """Arrays of `shapes`, in their order one behind the other, not filled."""
    size = dtype.itemsize
    begins, end = {}, 0
    for name, shape in shapes.items():
        begins[name] = end
        end += -(-int(np.prod(shape, dtype=np.int64)) * size // _LINE) * _LINE
    memory = np.empty(end + _HUGE_PAGE, np.uint8)
    first = -memory.ctypes.data % _HUGE_PAGE
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
