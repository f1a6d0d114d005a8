"""Find biases that are fused into another operator, and operators that may hide a bias.

onnxruntime's optimizer moves a layer's bias into the operator after it:

    x W → BiasGelu(·, b)                          x W → SkipLayerNormalization(·, skip, γ, β, b)

Such a bias becomes a separate addition again if an adapter changes it. A bias after an unknown
operator cannot be distinguished from none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    add_constant,
    constant_of,
    free_name,
    is_initialized,
    name_of,
    only_user,
    value_behind,
)
from loradeploy.export.match.linears import Linear
from loradeploy.export.match.operators import MICROSOFT
from loradeploy.export.match.products import (
    ADDS_BIAS,
    OPERATORS,
    adds_unclear,
    bias_use,
    output_of,
    own_bias,
    value_of,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


@dataclass(frozen=True)
class _Operator:
    """The inputs to which an operator adds its bias, which is its input number `ADDS_BIAS`.

    `plain`: the operator that does the same without a bias; None if the bias is optional.
    `joint`: the bias is the concatenation of those of all `inputs`.
    """

    inputs: tuple[int, ...]
    plain: str | None = None
    joint: bool = False


_FUSED: Final[Mapping[str, _Operator]] = {
    "BiasGelu": _Operator((0,), plain="Gelu"),
    "FastGelu": _Operator((0,)),
    "SkipLayerNormalization": _Operator((0, 1)),
    "SkipSimplifiedLayerNormalization": _Operator((0, 1)),
    "MultiHeadAttention": _Operator((0, 1, 2), joint=True),
}
# onnxruntime's operators that add no bias to their inputs.
_ADD_NOTHING: Final = (
    *("DynamicQuantizeMatMul", "FusedMatMul", "Gelu", "GroupQueryAttention", "MatMulNBits"),
    *("MatMulIntegerToFloat", "QuickGelu", "RotaryEmbedding", "PagedAttention", "SparseAttention"),
    *("LinearAttention", "MatMulBnb4", "QMoE", "MoE", "DequantizeLinear", "QuantizeLinear"),
)
# Operators that only move or scale the values of a product's output.
_CARRIERS: Final = (
    *("Cast", "DequantizeLinear", "Div", "Dropout", "Flatten", "Identity", "Mul"),
    *("QuantizeLinear", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
)
_ADDERS: Final = ("Add", "Sub", "Sum")


@dataclass(frozen=True, eq=False)
class FusedBias:
    """A bias [out] of a product that its user `node` adds to its input number `at`."""

    node: ir.Node
    at: int
    numbers: NDArray[np.generic]


def fused_bias(product: ir.Node, size: int) -> FusedBias | None:
    """The bias that the only user of the product adds to it; None if there is none."""
    if own_bias(product) is not None:
        return None
    value = output_of(product)
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    user, at = uses[0].node, uses[0].idx
    known = _FUSED.get(user.op_type) if user.domain == MICROSOFT else None
    if known is None or at not in known.inputs or len(user.inputs) <= ADDS_BIAS[user.op_type]:
        return None
    if not known.joint and any(_is_product(user.inputs[i]) for i in known.inputs if i != at):
        return None  # it may be the other product's
    bias = user.inputs[ADDS_BIAS[user.op_type]]
    if bias is None or not bias.is_initializer() or bias.const_value is None:
        return None
    numbers = constant_of(bias).reshape(-1)
    if known.joint:
        sizes = [_width(value) for value in user.inputs[:3]]
        if None in sizes or sum(size or 0 for size in sizes) != numbers.size:
            return None
        begin = sum(size or 0 for size in sizes[:at])
        numbers = numbers[begin : begin + size]
    return FusedBias(user, at, numbers) if numbers.size == size else None


def bias_numbers(product: ir.Node, size: int) -> NDArray[np.generic] | None:
    """The constant [out] that is added to the product, fused or not; None if none is found."""
    use = bias_use(product, size)
    value = None if use is None else value_of(use)
    if value is not None:
        return constant_of(value).reshape(-1)
    fused = fused_bias(product, size)
    return None if fused is None else fused.numbers


def hides_bias(product: ir.Node, size: int) -> bool:
    """Whether the product may have a bias that is not found.

    It may if a constant is added after the output is reshaped, split or scaled, if an unknown
    operator takes the output, or if the bias is the sum of two constants.
    """
    if bias_numbers(product, size) is not None:
        return _adds_another(product, size)
    return own_bias(product) is not None or _hides(output_of(product))


def _adds_another(product: ir.Node, size: int) -> bool:
    """Whether a second constant [out] is added after the bias, which may be a part of it."""
    use = bias_use(product, size)
    adder = None if use is None else only_user(use[0].outputs[0])
    if adder is None or adder.op_type != "Add":
        return False
    constants = (value.const_value for value in adder.inputs if value is not None)
    return any(constant is not None and constant.size == size for constant in constants)


def has_unclear_bias(linear: Linear) -> bool:
    """Whether the layer has, or may have, a bias that is not found and cannot be replaced."""
    if linear.unseen_bias and linear.bias is None:
        return True
    size = linear.out_features
    return any(adds_unclear(node, size) or hides_bias(node, size) for node in linear.nodes)


def separate_biases(
    graph: ir.Graph, linears: Mapping[str, Linear], modules: Iterable[str]
) -> dict[str, Linear]:
    """Turn the fused biases of `modules` into separate additions, and return the new `linears`.

    Raises:
        ExportError: a module that is called several times has different biases.
    """
    for module in sorted(set(modules) & linears.keys()):
        linear = linears[module]
        if linear.bias is not None or linear.slice is not None:
            continue
        found = [fused_bias(node, linear.out_features) for node in linear.nodes]
        if not any(found):
            continue
        if not all(found) or len({f.numbers.tobytes() for f in found if f is not None}) > 1:
            raise ExportError(f"{module} is called several times, with biases that differ")
        for each in found:
            assert each is not None
            # All are in `found` before the first is separated: products may share a joint bias.
            if each.node.op_type in _FUSED:
                _separate(graph, each.node, each.at)
    return {module: _with_bias(linear) for module, linear in linears.items()}


def _with_bias(linear: Linear) -> Linear:
    """`linear` with the bias that is a separate addition now, possibly through another layer."""
    if linear.bias is not None or linear.slice is not None:
        return linear
    use = bias_use(linear.nodes[0], linear.out_features)
    return linear if use is None else dataclasses.replace(linear, bias=value_of(use))


def _separate(graph: ir.Graph, node: ir.Node, at: int) -> None:
    """Add the bias of `node` before it to its input `at`, or a joint bias to all its inputs."""
    import onnx_ir as ir

    known, last = _FUSED[node.op_type], ADDS_BIAS[node.op_type]
    bias = node.inputs[last]
    if bias is None:
        return  # separated for another of its products
    numbers, begin = constant_of(bias).reshape(-1), 0
    for index in known.inputs if known.joint else (at,):
        x = node.inputs[index]
        assert x is not None
        size = _width(x) if known.joint else numbers.size
        assert size is not None
        own = add_constant(
            graph,
            free_name(graph, f"{bias.name}.{index}"),
            np.ascontiguousarray(numbers[begin : begin + size]),
        )
        begin += size
        add = ir.node("Add", [x, own], name=f"{name_of(node)}/bias.{index}")
        out = add.outputs[0]
        out.name, out.type, out.shape = add.name, x.type, x.shape
        graph.insert_before(node, add)
        node.replace_input_with(index, out)
    node.replace_input_with(last, None)
    if known.plain is not None:
        node.op_type = known.plain
        node.resize_inputs(last)


def _is_product(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type in OPERATORS


def _hides(value: ir.Value) -> bool:
    return any(_hides_at(use.node, use.idx) for use in value.uses())


def _hides_at(node: ir.Node, index: int) -> bool:
    if node.domain == MICROSOFT:
        known = _FUSED.get(node.op_type)
        if known is not None:
            bias = ADDS_BIAS[node.op_type]
            has = len(node.inputs) > bias and node.inputs[bias] is not None
            return has and index in known.inputs
        return node.op_type not in _ADD_NOTHING and "Normalization" not in node.op_type
    if node.domain not in ("", "ai.onnx"):
        return True
    if node.op_type in _ADDERS:
        return any(_is_constant(value) for value in node.inputs)
    return node.op_type in _CARRIERS and any(_hides(value) for value in node.outputs)


def _is_constant(value: ir.Value | None) -> bool:
    value = value_behind(value, ("Cast", "DequantizeLinear", "Identity", "Reshape", "Unsqueeze"))
    node = None if value is None else value.producer()
    return is_initialized(value) if node is None else node.op_type == "Constant"


def _width(value: ir.Value | None) -> int | None:
    size = None if value is None or value.shape is None or not len(value.shape) else value.shape[-1]
    if isinstance(size, int):
        return size
    producer = None if value is None else value.producer()
    weight = None if producer is None or len(producer.inputs) < 2 else producer.inputs[1]
    if producer is None or producer.op_type != "MatMul" or weight is None or weight.shape is None:
        return None
    last = weight.shape[-1]
    return last if isinstance(last, int) else None
