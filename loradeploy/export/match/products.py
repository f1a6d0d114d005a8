"""Find products with a constant weight, in all forms that exporters and quantizers write.

MatMul, Gemm            the weight directly, or through Cast, Identity, Transpose
… of DequantizeLinear   QDQ; input and output may be quantized too
MatMulNBits, MatMulBnb4 packed in blocks
MatMulInteger           dynamically quantized, with the scales after it (integer_scales.py)
DynamicQuantizeMatMul   the same in one operator of onnxruntime
MatMulIntegerToFloat    the same, with the input quantized before

Products with a scale or a transposed input become MatMul and Add first (normalize.py). The
treatment of each input and attribute is in operators.py, dequantization in quantized.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.graph_form import BFLOAT16, DEFAULT_PRECISION
from loradeploy.export.graph.edit import (
    constant_of,
    input_at,
    integer_of,
    is_fixed,
    is_initialized,
    name_of,
    number_of,
    only_user,
    source_of,
)
from loradeploy.export.match.bnb4 import MATMUL_BNB4, rows_of_codes, steps_of_codes
from loradeploy.export.match.integer_scales import scaling_of
from loradeploy.export.match.operators import MICROSOFT, check_operators
from loradeploy.export.match.quantized import (
    INTEGER,
    MATMUL_NBITS,
    TO_FLOAT,
    dequantized_rows,
    packed_bits,
    steps_of_blocks,
    unpacked_rows,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_DEQUANTIZE: Final = "DequantizeLinear"
# Operators that may be between a weight's initializer and the product.
_CARRIERS: Final = ("Cast", "Identity")

# onnxruntime's operators that add the bias of the product before them, and its input index.
ADDS_BIAS: Final = {
    **dict.fromkeys(("BiasAdd", "BiasDropout", "BiasGelu", "BiasSplitGelu", "FastGelu"), 1),
    "MultiHeadAttention": 3,
    "SkipLayerNormalization": 4,
    "SkipSimplifiedLayerNormalization": 3,
}


@dataclass(frozen=True, eq=False)
class Product:
    """y = x W at one node.

    `weight`: the initializer, [out, in] if `transposed`, else [in, out].
    `quantized`: the weight is packed or of integers, and cannot be replaced by float values.
    `scaled`: the DequantizeLinear of the weight, if there is one.
    `transposed_first`: the weight is transposed before the DequantizeLinear.
    """

    node: ir.Node
    weight: ir.Value
    transposed: bool
    in_features: int
    out_features: int
    quantized: bool = False
    scaled: ir.Node | None = None
    transposed_first: bool = False

    def rows(self, picks: list[int]) -> NDArray[np.float32] | None:
        """The weights [picks, in] of some outputs, dequantized; None if they cannot be read.

        Those of a MatMulInteger are without their scale.

        Raises:
            ExportError: the node has an unknown input or attribute.
        """
        check_operators(describe(self), [self.node])
        if (unpack := _KINDS[self.node.op_type].rows) is not None:
            return unpack(self.node, picks)
        numbers = constant_of(self.weight)
        if not self.quantized:
            rows = numbers.take(picks, 0 if self.transposed else 1).astype(np.float32)
            return rows if self.transposed else np.ascontiguousarray(rows.T)
        if self.scaled is not None:
            check_operators(describe(self), [self.scaled])
        return dequantized_rows(self, numbers, picks)

    def steps(self, picks: list[int]) -> NDArray[np.float32] | None:
        """The distance between neighboring values of a quantized weight, for those of `rows`.

        [picks, in] or a shape that broadcasts to it; None if it cannot be read.
        """
        if (unpack := _KINDS[self.node.op_type].steps) is not None:
            return unpack(self.node, picks)
        shape = constant_of(self.weight).shape
        one, zero = (
            dequantized_rows(self, np.broadcast_to(np.float32(number), shape), picks)
            for number in (1, 0)
        )
        return None if one is None or zero is None else one - zero


def products(graph: ir.Graph) -> Iterator[Product]:
    """Every product of the graph with a constant two-dimensional weight."""
    for node in graph:
        kind = _KINDS.get(node.op_type)
        if kind is None or kind.domain not in (None, node.domain):
            continue
        if (product := kind.read(node)) is not None:
            yield product


def precision_of(model: ir.Model) -> str:
    """The precision of a graph's products, one of `graph_form.PRECISIONS`.

    Products in branches count. Weights of fewer bits than 4 count as int4.
    """
    import onnx_ir as ir

    bits = {
        packed_bits(node)
        for node in model.graph.all_nodes()
        if node.op_type in (MATMUL_NBITS, MATMUL_BNB4)
    }
    if bits:
        return "int8" if min(bits) > 4 else "int4"
    kinds = {
        value.dtype
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.dtype is not None and _is_matrix(value.shape)
    }
    for kind, name in ((ir.DataType.FLOAT16, "fp16"), (ir.DataType.BFLOAT16, BFLOAT16)):
        if kind in kinds:
            return name
    every = (product for graph in model.graphs() for product in products(graph))
    weights = [product.weight.const_value for product in every if product.quantized]
    if weights:
        few = (ir.DataType.INT4, ir.DataType.UINT4)
        return "int4" if any(w is not None and w.dtype in few for w in weights) else "int8"
    return DEFAULT_PRECISION


def _is_matrix(shape: ir.Shape | None) -> bool:
    """Whether a constant of this shape may be a weight: no scalar, vector, row or column."""
    return shape is not None and len(shape) == 2 and all(size != 1 for size in shape)


def input_of(node: ir.Node) -> ir.Value | None:
    """The input x of the product `node`, before it is quantized."""
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
    """The output of the product `node`, after it is scaled and dequantized.

    An update that is added here is not rounded to quantization steps.
    """
    y = node.outputs[0]
    if node.op_type == INTEGER:
        scaling = scaling_of(node)
        return y if scaling is None else scaling.output
    quantize = only_user(y)
    if quantize is not None and quantize.op_type == "QuantizeLinear":
        dequantize = only_user(quantize.outputs[0])
        if dequantize is not None and _undoes(dequantize, quantize):
            return dequantize.outputs[0]
    return y


def repeated_for_rows(y: ir.Value) -> ir.Value | None:
    """The output of an Expand of `y`, or of `y` plus constants; None if there is no Expand."""
    after = only_user(y)
    while after is not None and after.op_type == "Add" and any(map(_is_constant, after.inputs)):
        after = only_user(after.outputs[0])
    return after.outputs[0] if after is not None and after.op_type == "Expand" else None


def bias_use(node: ir.Node, size: int) -> tuple[ir.Node, int] | None:
    """The node and input index at which a constant [size] is added to the product `node`.

    The constant may have additional axes of 1. A product with a bias input has no other bias.
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
    """The index of the bias input of the product `node`; None if it has no bias there."""
    kind = _KINDS.get(node.op_type)
    index = None if kind is None else kind.bias
    return None if index is None or input_at(node, index) is None else index


def adds_unclear(node: ir.Node, size: int) -> bool:
    """Whether a constant is added to the product `node` that `bias_use` does not find.

    It may or may not be the layer's bias, so that it can neither be replaced nor scaled.
    """
    if bias_use(node, size) is not None:
        return False
    if own_bias(node) is not None:
        return True
    for user in (use.node for use in output_of(node).uses()):
        if user.op_type == "Add" and any(map(_is_constant, user.inputs)):
            return True
        index = ADDS_BIAS.get(user.op_type)
        if index is not None and input_at(user, index) is not None:
            return True
    return False


def value_of(use: tuple[ir.Node, int]) -> ir.Value | None:
    """The value at a node's input."""
    node, index = use
    return node.inputs[index]


def users_of(weight: ir.Value) -> Iterator[ir.Node]:
    """The nodes that use a weight, directly or through nodes that pass it on."""
    for user in (use.node for use in weight.uses()):
        if user.op_type in (*_CARRIERS, "Transpose", _DEQUANTIZE):
            yield from users_of(user.outputs[0])
        else:
            yield user


def describe(product: Product) -> str:
    """The product's name in messages."""
    node = product.node
    return f"{name_of(node)} [{product.in_features} → {product.out_features}]"


def _plain(node: ir.Node) -> Product | None:
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or weight.is_graph_input():
        return None
    transposed, scaled, transposed_first = False, None, False
    if node.op_type == "Gemm":
        transposed = integer_of(node, "transB")
        # With scales or a transposed x it is not a linear layer.
        scales = number_of(node, "alpha"), number_of(node, "beta")
        if integer_of(node, "transA") or scales != (1, 1):
            return None
    while (carrier := weight.producer()) is not None:
        if carrier.op_type == "Transpose" and _swaps(carrier):
            transposed = not transposed
            transposed_first ^= scaled is not None
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
    into, out = (columns, rows) if transposed else (rows, columns)
    quantized = scaled is not None
    return Product(node, weight, transposed, into, out, quantized, scaled, transposed_first)


def _packed(node: ir.Node) -> Product | None:
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer():
        return None
    into, out = node.attributes["K"].as_int(), node.attributes["N"].as_int()
    return Product(node, weight, True, into, out, quantized=True)


def _to_float(node: ir.Node) -> Product | None:
    weight = node.inputs[1]
    shape = None if weight is None else _constant_shape(weight)
    if weight is None or shape is None:
        return None
    return Product(node, weight, False, *shape, quantized=True)


def _to_integers(node: ir.Node) -> Product | None:
    product = _to_float(node)
    # Without scales after it there is no float value to which an update could be added.
    return None if product is None or output_of(node) is node.outputs[0] else product


def _undoes(dequantize: ir.Node, quantize: ir.Node) -> bool:
    """Whether a DequantizeLinear restores the input of a QuantizeLinear, up to rounding."""
    if dequantize.op_type != _DEQUANTIZE or quantize.op_type != "QuantizeLinear":
        return False
    return all(_same(input_at(dequantize, at), input_at(quantize, at)) for at in (1, 2))


def _same(one: ir.Value | None, other: ir.Value | None) -> bool:
    if one is other:
        return True
    if one is None or other is None or one.const_value is None or other.const_value is None:
        return False
    return np.array_equal(constant_of(one), constant_of(other))


def _is_constant(value: ir.Value | None) -> bool:
    """Whether a value is a constant, possibly cast, transposed or dequantized."""
    return is_initialized(source_of(value, (*_CARRIERS, "Transpose", _DEQUANTIZE)))


def _constant_shape(value: ir.Value) -> tuple[int, int] | None:
    if not is_fixed(value) or value.const_value is None:
        return None
    shape = value.const_value.shape.numpy()
    return None if len(shape) != 2 else (int(shape[0]), int(shape[1]))


def _swaps(node: ir.Node) -> bool:
    attribute = node.attributes.get("perm")
    return attribute is None or tuple(attribute.as_ints()) == (1, 0)


@dataclass(frozen=True)
class _Kind:
    """How products of an operator are read.

    `domain`: None if any is. `bias`: the index of the bias input. `rows`, `steps`: those of
    `Product`, for packed weights.
    """

    domain: str | None
    read: Callable[[ir.Node], Product | None]
    bias: int | None = None
    rows: Callable[[ir.Node, list[int]], NDArray[np.float32] | None] | None = None
    steps: Callable[[ir.Node, list[int]], NDArray[np.float32] | None] | None = None


_KINDS: Final[Mapping[str, _Kind]] = {
    "Gemm": _Kind("", _plain, bias=2),
    "MatMul": _Kind("", _plain),
    MATMUL_NBITS: _Kind(None, _packed, 5, unpacked_rows, steps_of_blocks),
    MATMUL_BNB4: _Kind(None, _packed, None, rows_of_codes, steps_of_codes),
    INTEGER: _Kind("", _to_integers),
    **{op: _Kind(MICROSOFT, _to_float, bias=bias) for op, (_, _, bias) in TO_FLOAT.items()},
}
OPERATORS: Final = tuple(_KINDS)
