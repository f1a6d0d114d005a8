"""Take the projections of q, k and v out of onnxruntime's fused attention.

    Attention(x, W, b, mask, , bias)   →   MultiHeadAttention(q, k, v, , mask, bias),
                                           [q, k, v] = Split(x W + b)

onnxruntime's transformer optimizer makes one operator of three projections and what follows them.
Adapters change the projections, so that they become a product again, with one packed weight.
An attention with a cache, or with attributes that MultiHeadAttention does not have, stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.export.graph.edit import add_constant, constant_of, free_name
from loradeploy.export.match.operators import MICROSOFT

if TYPE_CHECKING:
    import onnx_ir as ir

# The inputs of Attention.
_X, _WEIGHT, _BIAS, _MASK, _PAST, _ATTENTION_BIAS = range(6)
_CARRIED: Final = ("num_heads", "unidirectional", "mask_filter_value", "scale")
_SIZES: Final = "qkv_hidden_sizes"
_PARTS: Final = 3


def separate_projections(graph: ir.Graph) -> None:
    """Replace every Attention of onnxruntime's that has the weights of q, k and v."""
    for node in list(graph):
        if node.op_type == "Attention" and node.domain == MICROSOFT:
            sizes = _sizes(node)
            if sizes is not None:
                _separate(graph, node, sizes)


def _sizes(node: ir.Node) -> list[int] | None:
    """The outputs of q, k and v; None for an attention that stays as it is."""
    weight, bias = _input(node, _WEIGHT), _input(node, _BIAS)
    unknown = any(
        name not in (*_CARRIED, _SIZES) and attribute.value != 0
        for name, attribute in node.attributes.items()
    )
    cached = _input(node, _PAST) is not None or len(node.inputs) > _ATTENTION_BIAS + 1
    present = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    if unknown or cached or present or not _is_constant(weight):
        return None
    assert weight is not None
    shape = constant_of(weight).shape
    if len(shape) != 2 or (bias is not None and not _is_constant(bias)):
        return None
    attribute = node.attributes.get(_SIZES)
    given = None if attribute is None else list(attribute.as_ints())
    sizes = given or [shape[1] // _PARTS] * _PARTS
    return sizes if len(sizes) == _PARTS and sum(sizes) == shape[1] else None


def _separate(graph: ir.Graph, node: ir.Node, sizes: list[int]) -> None:
    import onnx_ir as ir

    name, y = str(node.name or node.outputs[0].name), node.outputs[0]
    x = _input(node, _X)
    made: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value | None], outputs: int = 1, **given: Any) -> ir.Node:
        new = ir.node(op, inputs, attributes=given, num_outputs=outputs, name=f"{name}/{op}")
        for index, value in enumerate(new.outputs):
            value.name = new.name if outputs == 1 else f"{new.name}.{index}"
            value.type = y.type
        made.append(new)
        return new

    packed = add("MatMul", [x, _input(node, _WEIGHT)]).outputs[0]
    if (bias := _input(node, _BIAS)) is not None:
        packed = add("Add", [packed, bias]).outputs[0]
    parts = add_constant(graph, free_name(graph, f"{name}/sizes"), np.array(sizes, np.int64))
    q, k, v = add("Split", [packed, parts], _PARTS, axis=-1).outputs
    rest = [None, _input(node, _MASK), _input(node, _ATTENTION_BIAS)]
    while rest and rest[-1] is None:
        rest.pop()
    graph.insert_before(node, made)
    for index, value in enumerate([q, k, v, *rest]):
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)
    node.resize_inputs(_PARTS + len(rest))
    node.attributes.pop(_SIZES, None)
    for attribute in [name for name in node.attributes if name not in _CARRIED]:
        node.attributes.pop(attribute)
    node.op_type = "MultiHeadAttention"


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None
