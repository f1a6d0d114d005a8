"""Apply nodes that only move values to numpy arrays, with a function for each operator.

Each array represents a value of the graph. Sizes that are unknown without a run are taken from the
arrays, or are those of the node's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.export.graph.edit import attributes_of, constant_of, input_at, is_fixed, source_of
from loradeploy.export.graph.moves import MOVED

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

Arrays = Mapping["ir.Value", "NDArray[np.int64]"]
# Sizes, None for an unknown one.
_Sizes = list[int | None]

_CARRIERS: Final = ("Cast", "Identity")
_MOST_PERMUTED: Final = 1 << 13  # features of a permutation matrix
# Leading axes, of batch and sequence, that a Reshape to unknown sizes is assumed to keep.
_KEPT: Final = 2


class UnknownMoveError(Exception):
    """Where a node moves its values is not known without a run."""


def moved(node: ir.Node, arrays: Arrays) -> list[NDArray[np.int64]]:
    """The arrays of the outputs of a node of `MOVES`.

    Raises:
        UnknownMoveError: the graph does not show where the values are moved.
    """
    x = node.inputs[0]
    if x is None or x not in arrays:
        raise UnknownMoveError
    try:
        return MOVES[node.op_type](node, arrays[x], arrays)
    except (IndexError, TypeError, ValueError) as problem:
        raise UnknownMoveError from problem


def permutation_of(node: ir.Node) -> NDArray[np.int64] | None:
    """The input of each output of a product with a permutation matrix; None for other products."""
    weight = input_at(node, 1)
    if node.op_type != "MatMul" or weight is None or not is_fixed(weight):
        return None
    assert weight.const_value is not None
    shape = weight.const_value.shape.numpy()
    if len(shape) != 2 or shape[0] != shape[1] or not 1 < shape[0] <= _MOST_PERMUTED:
        return None
    matrix = constant_of(weight)
    if np.count_nonzero(matrix[0]) != 1:
        return None
    used = matrix != 0
    if (used.sum(0) != 1).any() or (used.sum(1) != 1).any() or (matrix[used] != 1).any():
        return None
    return np.asarray(used.argmax(0), np.int64)


def _plain(node: ir.Node, x: NDArray[np.int64], arrays: Arrays) -> list[NDArray[np.int64]]:
    rest = range(1, len(node.inputs))
    inputs = [None if node.inputs[n] is None else _constant(node, n) for n in rest]
    return MOVED[node.op_type](x, inputs, attributes_of(node), len(node.outputs))


def _gather_nd(node: ir.Node, x: NDArray[np.int64], arrays: Arrays) -> list[NDArray[np.int64]]:
    if _integer(node, "batch_dims", 0):
        raise UnknownMoveError
    return [x[tuple(np.moveaxis(_constant(node, 1), -1, 0))]]


def _concat(node: ir.Node, x: NDArray[np.int64], arrays: Arrays) -> list[NDArray[np.int64]]:
    if any(value not in arrays for value in node.inputs):
        raise UnknownMoveError
    others = [arrays[value] for value in node.inputs[1:] if value is not None]
    return MOVED[node.op_type](x, others, attributes_of(node), len(node.outputs))


def _flatten(node: ir.Node, x: NDArray[np.int64], arrays: Arrays) -> list[NDArray[np.int64]]:
    axis = _integer(node, "axis", 1) % (x.ndim + 1)
    return [x.reshape(int(np.prod(x.shape[:axis])), -1)]


def _reshape(node: ir.Node, x: NDArray[np.int64], arrays: Arrays) -> list[NDArray[np.int64]]:
    sizes = _sizes(input_at(node, 1), arrays)
    if sizes is None:
        shape = node.outputs[0].shape
        if shape is None:
            raise UnknownMoveError
        sizes = [dim if isinstance(dim, int) else None for dim in shape]
    # Unknown sizes are those of the batch and the sequence, whose axes stay in place.
    kept = [
        x.shape[axis] if size == 0 or (size is None and axis < _KEPT) else size
        for axis, size in enumerate(sizes)
    ]
    return [x.reshape([-1 if size is None else size for size in kept])]


# Operators that only move values.
MOVES: Final[
    Mapping[str, Callable[[ir.Node, NDArray[np.int64], Arrays], list[NDArray[np.int64]]]]
] = {
    **dict.fromkeys(MOVED, _plain),
    "Concat": _concat,
    "Flatten": _flatten,
    "GatherND": _gather_nd,
    "Reshape": _reshape,
}


_ARITHMETIC: Final = {
    "Add": np.add,
    "Div": np.floor_divide,
    "Mul": np.multiply,
    "Sub": np.subtract,
}


def _sizes(value: ir.Value | None, arrays: Arrays) -> _Sizes | None:
    """The sizes in a value of the graph, such as the shape of a Reshape; None if unknown."""
    if value is None:
        return None
    if is_fixed(value):
        return [int(size) for size in constant_of(value).reshape(-1)]
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Concat":
        parts = [_sizes(part, arrays) for part in node.inputs]
        known = [part for part in parts if part is not None]
        return list(chain.from_iterable(known)) if len(known) == len(parts) else None
    if node.op_type in (*_CARRIERS, "Reshape", "Squeeze", "Unsqueeze"):
        return _sizes(node.inputs[0], arrays)
    if node.op_type == "Shape" and node.inputs[0] is not None:
        shape = _shape_of(node.inputs[0], arrays)
        end = node.attributes.get("end")
        start = _integer(node, "start", 0)
        return None if shape is None else shape[start : None if end is None else end.as_int()]
    if node.op_type in ("Gather", "Slice"):
        sizes = _sizes(node.inputs[0], arrays)
        if sizes is None:  # one unknown size
            return [None] if node.op_type == "Gather" and _constant(node, 1).size == 1 else None
        places = MOVES[node.op_type](node, np.arange(len(sizes)), {})[0].reshape(-1)
        return [sizes[place] for place in places]
    if node.op_type in _ARITHMETIC:
        one, other = (_sizes(value, arrays) for value in node.inputs)
        if one is None or other is None or len(one) != 1 or None in (*one, *other):
            raise UnknownMoveError  # the result is not the size of the batch or the sequence
        return [int(size) for size in _ARITHMETIC[node.op_type](np.array(one), np.array(other))]
    return None


def _shape_of(value: ir.Value, arrays: Arrays) -> _Sizes | None:
    if value in arrays:
        return list(arrays[value].shape)
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else None for dim in value.shape]


def _constant(node: ir.Node, index: int) -> NDArray[Any]:
    value = source_of(input_at(node, index), _CARRIERS)
    if value is None or not is_fixed(value):
        raise UnknownMoveError
    return constant_of(value)


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
