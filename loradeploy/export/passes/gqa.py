"""Replace a decoder's attention by GroupQueryAttention, which can update its cache in place.

    k = Concat(past_k, new_k), v likewise   →   y, k, v = GroupQueryAttention(q, new_k, new_v,
    y = Attention(q, k, v, mask)                              past_k, past_v, last, total)

q, the new keys and values, and y are [batch, sequence, heads · size]; rotary embeddings stay before
it. `last` int32 [batch] is the number of a row's tokens minus one, `total` int32 the number of all
positions; both are computed from `attention_mask`. So a row's tokens come first, and its padding
last. If past_k and k are one buffer for the largest number of positions, nothing is copied between
steps (onnxruntime-genai's past_present_share_buffer; required for CUDA graphs).

The mask has to be causal only: no window, no bias.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.names import ATTENTION_MASK, PAST, present_of
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    add_constant,
    graph_input,
    only_user,
    remove_unused,
    replace_uses,
    shared_constant,
)
from loradeploy.export.match.operators import GROUP_QUERY_ATTENTION, MICROSOFT, problem_of

if TYPE_CHECKING:
    import onnx_ir as ir

# The operator's inputs of past keys and values, and its outputs of the present ones.
_PRESENT_OF: Final = {3: 1, 4: 2}
# [batch, sequence, heads, size] ↔ [batch, heads, sequence, size]
_HEADS_FIRST: Final = (0, 2, 1, 3)
# The comparisons of positions in a causal mask: a key's with a query's, and, so that no row is
# empty, a token's with its own. A window or chunks need more.
_CAUSAL: Final = Counter({"LessOrEqual": 1, "Equal": 1})
_COMPARING: Final = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mod", "Where")


@dataclass(frozen=True, eq=False)
class _Cached:
    """New keys or values, the past ones, and the output with both."""

    new: ir.Value
    past: ir.Value
    present: ir.Value


def group_queries(model: ir.Model) -> None:
    """Replace every attention over the cache by GroupQueryAttention.

    Raises:
        ExportError: an attention is not only causal, or has an unknown form.
    """
    graph = model.graph
    if any(node.op_type == GROUP_QUERY_ATTENTION for node in graph):
        return
    attentions = [node for node in graph if node.op_type == "Attention" and node.domain == ""]
    pasts = [value for value in graph.inputs if str(value.name).startswith(PAST)]
    if not pasts or len(attentions) * 2 != len(pasts):
        raise ExportError(
            f'`attention="gqa"`: the graph has {len(attentions)} attentions for'
            f" {len(pasts) // 2} layers of a cache, the others have another form: use"
            ' `attention="standard"`'
        )
    lengths = _lengths(graph)
    for node in attentions:
        _replace(graph, node, *lengths)
    model.opset_imports.setdefault(MICROSOFT, 1)
    remove_unused(graph)
    for value in pasts:
        if any(node.op_type != GROUP_QUERY_ATTENTION for node, _ in value.uses()):
            raise ExportError(f'`attention="gqa"`: {value.name} is used for something else too')


def has_grouped_attention(model: ir.Model) -> bool:
    """Whether any attention is a GroupQueryAttention."""
    return any(node.op_type == GROUP_QUERY_ATTENTION for node in model.graph.all_nodes())


def updates_cache_in_place(model: ir.Model) -> bool:
    """Whether one buffer can be the past and the present of every key and value.

    It can if only a GroupQueryAttention reads the past, and the same node computes the present.
    """
    graph = model.graph
    outputs = {value.name: value for value in graph.outputs}
    pasts = [value for value in graph.inputs if str(value.name).startswith(PAST)]
    for value in pasts:
        present = outputs.get(present_of(str(value.name)))
        uses = [
            (node, index) for node, index in value.uses() if node.op_type == GROUP_QUERY_ATTENTION
        ]
        if present is None or len(uses) != 1 or len(uses) != len(list(value.uses())):
            return False
        node, index = uses[0]
        if index not in _PRESENT_OF or node.outputs[_PRESENT_OF[index]] is not present:
            return False
    return bool(pasts)


def _replace(graph: ir.Graph, node: ir.Node, last: ir.Value, total: ir.Value) -> None:
    import onnx_ir as ir

    query, key, value, mask = (*node.inputs[:4], None, None, None, None)[:4]
    if query is None or mask is None or any(each is not None for each in node.inputs[4:]):
        raise _unfit(node, "has other inputs than a mask")
    problem = problem_of(node)
    if problem is not None:
        raise _unfit(node, f"cannot be converted: {problem}")
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise _unfit(node, "has further outputs that are used")
    _check_mask(node, mask)
    keys, values = _cached(node, key), _cached(node, value)
    heads, size = _sizes(node, query)
    kv_heads, kv_size = _sizes(node, keys.new)
    if _sizes(node, values.new) != (kv_heads, kv_size) or kv_size != size or heads % kv_heads:
        raise _unfit(node, "has keys and values of different sizes")
    flat = [_flat(graph, node, each) for each in (query, keys.new, values.new)]
    numbers: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
    for name in ("scale", "softcap"):
        if name in node.attributes and (number := node.attributes[name].as_float()):
            numbers[name] = number
        elif name == "scale" and name in node.attributes:
            raise _unfit(node, "has a scale of 0")
    y = _merged_heads(node)
    new = ir.node(
        GROUP_QUERY_ATTENTION,
        [*flat, keys.past, values.past, last, total],
        attributes=numbers,
        domain=MICROSOFT,
        num_outputs=3,
        name=f"{node.name}/grouped",
    )
    for output, old in zip(new.outputs, (y, keys.present, values.present), strict=True):
        output.name = f"{old.name}/grouped"
    graph.insert_before(node, new)
    for output, old in zip(new.outputs, (y, keys.present, values.present), strict=True):
        replace_uses(old, output)


def _check_mask(node: ir.Node, mask: ir.Value) -> None:
    import onnx_ir as ir

    found = Counter(op for op in _operators_behind(mask) if op in _COMPARING)
    if mask.dtype not in (None, ir.DataType.BOOL) or found != _CAUSAL:
        raise _unfit(
            node, "has a mask that is more than causal (a window, a bias by distance, or images)"
        )


def _operators_behind(value: ir.Value) -> list[str]:
    """The operators of all nodes that `value` is computed from, each node once."""
    seen: dict[ir.Node, None] = {}
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in seen:
            seen[node] = None
            waiting += [each for each in node.inputs if each is not None]
    return [node.op_type for node in seen]


def _cached(node: ir.Node, value: ir.Value | None) -> _Cached:
    """A layer's cached and new keys or values, which `value` concatenates."""
    concat = None if value is None else value.producer()
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2:
        raise _unfit(node, "does not concatenate its cache with the new keys or values")
    past, new = concat.inputs
    if (
        past is None
        or new is None
        or not past.is_graph_input()
        or not concat.outputs[0].is_graph_output()
    ):
        raise _unfit(node, "does not have its cache as an input and an output of the graph")
    return _Cached(new, past, concat.outputs[0])


def _sizes(node: ir.Node, value: ir.Value) -> tuple[int, int]:
    """The number of heads and their size, of a value [batch, heads, sequence, size]."""
    shape = value.shape
    if shape is None or len(shape) != 4:
        raise _unfit(node, "does not specify the number of its heads")
    heads, size = shape[1], shape[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        raise _unfit(node, "does not specify the number of its heads")
    return heads, size


def _flat(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    """A value [batch, heads, sequence, size] as [batch, sequence, heads · size], before `node`."""
    import onnx_ir as ir

    heads, size = _sizes(node, value)
    assert value.shape is not None
    shape = ir.Shape([value.shape[0], value.shape[2], heads * size])
    source = _unsplit(value)
    if source is not None:
        return source
    maker = value.producer()
    if maker is not None and maker.op_type == "RotaryEmbedding" and maker.inputs[0] is not None:
        source = _unsplit(maker.inputs[0])
        if source is not None:
            if (problem := problem_of(maker)) is not None:
                raise _unfit(node, f"has positions that cannot be converted: {problem}")
            numbers = {name: own for name, own in maker.attributes.items() if name != "num_heads"}
            made = ir.Node(
                maker.domain,
                maker.op_type,
                [source, *maker.inputs[1:]],
                [*numbers.values(), ir.AttrInt64("num_heads", heads)],
                name=f"{maker.name}/flat",
            )
            return _placed(graph, node, made, value, shape)
    transposed = ir.node("Transpose", [value], attributes={"perm": list(_HEADS_FIRST)})
    transposed.name = f"{node.name}/{value.name}/transposed"
    whole = ir.Shape([value.shape[0], value.shape[2], heads, size])
    rest = np.array([0, 0, heads * size], np.int64)
    sizes = shared_constant(graph, f"gqa.{heads * size}", rest)
    joined = ir.node("Reshape", [_placed(graph, node, transposed, value, whole), sizes])
    joined.name = f"{node.name}/{value.name}/flat"
    return _placed(graph, node, joined, value, shape)


def _placed(
    graph: ir.Graph, before: ir.Node, made: ir.Node, like: ir.Value, shape: ir.Shape
) -> ir.Value:
    """Insert the node `made` and return its output, with the type of `like`."""
    output = made.outputs[0]
    output.name, output.type, output.shape = made.name, like.type, shape
    graph.insert_before(before, made)
    return output


def _unsplit(value: ir.Value) -> ir.Value | None:
    """The value that a Reshape and a Transpose split into the heads of `value`, if any."""
    transpose = value.producer()
    if transpose is None or not _swaps_heads(transpose):
        return None
    assert transpose.inputs[0] is not None
    reshape = transpose.inputs[0].producer()
    source = None if reshape is None or reshape.op_type != "Reshape" else reshape.inputs[0]
    return source if source is not None and source.shape and len(source.shape) == 3 else None


def _merged_heads(node: ir.Node) -> ir.Value:
    """The value [batch, sequence, heads · size] that the attention's heads are merged into."""
    value = node.outputs[0]
    transpose = only_user(value)
    if transpose is not None and transpose.op_type == "Reshape":
        same = transpose.outputs[0]  # some exporters reshape to the same shape
        if value.shape is not None and same.shape == value.shape:
            transpose = only_user(same)
    if transpose is not None and _swaps_heads(transpose):
        reshape = only_user(transpose.outputs[0])
        if reshape is not None and reshape.op_type == "Reshape":
            shape = reshape.outputs[0].shape
            if shape is not None and len(shape) == 3:
                return reshape.outputs[0]
    raise _unfit(node, "has heads that are not merged after it")


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == _HEADS_FIRST


def _lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """Compute `last` and `total` at the beginning of the graph."""
    import onnx_ir as ir

    mask = graph_input(graph, ATTENTION_MASK)
    if mask is None:
        raise ExportError(f'`attention="gqa"`: the graph takes no {ATTENTION_MASK}')
    one = add_constant(graph, "gqa.one", np.array([1], np.int64))
    batch = None if mask.shape is None else mask.shape[0]
    begin = graph[0]

    def add(
        op: str, name: str, inputs: list[ir.Value], shape: list[Any], **numbers: int
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes=numbers, name=f"gqa/{name}")
        output = node.outputs[0]
        output.name, output.shape = node.name, ir.Shape(shape)
        output.dtype = ir.DataType.INT32 if op == "Cast" else ir.DataType.INT64
        graph.insert_before(begin, node)
        return output

    int32 = int(ir.DataType.INT32)
    tokens = add("ReduceSum", "tokens", [mask, one], [batch], keepdims=0)
    last = add("Cast", "last", [add("Sub", "before", [tokens, one], [batch])], [batch], to=int32)
    positions = add("Squeeze", "all", [add("Shape", "shape", [mask], [1], start=1)], [])
    return last, add("Cast", "total", [positions], [], to=int32)


def _unfit(node: ir.Node, why: str) -> ExportError:
    return ExportError(f'`attention="gqa"`: {node.name} {why}: use `attention="standard"`')
