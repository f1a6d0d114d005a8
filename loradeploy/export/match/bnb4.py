"""Dequantize MatMulBnb4, the 4-bit floats of bitsandbytes: FP4 and NF4.

The weight [out, in] is one row of numbers, in blocks that may end in the middle of an output. Each
number is a code, the high bits first, for a value that the largest absolute value of its block
multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.export.graph.edit import constant_of, input_at

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

MATMUL_BNB4: Final = "MatMulBnb4"

_FP4: Final = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
# The values of the codes, by `quant_type`. Source: blockwise_quant_block_bnb4.h of onnxruntime.
_VALUES: Final[dict[int, NDArray[np.float32]]] = {
    0: np.array([*_FP4, *(-value for value in _FP4)], np.float32),
    1: np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
            *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
            *(0.7229568362236023, 1.0),
        ],
        np.float32,
    ),
}


def rows_of_codes(node: ir.Node, picks: list[int]) -> NDArray[np.float32] | None:
    """The weights [picks, in] of a MatMulBnb4; None if they cannot be read."""
    return _decoded(node, picks, lambda values: values)


def steps_of_codes(node: ir.Node, picks: list[int]) -> NDArray[np.float32] | None:
    """The distance [picks, in] of each weight from its farther neighbor; None if unknown."""
    return _decoded(node, picks, _gaps)


def _decoded(
    node: ir.Node, picks: list[int], number_of: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> NDArray[np.float32] | None:
    """The number [picks, in] of each code, in a table made from the values, times its scale."""
    packed, largest = input_at(node, 1), input_at(node, 2)
    values = _VALUES.get(node.attributes["quant_type"].as_int())
    if packed is None or largest is None or values is None:
        return None
    if packed.const_value is None or largest.const_value is None:
        return None
    inputs, size = (node.attributes[name].as_int() for name in ("K", "block_size"))
    numbers = np.array(picks)[:, np.newaxis] * inputs + np.arange(inputs)  # [picks, in]
    pairs = constant_of(packed).reshape(-1)[numbers // 2]
    codes = np.where(numbers % 2, pairs & 15, pairs >> 4)
    scale = constant_of(largest).reshape(-1)[numbers // size].astype(np.float32)
    decoded: NDArray[np.float32] = number_of(values)[codes] * scale
    return decoded


def _gaps(values: NDArray[np.float32]) -> NDArray[np.float32]:
    order = np.argsort(values, kind="stable")
    steps = np.diff(values[order])
    gaps = np.empty_like(values)
    gaps[order] = np.maximum(np.append(steps, 0), np.insert(steps, 0, 0))
    return gaps
