"""Products with a constant weight in a graph, in whatever form an exporter or quantizer wrote them.

MatMul, Gemm            the weight as it is, or through Cast, Identity, Transpose
… of DequantizeLinear   QDQ, its input and output may be quantized too
MatMulNBits             packed in blocks
MatMulInteger           dynamically quantized: DynamicQuantizeLinear before, Cast and Mul behind
DynamicQuantizeMatMul   the same in one operator of onnxruntime's
MatMulIntegerToFloat    the same, its input quantized before

Scaled and turned products are made plain first (plain.py); what becomes of each input and attribute
is in operators.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import constant_of, integer_of, number_of, only_user
from loradeploy.export.match.operators import MICROSOFT, check_operators

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

PACKED: Final = "MatMulNBits"
INTEGER: Final = "MatMulInteger"
_DEQUANTIZE: Final = "DequantizeLinear"
# onnxruntime's products of integers that give floats: where they have the scale of the weight, its
# zero point, and the bias.
_TO_FLOAT: Final = {"DynamicQuantizeMatMul": (2, 3, 4), "MatMulIntegerToFloat": (3, 5, 6)}
# onnxruntime (1.31) follows g_idx at these bits alone.
_GROUPED_BITS: Final = 4
# All operators that may be products.
OPERATORS: Final = ("Gemm", "MatMul", PACKED, INTEGER, *_TO_FLOAT)
# Where products have a bias of their own.
_BIAS_INPUT: Final = {"Gemm": 2, PACKED: 5, **{op: at[2] for op, at in _TO_FLOAT.items()}}
# What a weight may pass through on its way from its initializer to the product.
_CARRIERS: Final = ("Cast", "Identity")

# onnxruntime's operators that add the bias of the product before them, and which input it is.
ADDS_BIAS: Final = {
    **dict.fromkeys(("BiasAdd", "BiasDropout", "BiasGelu", "BiasSplitGelu", "FastGelu"), 1),
    "MultiHeadAttention": 3,
    "SkipLayerNormalization": 4,
    "SkipSimplifiedLayerNormalization": 3,
}


@dataclass(frozen=True, eq=False)
class Product:
    """y = x W at one node.

    `weight`: the initializer; it is [out, in] where `transposed`, else [in, out].
    `quantized`: the weight is packed or of integers, and cannot be replaced by other numbers.
    `scaled`: the DequantizeLinear that its numbers come from, where there is one.
    `turned_first`: they are turned before they come to it.
    """

    node: ir.Node
    weight: ir.Value
    transposed: bool
    in_features: int
    out_features: int
    quantized: bool = False
    scaled: ir.Node | None = None
    turned_first: bool = False

    def rows(self, picks: list[int]) -> NDArray[np.float32] | None:
        """The weights [picks, in] of some outputs, unpacked; None where they cannot be read.

        Integers of a MatMulInteger come without their scale.

        Raises:
            ExportError: the node has an input or attribute that is not known.
        """
        check_operators(describe(self), [self.node])
        if self.node.op_type == PACKED:
            return _unpacked_rows(self.node, picks)
        held = constant_of(self.weight)
        if not self.quantized:
            rows = held.take(picks, 0 if self.transposed else 1).astype(np.float32)
            return rows if self.transposed else np.ascontiguousarray(rows.T)
        if self.scaled is not None:
            check_operators(describe(self), [self.scaled])
        return _dequantised_rows(self, held, picks)

    def steps(self, picks: list[int]) -> NDArray[np.float32] | None:
        """How far apart the numbers are that a quantized weight can have, beside those of `rows`.

        [picks, in] or what broadcasts to it; None where they cannot be read.
        """
        if self.node.op_type == PACKED:
            return _packed_steps(self.node, picks)
        shape = constant_of(self.weight).shape
        one, zero = (
            _dequantised_rows(self, np.broadcast_to(np.float32(number), shape), picks)
            for number in (1, 0)
        )
        return None if one is None or zero is None else one - zero


def products(graph: ir.Graph) -> Iterator[Product]:
    """Every product of the graph whose weight is a constant of two dimensions."""
    for node in graph:
        if node.op_type in ("MatMul", "Gemm") and node.domain == "":
            product = _plain(node)
        elif node.op_type == PACKED:
            product = _packed(node)
        elif node.op_type in _TO_FLOAT and node.domain == MICROSOFT:
            product = _to_float(node)
        elif node.op_type == INTEGER and node.domain == "":
            product = _integer_product(node)
        else:
            continue
        if product is not None:
            yield product


def input_of(node: ir.Node) -> ir.Value | None:
    """What the product `node` multiplies, before it is quantized for it."""
    x = node.inputs[0]
    producer = None if x is None else x.producer()
    if producer is None:
        return x
    if node.op_type in (INTEGER, "MatMulIntegerToFloat"):
        quantizes = producer.op_type in ("DynamicQuantizeLinear", "QuantizeLinear")
        return producer.inputs[0] if quantizes else x
    if producer.op_type == _DEQUANTIZE:
        quantize = None if producer.inputs[0] is None else producer.inputs[0].producer()
        if quantize is not None and _undoes(producer, quantize):
            return quantize.inputs[0]
    return x


def output_of(node: ir.Node) -> ir.Value:
    """What the product `node` gives, once it is scaled and no longer quantized.

    An update that is added here is not rounded to the base's few steps.
    """
    y = node.outputs[0]
    if node.op_type == INTEGER:
        for op in ("Cast", "Mul"):
            after = only_user(y)
            if after is None or after.op_type != op:
                return node.outputs[0]
            y = after.outputs[0]
        return y
    quantize = only_user(y)
    if quantize is not None and quantize.op_type == "QuantizeLinear":
        dequantize = only_user(quantize.outputs[0])
        if dequantize is not None and _undoes(dequantize, quantize):
            return dequantize.outputs[0]
    return y


def bias_use(node: ir.Node, size: int) -> tuple[ir.Node, int] | None:
    """Where the constant [size] that is added to the product `node` is used: a node's input.

    It may have more axes, of 1. A product that has a bias of its own has no other.
    """
    own = own_bias(node)
    if own is not None:
        adder, indices = node, [own]
    else:
        user = only_user(output_of(node))
        if user is None or user.op_type != "Add":
            return None
        adder, indices = user, list(range(len(user.inputs)))
    for index in indices:
        value = adder.inputs[index]
        if value is None or not value.is_initializer() or value.const_value is None:
            continue
        shape = tuple(value.const_value.shape.numpy())
        if shape[-1:] == (size,) and value.const_value.size == size:
            return adder, index
    return None


def own_bias(node: ir.Node) -> int | None:
    """Which input of the product `node` is added to it; None where it has none."""
    index = _BIAS_INPUT.get(node.op_type)
    if index is None or len(node.inputs) <= index or node.inputs[index] is None:
        return None
    return index


def adds_unclear(node: ir.Node, size: int) -> bool:
    """Whether a constant is added to the product `node` that `bias_use` does not find.

    Whether it is the layer's bias is not known then, and it can neither be replaced nor scaled.
    """
    if bias_use(node, size) is not None:
        return False
    if own_bias(node) is not None:
        return True
    for user in (use.node for use in output_of(node).uses()):
        if user.op_type == "Add" and any(map(_is_constant, user.inputs)):
            return True
        index = ADDS_BIAS.get(user.op_type)
        if index is not None and _input(user, index) is not None:
            return True
    return False


def value_of(use: tuple[ir.Node, int]) -> ir.Value | None:
    """The value at a node's input."""
    node, index = use
    return node.inputs[index]


def describe(product: Product) -> str:
    """The product as a message names it."""
    node = product.node
    return f"{node.name or node.outputs[0].name} [{product.in_features} → {product.out_features}]"


def _plain(node: ir.Node) -> Product | None:
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or weight.is_graph_input():
        return None
    turned, scaled, turned_first = False, None, False
    if node.op_type == "Gemm":
        turned = integer_of(node, "transB")
        # Other scales and a transposed x are no linear layer as adapters know it.
        scales = number_of(node, "alpha"), number_of(node, "beta")
        if integer_of(node, "transA") or scales != (1, 1):
            return None
    while (carrier := weight.producer()) is not None:
        if carrier.op_type == "Transpose" and _swaps(carrier):
            turned = not turned
            turned_first ^= scaled is not None
        elif carrier.op_type == _DEQUANTIZE and scaled is None:
            scaled = carrier
        elif carrier.op_type not in _CARRIERS:
            return None
        source = carrier.inputs[0]
        if source is None:
            return None
        weight = source
    shape = _constant_shape(weight)
    if shape is None or weight.const_value is None:
        return None
    if scaled is None and not weight.const_value.dtype.is_floating_point():
        return None
    rows, columns = shape
    into, out = (columns, rows) if turned else (rows, columns)
    quantized = scaled is not None
    return Product(node, weight, turned, into, out, quantized, scaled, turned_first)


def _packed(node: ir.Node) -> Product | None:
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer():
        return None
    into, out = node.attributes["K"].as_int(), node.attributes["N"].as_int()
    return Product(node, weight, True, into, out, quantized=True)


def _integer_product(node: ir.Node) -> Product | None:
    weight = node.inputs[1]
    shape = None if weight is None else _constant_shape(weight)
    # Without the scaling behind it there are no numbers yet that an update could be added to.
    if weight is None or shape is None or output_of(node) is node.outputs[0]:
        return None
    return Product(node, weight, False, *shape, quantized=True)


def _to_float(node: ir.Node) -> Product | None:
    weight = node.inputs[1]
    shape = None if weight is None else _constant_shape(weight)
    if weight is None or shape is None:
        return None
    return Product(node, weight, False, *shape, quantized=True)


def _undoes(dequantize: ir.Node, quantize: ir.Node) -> bool:
    """Whether a DequantizeLinear gives what a QuantizeLinear took, but for its rounding."""
    if dequantize.op_type != _DEQUANTIZE or quantize.op_type != "QuantizeLinear":
        return False
    return all(_same(_input(dequantize, at), _input(quantize, at)) for at in (1, 2))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _same(one: ir.Value | None, other: ir.Value | None) -> bool:
    if one is other:
        return True
    if one is None or other is None or one.const_value is None or other.const_value is None:
        return False
    return np.array_equal(constant_of(one), constant_of(other))


def _is_constant(value: ir.Value | None) -> bool:
    """Whether a value is a constant, however it is carried."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in (*_CARRIERS, "Transpose", _DEQUANTIZE):
            return False
        value = node.inputs[0]
    return value is not None and value.is_initializer() and value.const_value is not None


def _constant_shape(value: ir.Value) -> tuple[int, int] | None:
    if not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    shape = value.const_value.shape.numpy()
    return None if len(shape) != 2 else (int(shape[0]), int(shape[1]))


def _dequantised_rows(
    product: Product, held: NDArray[np.generic], picks: list[int]
) -> NDArray[np.float32] | None:
    """The weights [picks, in] of integers; None where their scales cannot be read."""
    node, scale, zero, along, block = product.node, None, None, 1, 0
    if product.scaled is not None:
        node = product.scaled
        scale, zero = _given(node, 1), _given(node, 2)
        axis, size = (node.attributes.get(name) for name in ("axis", "block_size"))
        along = 1 if axis is None else axis.as_int() % 2
        block = 0 if size is None else size.as_int()
    elif node.op_type in _TO_FLOAT:
        at, zero_at, _ = _TO_FLOAT[node.op_type]
        scale, zero = _given(node, at), _given(node, zero_at)
    else:
        scale, zero = np.ones((), np.float32), _given(node, 3)
    if scale is None or zero is None:
        return None
    numbers = held.T if product.turned_first else held
    outputs = 0 if product.transposed != product.turned_first else 1
    scales = _spread(scale, numbers.shape, along, block)
    zeros = _spread(zero, numbers.shape, along, block)
    if scales is None or zeros is None:
        return None
    chosen = (each.take(picks, outputs).astype(np.float32) for each in (numbers, zeros, scales))
    rows, offset, factor = chosen
    rows = (rows - offset) * factor
    return rows if outputs == 0 else np.ascontiguousarray(rows.T)


def _given(node: ir.Node, index: int) -> NDArray[np.generic] | None:
    """The constant at a node's input, 0 where it has none; None where it is no constant."""
    value = _input(node, index)
    if value is None:
        return np.zeros((), np.float32)
    return None if value.const_value is None else constant_of(value)


def _spread(
    values: NDArray[np.generic], shape: tuple[int, ...], along: int, block: int
) -> NDArray[np.generic] | None:
    """Scales or zero points beside each number of a matrix of `shape`; None where none fit.

    They are one, or one for each index of the axis `along`, or for each block of that axis.
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


def _unpacked_rows(node: ir.Node, picks: list[int]) -> NDArray[np.float32] | None:
    packed, scales = _constant(node, 1), _constant(node, 2)
    zeros, groups = _constant(node, 3), _constant(node, 4)
    given = [_input(node, index) is not None for index in (3, 4)]
    if packed is None or scales is None or given != [zeros is not None, groups is not None]:
        return None
    attributes = {
        name: node.attributes[name].as_int()
        for name in ("K", "N", "bits", "block_size")
        if name in node.attributes
    }
    if groups is not None:
        _check_groups(node, attributes, groups)
    return unpacked(attributes, packed, scales, zeros, picks, groups)


def _packed_steps(node: ir.Node, picks: list[int]) -> NDArray[np.float32] | None:
    scales, groups = _constant(node, 2), _constant(node, 4)
    if scales is None or (groups is None) != (_input(node, 4) is None):
        return None
    into, out, size = (node.attributes[name].as_int() for name in ("K", "N", "block_size"))
    scale = scales.reshape(out, -(-into // size))[picks].astype(np.float32)
    return scale[:, _blocks_of_inputs(into, size, groups)]


def _blocks_of_inputs(
    into: int, size: int, groups: NDArray[np.generic] | None
) -> NDArray[np.int64]:
    """The block [in] whose scale and zero point each input of a packed weight has."""
    return np.arange(into) // size if groups is None else groups.reshape(-1)[:into].astype(np.int64)


def _check_groups(
    node: ir.Node, attributes: Mapping[str, int], groups: NDArray[np.generic]
) -> None:
    """Raise ExportError where g_idx does not name a block for each input of a 4-bit product."""
    bits, into = attributes.get("bits", 4), attributes["K"]
    blocks = -(-into // attributes["block_size"])
    named = groups.reshape(-1)[:into].astype(np.int64)
    if bits == _GROUPED_BITS and len(named) == into and (named >= 0).all() and named.max() < blocks:
        return
    raise ExportError(
        f"{node.name or node.outputs[0].name}: {PACKED} has a g_idx that cannot be followed: it is"
        f" for 4 bits and names one of {blocks} blocks for each of {into} inputs"
    )


def unpacked(
    attributes: Mapping[str, int],
    packed: NDArray[np.generic],
    scales: NDArray[np.generic],
    zeros: NDArray[np.generic] | None,
    picks: list[int],
    groups: NDArray[np.generic] | None = None,
) -> NDArray[np.float32] | None:
    """The weights [picks, in] of a MatMulNBits of com.microsoft; None for bits it does not have.

    Blocks are along the input, the low bits come first, and without zero points the middle of the
    range is zero. `groups` [in] tells the block whose scale and zero point each input has, where it
    is not the one that it stands in.
    """
    into, out, size = attributes["K"], attributes["N"], attributes["block_size"]
    bits = attributes.get("bits", 4)
    if bits not in (2, 4, 8):
        return None
    blocks = -(-into // size)
    numbers = unpack(packed.reshape(out, -1)[picks], bits)[:, :into]
    middle = np.full((len(picks), blocks), 1 << (bits - 1), np.float32)
    if zeros is not None and zeros.dtype == np.uint8:
        middle = unpack(zeros.reshape(out, -1)[picks], bits)[:, :blocks]
    elif zeros is not None:
        middle = zeros.reshape(out, blocks)[picks].astype(np.float32)
    scale = scales.reshape(out, blocks)[picks].astype(np.float32)
    block = _blocks_of_inputs(into, size, groups)
    return ((numbers - middle[:, block]) * scale[:, block]).astype(np.float32)


def unpack(packed: NDArray[np.generic], bits: int) -> NDArray[np.float32]:
    """Packed numbers [rows, bytes] → [rows, numbers], the low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., np.newaxis].astype(np.uint8) >> shifts) & ((1 << bits) - 1)
    return parts.reshape(len(packed), -1).astype(np.float32)


def _constant(node: ir.Node, index: int) -> NDArray[np.generic] | None:
    value = _input(node, index)
    return None if value is None or value.const_value is None else constant_of(value)


def _swaps(node: ir.Node) -> bool:
    attribute = node.attributes.get("perm")
    return attribute is None or tuple(attribute.as_ints()) == (1, 0)
