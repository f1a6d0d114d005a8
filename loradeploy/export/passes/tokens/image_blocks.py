"""Let the positions of one image attend to each other in both directions, as in Gemma 3.

    key ≤ query        becomes     (key ≤ query) or (query and key are of the same image)

An image is a run of positions where `inputs_embeds_mask` is true; text separates it from the next
image. Sliding windows and padding restrict this mask like the causal one, as in transformers
(`create_masks_for_vision_model` of Gemma 3). Cached positions are before all queries: an image has
to be read as a whole in one run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.names import ATTENTION_MASK, INPUT_IDS, INPUTS_EMBEDS_MASK
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import add_constant, replace_uses
from loradeploy.export.graph.names import step_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

_BLOCKS = "image_blocks"
_CAUSAL, _ATTENTION, _MASK = "LessOrEqual", "Attention", 3
# Operators that combine boolean masks.
_COMBINES = ("And", "Or", "Unsqueeze", "Expand")


def join_image_blocks(model: ir.Model) -> None:
    """Change the mask of every attention of a decoder's graph, which has `inputs_embeds_mask`.

    Without a feed for that input, the masks are causal as before.

    Raises:
        ExportError: an attention's mask is not a boolean one with a single causal comparison.
    """
    import onnx_ir as ir

    graph = model.graph
    attentions = [node for node in graph if node.op_type == _ATTENTION and node.domain == ""]
    behind = {node: _comparisons(node) for node in attentions}
    if not attentions or any(len(found) != 1 for found in behind.values()):
        raise ExportError(
            "the graph has no attention with one causal mask, which images that are read in both"
            " directions need"
        )
    causal = list(dict.fromkeys(node for found in behind.values() for node in found))
    first = next(node for node in graph if node in causal)
    same = _same_image(graph, first)
    for node in causal:
        seen = node.outputs[0]
        joined = ir.node("Or", [seen, same], name=f"{_BLOCKS}/{node.name}")
        output = joined.outputs[0]
        output.name, output.dtype = joined.name, ir.DataType.BOOL
        graph.insert_after(node, joined)
        replace_uses(seen, output, keep=[joined])
        _give_rows(output, seen.shape, same.shape)


def _comparisons(attention: ir.Node) -> list[ir.Node]:
    """The causal comparisons that are combined in the mask of an attention, each once."""
    found: dict[ir.Node, None] = {}
    mask = attention.inputs[_MASK] if len(attention.inputs) > _MASK else None
    waiting = [mask]
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if node is None:
            continue
        if node.op_type == _CAUSAL:
            found[node] = None
        elif node.op_type in _COMBINES:
            waiting += node.inputs
    return list(found)


def _same_image(graph: ir.Graph, before: ir.Node) -> ir.Value:
    """Whether query and key are of the same image: bool [batch, 1, sequence, total].

    Each position is numbered by the text positions up to it. If a query of an image and a key have
    the same number, all positions between them are of that image, or the key is before the query,
    which the causal mask allows anyway. Cached keys get a number that no query has.
    """
    import onnx_ir as ir

    inputs = {value.name: value for value in graph.inputs}
    ids, whole, mask = (inputs[name] for name in (INPUT_IDS, ATTENTION_MASK, INPUTS_EMBEDS_MASK))
    assert ids.shape is not None and whole.shape is not None
    (batch, sequence), total = ids.shape, whole.shape[1]

    def constant(name: str, numbers: Any) -> ir.Value:
        return add_constant(graph, step_name(_BLOCKS, name), np.array(numbers, np.int64))

    def add(
        op: str,
        name: str,
        given: Sequence[ir.Value],
        shape: Sequence[int | str | ir.SymbolicDim],
        dtype: ir.DataType = ir.DataType.INT64,
        **numbers: int,
    ) -> ir.Value:
        node = ir.node(op, given, attributes=numbers, name=f"{_BLOCKS}/{name}")
        output = node.outputs[0]
        output.name, output.dtype, output.shape = node.name, dtype, ir.Shape(list(shape))
        graph.insert_before(before, node)
        return output

    of_bool = ir.DataType.BOOL
    rows = add("Shape", "rows", [ids], [2])
    places = add("Expand", "places", [mask, rows], [batch, sequence], of_bool)
    is_text = add("Not", "is_text", [places], [batch, sequence], of_bool)
    numbers = add("Cast", "text", [is_text], [batch, sequence], to=int(ir.DataType.INT64))
    texts = add("CumSum", "texts", [numbers, constant("axis", 1)], [batch, sequence])
    all_keys = add("Shape", "all_keys", [whole], [1], start=1, end=2)
    new = add("Shape", "new", [ids], [1], start=1, end=2)
    past = add("Sub", "past", [all_keys, new], [1])
    count = add("Shape", "count", [ids], [1], start=0, end=1)
    sizes = add("Concat", "sizes", [count, past], [2], axis=0)
    cached = add("Expand", "cached", [constant("none", [[-1]]), sizes], [batch, "past"])
    keys = add("Concat", "keys", [cached, texts], [batch, total], axis=1)
    axes = [batch, 1, 1, total]
    of_key = add("Unsqueeze", "of_key", [keys, constant("key_axes", [1, 2])], axes)
    axes = [batch, 1, sequence, 1]
    query_axes = constant("query_axes", [1, 3])
    of_query = add("Unsqueeze", "of_query", [texts, query_axes], axes)
    in_image = add("Unsqueeze", "in_image", [places, query_axes], axes, of_bool)
    axes = [batch, 1, sequence, total]
    equal = add("Equal", "equal", [of_query, of_key], axes, of_bool)
    return add("And", "same", [equal, in_image], axes, of_bool)


def _give_rows(value: ir.Value, seen: ir.Shape | None, same: ir.Shape | None) -> None:
    """Set the shape of `value`, and of the boolean masks computed from it, to one with a batch."""
    import onnx_ir as ir

    assert same is not None
    value.shape = ir.Shape(list(same)) if seen is not None and len(seen) == len(same) else None
    waiting = [value]
    while waiting:
        for node, _ in waiting.pop().uses():
            for output in node.outputs if node.op_type in ("And", "Or") else ():
                output.shape = ir.Shape(list(same)) if value.shape is not None else None
                waiting.append(output)
