"""Remove computations of sizes from a traced graph where they are not needed.

    Reshape x [batch, sequence, …]     →   Reshape x [0, 0, …], if the sizes stay in their axes
    Expand or Reshape x to its shape   →   x
    0 … total - 1, past … total - 1    →   both minus (total - 1), if they are only compared

Sizes are in the host's memory: nodes that compute with them run on the CPU on every device, and
combining them with data takes a copy, which CUDA graphs cannot have. Without the past length, no
size of a cache is computed, and only the attention uses the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.names import ATTENTION_MASK, INPUT_IDS
from loradeploy.export.graph.edit import (
    constant_of,
    graph_input,
    remove_unused,
    replace_uses,
    shared_constant,
)

if TYPE_CHECKING:
    import onnx_ir as ir

_COMPARES: Final = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
# Operators between positions and their comparison, besides Unsqueeze: they add constants to both.
_SHIFTS: Final = ("Add", "Sub")
_PAST, _SEQUENCE, _TOTAL = "past", "sequence", "total"
# The input whose second dimension is this number of positions.
_COUNTED: Final = {_SEQUENCE: INPUT_IDS, _TOTAL: ATTENTION_MASK}


def fold_sizes(graph: ir.Graph) -> None:
    """Remove computations of sizes that shapes and positions do not need.

    The shapes of values have to be known, with one symbol for sizes that are always equal.
    """
    for node in list(graph):
        if node.op_type not in ("Reshape", "Expand") or node.domain != "":
            continue
        if _keeps_shape(node):
            replace_uses(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]
        elif node.op_type == "Reshape":
            _fix_reshape(graph, node)
    remove_unused(graph)
    _count_from_the_end(graph)
    remove_unused(graph)


def _fix_reshape(graph: ir.Graph, node: ir.Node) -> None:
    """Give a Reshape constant sizes: 0 for an axis that stays, -1 for one unknown size."""
    x, shape, y = node.inputs[0], node.inputs[1], node.outputs[0]
    if x is None or shape is None or _is_constant(shape) or x.shape is None or y.shape is None:
        return
    sizes: list[int] = []
    for axis, size in enumerate(y.shape):
        if isinstance(size, int):
            sizes.append(size)
        elif axis < len(x.shape) and x.shape[axis] == size and size.value is not None:
            sizes.append(0)
        else:
            sizes.append(-1)
    kept_past = any(str(y.shape[axis]) == _PAST for axis, size in enumerate(sizes) if size == 0)
    # -1 cannot be inferred for an empty cache, which has no elements.
    if sizes.count(-1) > 1 or (-1 in sizes and kept_past) or 0 in list(y.shape):
        return
    name = f"shape.{'x'.join(map(str, sizes))}"
    constant = shared_constant(graph, name, np.array(sizes, np.int64))
    node.attributes.pop("allowzero", None)  # 0 means the size of the input's axis
    node.replace_input_with(1, constant)


def _keeps_shape(node: ir.Node) -> bool:
    """Whether the node's output has the shape of its input, which can replace it."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or y.shape is None or len(x.shape) != len(y.shape):
        return False
    if x.is_graph_input() and y.is_graph_output():
        return False
    return all(one == other and _known(one) for one, other in zip(x.shape, y.shape, strict=True))


def _known(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, int) or size.value is not None


def _count_from_the_end(graph: ir.Graph) -> None:
    """Number positions from the last one, if they are only compared with each other.

    Keys are 0 … total - 1 and queries past … total - 1. Minus (total - 1), they are computed
    without the past length.
    """
    keys = dict.fromkeys(_aranges(graph, _TOTAL), _TOTAL)
    queries = dict.fromkeys(_after_past(graph), _SEQUENCE)
    positions = {**keys, **queries}
    if not queries or not _only_compared(positions):
        return
    counted = {size: _from_the_end(graph, size) for size in dict.fromkeys(positions.values())}
    if None in counted.values():
        return
    for value, size in positions.items():
        if (instead := counted[size]) is not None:
            replace_uses(value, instead)


def _aranges(graph: ir.Graph, size: str) -> list[ir.Value]:
    """The values 0, 1, … whose length is the dimension `size`."""
    return [
        node.outputs[0]
        for node in graph
        if node.op_type == "Range"
        and _is_constant(node.inputs[0], 0)
        and _is_constant(node.inputs[2], 1)
        and _dimension(node.outputs[0]) == size
    ]


def _after_past(graph: ir.Graph) -> list[ir.Value]:
    """The values past, past + 1, … of the new positions."""
    found = []
    for value in _aranges(graph, _SEQUENCE):
        for node, _ in value.uses():
            others = [v for v in node.inputs if v is not value]
            if node.op_type == "Add" and len(others) == 1 and _reads(others[0], _PAST):
                found.append(node.outputs[0])
    return found


def _only_compared(positions: Iterable[ir.Value]) -> bool:
    """Whether `positions` are used only in comparisons with each other.

    Constants may be added before: subtracting a number on both sides changes no comparison.
    """
    shifted = dict.fromkeys(positions)
    waiting, comparisons = list(shifted), []
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return False
        for node, index in value.uses():
            if node.op_type in _COMPARES:
                comparisons.append(node)
            elif index == 0 and (
                node.op_type == "Unsqueeze"
                or (node.op_type in _SHIFTS and _is_constant(node.inputs[1]))
            ):
                shifted[node.outputs[0]] = None
                waiting.append(node.outputs[0])
            else:
                return False
    return all(value in shifted for node in comparisons for value in node.inputs)


def _from_the_end(graph: ir.Graph, size: str) -> ir.Value | None:
    """1 - n, …, -1, 0, where n is the dimension `size` of an input, at the start of the graph."""
    import onnx_ir as ir

    source = graph_input(graph, _COUNTED[size])
    if source is None or source.shape is None or str(source.shape[1]) != size:
        return None
    minus_one = ir.tensor(np.array([-1], np.int64))
    axis = shared_constant(graph, "positions.axis", np.array(0, np.int64))
    shape = ir.node("Shape", [source], attributes={"start": 1, "end": 2})
    ones = ir.node("ConstantOfShape", [shape.outputs[0]], attributes={"value": minus_one})
    # Exclusive and reverse: the last position has none after it.
    numbers = {"exclusive": 1, "reverse": 1}
    counted = ir.node("CumSum", [ones.outputs[0], axis], attributes=numbers)
    begin = graph[0]
    for node, name in ((shape, "count"), (ones, "ones"), (counted, "from_the_end")):
        node.name = f"positions.{size}/{name}"
        node.outputs[0].name, node.outputs[0].dtype = node.name, ir.DataType.INT64
        node.outputs[0].shape = ir.Shape([1 if node is shape else size])
        graph.insert_before(begin, node)
    return counted.outputs[0]


def _dimension(value: ir.Value) -> str | None:
    shape = value.shape
    return None if shape is None or len(shape) != 1 else str(shape[0])


def _reads(value: ir.Value | None, size: str) -> bool:
    """Whether `value` is the size with that name, of an input's axis, as a scalar."""
    squeeze = None if value is None else value.producer()
    if squeeze is None or squeeze.op_type not in ("Squeeze", "Reshape"):
        return False
    shape = None if squeeze.inputs[0] is None else squeeze.inputs[0].producer()
    if shape is None or shape.op_type != "Shape" or shape.inputs[0] is None:
        return False
    dims = shape.inputs[0].shape
    start, end = shape.attributes.get("start"), shape.attributes.get("end")
    if dims is None or start is None or end is None:
        return False
    return [str(dim) for dim in list(dims)[start.as_int() : end.as_int()]] == [size]


def _is_constant(value: ir.Value | None, number: int | None = None) -> bool:
    """Whether `value` is a constant, with only the value `number` if that is given."""
    if value is None or value.const_value is None or value.is_graph_input():
        return False
    return number is None or bool((constant_of(value) == number).all())
