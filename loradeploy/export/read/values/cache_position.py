"""Compute the input cache_position of a decoder from its other inputs.

    cache_position [sequence] = past, past + 1, … past + sequence − 1

Exports of transformers 4 have it beside the tokens and the cache, whose sizes determine it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.names import CACHE_POSITION, INPUT_IDS, INPUTS_EMBEDS, PAST, is_cross
from loradeploy.bundle.sample import past_axis
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import shared_constant
from loradeploy.export.graph.file import spec_of

if TYPE_CHECKING:
    import onnx_ir as ir

_LABEL: Final = "loradeploy.cache_position"


def compute_cache_position(graph: ir.Graph) -> None:
    """Replace the input cache_position by nodes that compute it.

    Raises:
        ExportError: its value does not follow from the other inputs.
    """
    import onnx_ir as ir

    inputs = {str(value.name): value for value in graph.inputs}
    position = inputs.get(CACHE_POSITION)
    if position is None or position.dtype is None:
        return
    tokens = inputs.get(INPUT_IDS, inputs.get(INPUTS_EMBEDS))
    past = next((v for n, v in inputs.items() if n.startswith(PAST) and not is_cross(n)), None)
    if tokens is None or position.shape is None or len(position.shape) != 1:
        raise _refused("is not one position for each of the tokens")
    nodes: list[ir.Node] = []

    def add(op: str, name: str, given: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op, given, attributes=attributes, name=f"{_LABEL}/{name}")
        node.outputs[0].name, node.outputs[0].dtype = node.name, ir.DataType.INT64
        nodes.append(node)
        return node.outputs[0]

    def size(value: ir.Value, axis: int, name: str) -> ir.Value:
        at = shared_constant(graph, f"{_LABEL}/axis_{axis}", np.array(axis, np.int64))
        return add("Gather", name, [add("Shape", f"{name}_shape", [value]), at])

    zero, one = (
        shared_constant(graph, f"{_LABEL}/{number}", np.array(number, np.int64))
        for number in (0, 1)
    )
    begin, end = zero, size(tokens, 1, "length")
    if past is not None:
        axis = past_axis(spec_of(past))
        if axis is None or past.shape is None or isinstance(past.shape[axis], int):
            raise _refused("is the place of the tokens in a cache of a fixed size")
        begin = size(past, axis, "past")
        end = add("Add", "end", [begin, end])
    made = add("Range", "range", [begin, end, one])
    if position.dtype != ir.DataType.INT64:
        made = add("Cast", "cast", [made], to=int(position.dtype))
        made.dtype = position.dtype
    made.shape = position.shape
    position.replace_all_uses_with(made)
    graph.inputs.remove(position)
    graph.insert_before(graph[0], nodes)


def _refused(why: str) -> ExportError:
    return ExportError(
        f"the graph's input {CACHE_POSITION} {why}, so that it cannot be computed: export the model"
        " with a cache that grows, or without this input"
    )
