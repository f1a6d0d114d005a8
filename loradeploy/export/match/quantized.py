"""Dequantize weights: integers with scales, and blocks of MatMulNBits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import constant_of, input_at, name_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from loradeploy.export.match.products import Product

MATMUL_NBITS: Final = "MatMulNBits"
INTEGER: Final = "MatMulInteger"
# onnxruntime's integer products with float results: the inputs of the weight's scale, its zero
# point, and the bias.
TO_FLOAT: Final = {"DynamicQuantizeMatMul": (2, 3, 4), "MatMulIntegerToFloat": (3, 5, 6)}
# The bits of a packed product that does not state them.
_DEFAULT_BITS: Final = 4
# onnxruntime (1.31) supports g_idx only with this number of bits.
_GROUPED_BITS: Final = 4


def dequantized_rows(
    product: Product, integers: NDArray[np.generic], picks: list[int]
) -> NDArray[np.float32] | None:
    """The weights [picks, in] of integers; None if their scales cannot be read."""
    node, scale, zero, along, block = product.node, None, None, 1, 0
    if product.scaled is not None:
        node = product.scaled
        scale, zero = _given(node, 1), _given(node, 2)
        axis, size = (node.attributes.get(name) for name in ("axis", "block_size"))
        along = 1 if axis is None else axis.as_int() % 2
        block = 0 if size is None else size.as_int()
    elif node.op_type in TO_FLOAT:
        at, zero_at, _ = TO_FLOAT[node.op_type]
        scale, zero = _given(node, at), _given(node, zero_at)
    else:
        scale, zero = np.ones((), np.float32), _given(node, 3)
    if scale is None or zero is None:
        return None
    numbers = integers.T if product.transposed_first else integers
    outputs = 0 if product.transposed != product.transposed_first else 1
    scales = _spread(scale, numbers.shape, along, block)
    zeros = _spread(zero, numbers.shape, along, block)
    if scales is None or zeros is None:
        return None
    chosen = (each.take(picks, outputs).astype(np.float32) for each in (numbers, zeros, scales))
    rows, offset, factor = chosen
    rows = (rows - offset) * factor
    return rows if outputs == 0 else np.ascontiguousarray(rows.T)


def _given(node: ir.Node, index: int) -> NDArray[np.generic] | None:
    """The constant at a node's input, 0 if the input is missing; None if it is not a constant."""
    value = input_at(node, index)
    if value is None:
        return np.zeros((), np.float32)
    return None if value.const_value is None else constant_of(value)


def _spread(
    values: NDArray[np.generic], shape: tuple[int, ...], along: int, block: int
) -> NDArray[np.generic] | None:
    """Scales or zero points for each value of a matrix of `shape`; None if they do not fit.

    There is one for all, or one for each index, or each block, of the axis `along`.
    """
    if values.size == 1:
        return np.broadcast_to(values.reshape(()), shape)
    if block and values.ndim == 2:
        values = np.repeat(values, block, axis=along)
        values = values[: shape[0], : shape[1]]
        return values if values.shape == shape else None
    if block or values.shape != (shape[along],):
        return None
    return np.broadcast_to(values[:, np.newaxis] if along == 0 else values, shape)


def packed_bits(node: ir.Node) -> int:
    """The number of bits of the weights of a packed product."""
    stated = node.attributes.get("bits")
    return _DEFAULT_BITS if stated is None else stated.as_int()


def unpacked_rows(node: ir.Node, picks: list[int]) -> NDArray[np.float32] | None:
    """The weights [picks, in] of a MatMulNBits; None if they cannot be read."""
    packed, scales = _constant(node, 1), _constant(node, 2)
    zeros, groups = _constant(node, 3), _constant(node, 4)
    given = [input_at(node, index) is not None for index in (3, 4)]
    if packed is None or scales is None or given != [zeros is not None, groups is not None]:
        return None
    sizes = {name: node.attributes[name].as_int() for name in ("K", "N", "block_size")}
    attributes = {**sizes, "bits": packed_bits(node)}
    if groups is not None:
        _check_groups(node, attributes, groups)
    return unpacked(attributes, packed, scales, zeros, picks, groups)


def steps_of_blocks(node: ir.Node, picks: list[int]) -> NDArray[np.float32] | None:
    """The quantization steps of a MatMulNBits, [picks, in]; None if they cannot be read."""
    scales, groups = _constant(node, 2), _constant(node, 4)
    if scales is None or (groups is None) != (input_at(node, 4) is None):
        return None
    inputs, out, size = (node.attributes[name].as_int() for name in ("K", "N", "block_size"))
    scale = scales.reshape(out, -(-inputs // size))[picks].astype(np.float32)
    return scale[:, _blocks_of_inputs(inputs, size, groups)]


def _blocks_of_inputs(
    inputs: int, size: int, groups: NDArray[np.generic] | None
) -> NDArray[np.int64]:
    """The block [in] of each input of a packed weight, which has its scale and zero point."""
    return (
        np.arange(inputs) // size
        if groups is None
        else groups.reshape(-1)[:inputs].astype(np.int64)
    )


def _check_groups(
    node: ir.Node, attributes: Mapping[str, int], groups: NDArray[np.generic]
) -> None:
    """Raise ExportError unless g_idx has a valid block for each input of a 4-bit product."""
    bits, inputs = attributes["bits"], attributes["K"]
    blocks = -(-inputs // attributes["block_size"])
    named = groups.reshape(-1)[:inputs].astype(np.int64)
    if (
        bits == _GROUPED_BITS
        and len(named) == inputs
        and (named >= 0).all()
        and named.max() < blocks
    ):
        return
    raise ExportError(
        f"{name_of(node)}: {MATMUL_NBITS} has a g_idx that cannot be"
        f" followed: it is for 4 bits and names one of {blocks} blocks for each of {inputs} inputs"
    )


def unpacked(
    attributes: Mapping[str, int],
    packed: NDArray[np.generic],
    scales: NDArray[np.generic],
    zeros: NDArray[np.generic] | None,
    picks: list[int],
    groups: NDArray[np.generic] | None = None,
) -> NDArray[np.float32] | None:
    """The weights [picks, in] of a MatMulNBits of com.microsoft; None for unsupported `bits`.

    Blocks are along the input, the low bits come first, and without zero points the middle of the
    range is zero. `groups` [in]: the block with the scale and zero point of each input, if it is
    not the one that the input is in.
    """
    inputs, out, size = attributes["K"], attributes["N"], attributes["block_size"]
    bits = attributes["bits"]
    if bits not in (2, 4, 8):
        return None
    blocks = -(-inputs // size)
    numbers = unpack(packed.reshape(out, -1)[picks], bits)[:, :inputs]
    middle = np.full((len(picks), blocks), 1 << (bits - 1), np.float32)
    if zeros is not None and zeros.dtype == np.uint8:
        middle = unpack(zeros.reshape(out, -1)[picks], bits)[:, :blocks]
    elif zeros is not None:
        middle = zeros.reshape(out, blocks)[picks].astype(np.float32)
    scale = scales.reshape(out, blocks)[picks].astype(np.float32)
    block = _blocks_of_inputs(inputs, size, groups)
    return ((numbers - middle[:, block]) * scale[:, block]).astype(np.float32)


def unpack(packed: NDArray[np.generic], bits: int) -> NDArray[np.float32]:
    """Packed numbers [rows, bytes] → [rows, numbers], the low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., np.newaxis].astype(np.uint8) >> shifts) & ((1 << bits) - 1)
    return parts.reshape(len(packed), -1).astype(np.float32)


def _constant(node: ir.Node, index: int) -> NDArray[np.generic] | None:
    value = input_at(node, index)
    return None if value is None or value.const_value is None else constant_of(value)
