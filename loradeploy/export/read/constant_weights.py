"""Compute the weights of products that a graph derives from larger constants.

    W = Gather(stack, layer)                   one constant for all layers
    W_q, W_k, W_v = Split(W, sizes)            one constant for several modules
    W = Reshape(Transpose(W'), shape)          a separate axis for heads

An adapter's module is one matrix. So a matrix that is computed from constants only becomes a
separate constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.export.graph.edit import add_constant, constant_of, free_name, remove_unused

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_Arrays = Sequence[Any]  # numpy arrays; None for a missing input
_Known = dict["ir.Value", "NDArray[Any] | None"]
_PRODUCTS: Final = ("Gemm", "MatMul")
_PLAIN: Final = ("Identity", "Transpose")  # allowed between a product and its initializer
_MATRIX: Final = 2


def compute_weights(graph: ir.Graph) -> None:
    """Replace weights that the graph computes from constants only by constants [in, out]."""
    made: dict[ir.Value, ir.Value] = {}
    known: _Known = {}  # values that several weights share are computed once
    for node in list(graph):
        if node.op_type not in _PRODUCTS or node.domain != "" or len(node.inputs) < 2:
            continue
        value = node.inputs[1]
        if value is None or not _is_computed(value):
            continue
        if value not in made:
            numbers = _numbers(value, known)
            if numbers is None or numbers.ndim != _MATRIX or numbers.dtype.kind != "f":
                continue
            made[value] = add_constant(graph, free_name(graph, f"{value.name}.computed"), numbers)
        node.replace_input_with(1, made[value])
    if made:
        remove_unused(graph)


def _is_computed(value: ir.Value) -> bool:
    """Whether the value is computed by a known node that does more than transpose it."""
    while (node := value.producer()) is not None:
        if node.op_type not in _PLAIN:
            return node.op_type in _COMPUTED and node.domain == ""
        source = node.inputs[0]
        if source is None:
            return False
        value = source
    return False


def _numbers(value: ir.Value, known: _Known) -> NDArray[Any] | None:
    """The value, if it is computed from constants only; else None.

    The loop replaces a recursion, because a graph may have any number of steps.
    """
    waiting = [value]
    while waiting:
        last = waiting[-1]
        node = last.producer()
        if last in known:
            waiting.pop()
        elif node is None:
            known[last] = _constant(last)
        elif node.op_type not in _COMPUTED or node.domain != "":
            known[last] = None
        elif missing := [each for each in node.inputs if each is not None and each not in known]:
            waiting += missing
        else:
            inputs = [None if each is None else known[each] for each in node.inputs]
            known[last] = _computed(node, inputs, last.index() or 0)
    numbers = known[value]
    return None if numbers is None else np.ascontiguousarray(numbers)


def _constant(value: ir.Value) -> NDArray[Any] | None:
    if not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    return constant_of(value)


def _computed(node: ir.Node, inputs: _Arrays, output: int) -> NDArray[Any] | None:
    """The output of the node, a view of its inputs if possible."""
    if any(
        each is not None and found is None for each, found in zip(node.inputs, inputs, strict=True)
    ):
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    try:
        results = _COMPUTED[node.op_type](inputs, attributes)
    except (ValueError, IndexError, TypeError):  # a node that onnxruntime would not run either
        return None
    return np.asarray(results[output]) if output < len(results) else None


def _integers(inputs: _Arrays, index: int) -> list[int] | None:
    given = inputs[index] if len(inputs) > index else None
    return None if given is None else [int(number) for number in np.ravel(given)]


def _gather(inputs: _Arrays, given: Mapping[str, Any]) -> list[Any]:
    data, at, axis = inputs[0], inputs[1], given.get("axis", 0)
    if np.ndim(at) == 0 and -data.ndim <= axis < data.ndim:
        return [np.moveaxis(data, axis, 0)[int(at)]]  # a view, where np.take copies
    return [np.take(data, at, axis=axis)]


def _split(inputs: _Arrays, given: Mapping[str, Any]) -> list[Any]:
    sizes, axis = _integers(inputs, 1), given.get("axis", 0)
    if sizes is None:
        raise ValueError("no sizes")
    return np.split(inputs[0], np.cumsum(sizes)[:-1], axis=axis)


def _slice(inputs: _Arrays, given: Mapping[str, Any]) -> list[Any]:
    data, starts, ends = inputs[0], _integers(inputs, 1), _integers(inputs, 2)
    if starts is None or ends is None:
        raise ValueError("no starts or no ends")
    axes = _integers(inputs, 3) or list(range(len(starts)))
    steps = _integers(inputs, 4) or [1] * len(starts)
    spans = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise ValueError("a step below 1")
        spans[axis] = slice(start, end, step)
    return [data[tuple(spans)]]


def _squeeze(inputs: _Arrays, given: Mapping[str, Any]) -> list[Any]:
    axes = _integers(inputs, 1)
    return [np.squeeze(inputs[0], None if axes is None else tuple(axes))]


def _unsqueeze(inputs: _Arrays, given: Mapping[str, Any]) -> list[Any]:
    return [np.expand_dims(inputs[0], tuple(_integers(inputs, 1) or ()))]


def _reshape(inputs: _Arrays, given: Mapping[str, Any]) -> list[Any]:
    data, shape = inputs[0], _integers(inputs, 1)
    if data is None or shape is None or given.get("allowzero"):
        raise ValueError("no data, no shape, or allowzero")
    return [data.reshape([data.shape[at] if n == 0 else n for at, n in enumerate(shape)])]


def _transpose(inputs: _Arrays, given: Mapping[str, Any]) -> list[Any]:
    return [np.transpose(inputs[0], given.get("perm"))]


def _concat(inputs: _Arrays, given: Mapping[str, Any]) -> list[Any]:
    return [np.concatenate(list(inputs), axis=given["axis"])]


_COMPUTED: Final[Mapping[str, Callable[[_Arrays, Mapping[str, Any]], list[Any]]]] = {
    "Concat": _concat,
    "Gather": _gather,
    "Identity": lambda inputs, given: [inputs[0]],
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
