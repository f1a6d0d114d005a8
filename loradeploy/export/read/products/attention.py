"""Separate the projections of q, k and v from onnxruntime's fused attention.

    Attention(x, W, b, mask, , bias)   →   MultiHeadAttention(q, k, v, , mask, bias),
                                           q = x W_q + b_q, and k and v likewise

onnxruntime's transformer optimizer fuses three projections and the attention after them into one
operator. Adapters change the projections, so they become products again, each with its own weight.
An attention with a cache, with attributes that MultiHeadAttention does not have, or with a mask of
row ends and begins [2 · batch], is not changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.export.graph.edit import (
    add_constant,
    constant_of,
    free_name,
    input_at,
    is_initialized,
    name_of,
)
from loradeploy.export.match.operators import MICROSOFT

if TYPE_CHECKING:
    import onnx_ir as ir

# The inputs of Attention.
_X, _WEIGHT, _BIAS, _MASK, _PAST, _ATTENTION_BIAS = range(6)
_CARRIED: Final = ("num_heads", "unidirectional", "mask_filter_value", "scale")
_SIZES: Final = "qkv_hidden_sizes"
_PARTS: Final = ("query", "key", "value")


def separate_projections(graph: ir.Graph) -> None:
    """Separate every Attention of onnxruntime that has the weights of q, k and v."""
    for node in list(graph):
        if node.op_type == "Attention" and node.domain == MICROSOFT:
            sizes = _sizes(node)
            if sizes is not None:
                _separate(graph, node, sizes)


def _sizes(node: ir.Node) -> list[int] | None:
    """The outputs of q, k and v; None for an attention that is not changed."""
    weight, bias = input_at(node, _WEIGHT), input_at(node, _BIAS)
    unknown = any(
        name not in (*_CARRIED, _SIZES) and attribute.value != 0
        for name, attribute in node.attributes.items()
    )
    cached = input_at(node, _PAST) is not None or len(node.inputs) > _ATTENTION_BIAS + 1
    present = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    if unknown or cached or present or not is_initialized(weight) or _has_ranges(node):
        return None
    assert weight is not None
    shape = constant_of(weight).shape
    if len(shape) != 2 or (bias is not None and not is_initialized(bias)):
        return None
    attribute = node.attributes.get(_SIZES)
    given = None if attribute is None else list(attribute.as_ints())
    sizes = given or [shape[1] // len(_PARTS)] * len(_PARTS)
    return sizes if len(sizes) == len(_PARTS) and sum(sizes) == shape[1] else None


def _has_ranges(node: ir.Node) -> bool:
    """Whether the mask has one axis, of another size than batch: [2 · batch], [3 · batch + 2]."""
    x, mask = input_at(node, _X), input_at(node, _MASK)
    if mask is None or mask.shape is None or len(mask.shape) != 1:
        return False
    producer = mask.producer()
    if producer is not None and producer.op_type == "Concat":
        return True
    if producer is not None and producer.op_type == "ReduceSum":
        return False  # the length of each row
    size, batch = _first_size(mask), _first_size(x)
    return None not in (size, batch) and size != batch


def _first_size(value: ir.Value | None) -> int | str | None:
    """The size of the first axis, or its symbol; None if the graph declares neither."""
    if value is None or not value.shape:
        return None
    size = value.shape[0]
    return size if isinstance(size, int) else size.value


def _separate(graph: ir.Graph, node: ir.Node, sizes: list[int]) -> None:
    weight, bias = input_at(node, _WEIGHT), input_at(node, _BIAS)
    assert weight is not None
    ends = np.cumsum(sizes)
    projected: list[ir.Value | None] = []
    for part, begin, end in zip(_PARTS, ends - sizes, ends, strict=True):
        own = slice(int(begin), int(end))
        y = _computed(graph, node, "MatMul", input_at(node, _X), _part(graph, weight, part, own))
        if bias is not None:
            y = _computed(graph, node, "Add", y, _part(graph, bias, part, own))
        projected.append(y)
    inputs = [*projected, None, input_at(node, _MASK), input_at(node, _ATTENTION_BIAS)]
    while inputs[-1] is None:
        inputs.pop()
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    for attribute in [each for each in node.attributes if each not in _CARRIED]:
        node.attributes.pop(attribute)
    node.op_type = "MultiHeadAttention"


def _part(graph: ir.Graph, packed: ir.Value, part: str, columns: slice) -> ir.Value:
    """Some columns of a packed constant as a separate constant."""
    numbers = np.ascontiguousarray(constant_of(packed)[..., columns])
    return add_constant(graph, free_name(graph, f"{packed.name}.{part}"), numbers)


def _computed(
    graph: ir.Graph, node: ir.Node, op: str, x: ir.Value | None, constant: ir.Value
) -> ir.Value:
    """The output of a new node before the attention `node`, with the type of its output."""
    import onnx_ir as ir

    new = ir.node(op, [x, constant], name=f"{name_of(node)}/{constant.name}")
    new.outputs[0].name, new.outputs[0].type = f"{new.name}/{op}", node.outputs[0].type
    graph.insert_before(node, new)
    return new.outputs[0]
