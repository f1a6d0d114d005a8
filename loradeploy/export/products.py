"""Products with a constant weight in a graph, in whatever form an exporter or quantiser wrote them.

MatMul, Gemm            the weight as it is, or through Cast, Identity, Transpose
… of DequantizeLinear   QDQ, its input and output may be quantised too
MatMulNBits             packed in blocks
MatMulInteger           dynamically quantised: DynamicQuantizeLinear before, Cast and Mul behind
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.export.rewire import constant_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

PACKED: Final = "MatMulNBits"
INTEGER: Final = "MatMulInteger"
_DEQUANTISE: Final = "DequantizeLinear"
# What a weight may pass through on its way from its initializer to the product.
_CARRIERS: Final = ("Cast", "Identity")


@dataclass(frozen=True, eq=False)
class Product:
    """y = x W at one node.

    `weight`: the initializer; it is [out, in] where `transposed`, else [in, out].
    `quantised`: the weight is packed or of integers, and cannot be replaced by other numbers.
    `scaled`: the DequantizeLinear that its numbers come from, where there is one.
    """

    node: ir.Node
    weight: ir.Value
    transposed: bool
    in_features: int
    out_features: int
    quantised: bool = False
    scaled: ir.Node | None = None

    def rows(self, picks: list[int]) -> NDArray[np.float32] | None:
        """The weights [picks, in] of some outputs, unpacked; None where they cannot be read.

        Integers of a MatMulInteger come without their scale.
        """
        if self.node.op_type == PACKED:
            return _unpacked_rows(self.node, picks)
        held = constant_of(self.weight)
        axis = 0 if self.transposed else 1
        rows = held.take(picks, axis).astype(np.float32)
        if self.quantised:
            zero, scale = _quantisation(self, held.shape, picks, axis)
            if zero is None or scale is None:
                return None
            rows = (rows - zero) * scale
        return rows if self.transposed else np.ascontiguousarray(rows.T)


def products(graph: ir.Graph) -> Iterator[Product]:
    """Every product of the graph whose weight is a constant of two dimensions."""
    for node in graph:
        if node.op_type in ("MatMul", "Gemm") and node.domain == "":
            product = _plain(node)
        elif node.op_type == PACKED:
            product = _packed(node)
        elif node.op_type == INTEGER and node.domain == "":
            product = _integer_product(node)
        else:
            continue
        if product is not None:
            yield product


def input_of(node: ir.Node) -> ir.Value | None:
    """What the product `node` multiplies, before it is quantised for it."""
    x = node.inputs[0]
    producer = None if x is None else x.producer()
    if producer is None:
        return x
    if node.op_type == INTEGER and producer.op_type == "DynamicQuantizeLinear":
        return producer.inputs[0]
    if producer.op_type == _DEQUANTISE:
        quantise = None if producer.inputs[0] is None else producer.inputs[0].producer()
        if quantise is not None and quantise.op_type == "QuantizeLinear":
            return quantise.inputs[0]
    return x


def output_of(node: ir.Node) -> ir.Value:
    """What the product `node` gives, once it is scaled and no longer quantised.

    An update that is added here is not rounded to the base's few steps.
    """
    y = node.outputs[0]
    if node.op_type == INTEGER:
        for op in ("Cast", "Mul"):
            after = _only_user(y)
            if after is None or after.op_type != op:
                return node.outputs[0]
            y = after.outputs[0]
        return y
    quantise = _only_user(y)
    if quantise is not None and quantise.op_type == "QuantizeLinear":
        dequantise = _only_user(quantise.outputs[0])
        if dequantise is not None and dequantise.op_type == _DEQUANTISE:
            return dequantise.outputs[0]
    return y


def bias_use(node: ir.Node, size: int) -> tuple[ir.Node, int] | None:
    """Where the constant [size] that is added to the product `node` is used: a node's input."""
    if node.op_type == "Gemm":
        adder, indices = node, range(2, len(node.inputs))
    else:
        user = _only_user(output_of(node))
        if user is None or user.op_type != "Add":
            return None
        adder = user
        indices = range(len(adder.inputs))
    for index in indices:
        value = adder.inputs[index]
        if value is None or not value.is_initializer() or value.const_value is None:
            continue
        if tuple(value.const_value.shape.numpy()) == (size,):
            return adder, index
    return None


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
    turned, scaled = False, None
    if node.op_type == "Gemm":
        turned = _integer(node, "transB")
        # Other scales and a transposed x are no linear layer as adapters know it.
        if _integer(node, "transA") or _number(node, "alpha") != 1 or _number(node, "beta") != 1:
            return None
    while (carrier := weight.producer()) is not None:
        if carrier.op_type == "Transpose" and _swaps(carrier):
            turned = not turned
        elif carrier.op_type == _DEQUANTISE and scaled is None:
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
    if weight.const_value.dtype.is_floating_point() == (scaled is not None):
        return None
    rows, columns = shape
    into, out = (columns, rows) if turned else (rows, columns)
    return Product(node, weight, turned, into, out, scaled is not None, scaled)


def _packed(node: ir.Node) -> Product | None:
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer():
        return None
    into, out = node.attributes["K"].as_int(), node.attributes["N"].as_int()
    return Product(node, weight, True, into, out, quantised=True)


def _integer_product(node: ir.Node) -> Product | None:
    weight = node.inputs[1]
    shape = None if weight is None else _constant_shape(weight)
    # Without the scaling behind it there are no numbers yet that an update could be added to.
    if weight is None or shape is None or output_of(node) is node.outputs[0]:
        return None
    return Product(node, weight, False, *shape, quantised=True)


def _constant_shape(value: ir.Value) -> tuple[int, int] | None:
    if not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    shape = value.const_value.shape.numpy()
    return None if len(shape) != 2 else (int(shape[0]), int(shape[1]))


def _quantisation(
    product: Product, shape: tuple[int, ...], picks: list[int], axis: int
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Zero points and scales that stand beside the weight's rows or columns `picks` of `axis`."""
    one = np.ones((), np.float32)
    if product.scaled is None:
        zero = _constant(product.node, 3)
        return (0 * one if zero is None else _beside(zero, shape, picks, axis, 1)), one
    scale, zero = _constant(product.scaled, 1), _constant(product.scaled, 2)
    if scale is None:
        return None, None
    given = product.scaled.attributes.get("axis")
    along = 1 if given is None else given.as_int() % 2
    zeros = 0 * one if zero is None else _beside(zero, shape, picks, axis, along)
    return zeros, _beside(scale, shape, picks, axis, along)


def _beside(
    values: NDArray[np.generic], shape: tuple[int, ...], picks: list[int], axis: int, along: int
) -> NDArray[np.float32] | None:
    numbers = values.astype(np.float32)
    if numbers.size == 1:
        return numbers.reshape(())
    if numbers.shape != (shape[along],):
        return None  # in blocks
    chosen = numbers[picks] if along == axis else numbers
    return chosen[:, np.newaxis] if along == 0 else chosen


def _unpacked_rows(node: ir.Node, picks: list[int]) -> NDArray[np.float32] | None:
    packed, scales, zeros = (_constant(node, index) for index in (1, 2, 3))
    if packed is None or scales is None:
        return None
    attributes = {
        name: node.attributes[name].as_int()
        for name in ("K", "N", "bits", "block_size")
        if name in node.attributes
    }
    return unpacked(attributes, packed, scales, zeros, picks)


def unpacked(
    attributes: Mapping[str, int],
    packed: NDArray[np.generic],
    scales: NDArray[np.generic],
    zeros: NDArray[np.generic] | None,
    picks: list[int],
) -> NDArray[np.float32] | None:
    """The weights [picks, in] of a MatMulNBits of com.microsoft; None for bits it does not have.

    Blocks are along the input, the low bits come first, and without zero points the middle of the
    range is zero.
    """
    into, out, size = attributes["K"], attributes["N"], attributes["block_size"]
    bits = attributes.get("bits", 4)
    if bits not in (2, 4, 8):
        return None
    blocks = -(-into // size)
    numbers = _unpack(packed.reshape(out, -1)[picks], bits).reshape(len(picks), blocks, size)
    middle = np.full((len(picks), blocks), 1 << (bits - 1), np.float32)
    if zeros is not None and zeros.dtype == np.uint8:
        middle = _unpack(zeros.reshape(out, -1)[picks], bits)[:, :blocks]
    elif zeros is not None:
        middle = zeros.reshape(out, blocks)[picks].astype(np.float32)
    scale = scales.reshape(out, blocks)[picks].astype(np.float32)
    whole = (numbers - middle[..., np.newaxis]) * scale[..., np.newaxis]
    return whole.reshape(len(picks), -1)[:, :into].astype(np.float32)


def _unpack(packed: NDArray[np.generic], bits: int) -> NDArray[np.float32]:
    """[rows, bytes] → [rows, numbers]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., np.newaxis].astype(np.uint8) >> shifts) & ((1 << bits) - 1)
    return parts.reshape(len(packed), -1).astype(np.float32)


def _constant(node: ir.Node, index: int) -> NDArray[np.generic] | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    return None if value is None or value.const_value is None else constant_of(value)


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _integer(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())


def _number(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else float(attribute.as_float())


def _swaps(node: ir.Node) -> bool:
    attribute = node.attributes.get("perm")
    return attribute is None or tuple(attribute.as_ints()) == (1, 0)
