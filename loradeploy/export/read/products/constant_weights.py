"""Compute the weights of products that a graph derives from larger constants.

    W = Gather(stack, layer)                   one constant for all layers
    W_q, W_k, W_v = Split(W, sizes)            one constant for several modules
    W = Reshape(Transpose(W'), shape)          a separate axis for heads
    W = (Cast(integers) - zero) * scale        dequantized by arithmetic
    W [1, in, out]                             an axis for the batch

An adapter's module is one matrix. So a matrix that is computed from constants only becomes a
separate constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.export.graph.edit import (
    add_constant,
    attributes_of,
    constant_of,
    free_name,
    is_fixed,
    remove_unused,
)
from loradeploy.export.graph.moves import MOVED, Attributes, Inputs, Move

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_Known = dict["ir.Value", "NDArray[Any] | None"]
_PRODUCTS: Final = ("Gemm", "MatMul")
# Allowed between a product and its initializer.
_PLAIN: Final = ("Cast", "Identity", "Transpose")
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
            numbers = _as_matrix(_numbers(value, known), node.inputs[0])
            if numbers is None or numbers.dtype.kind != "f":
                continue
            made[value] = add_constant(graph, free_name(graph, f"{value.name}.computed"), numbers)
        node.replace_input_with(1, made[value])
    if made:
        remove_unused(graph)


def _as_matrix(numbers: NDArray[Any] | None, x: ir.Value | None) -> NDArray[Any] | None:
    """The weight of a product of `x` without axes of one before its last two; None if it has more.

    The product has as many axes as before, because `x` has as many as the weight.
    """
    if numbers is None or numbers.ndim == _MATRIX:
        return numbers
    shape = None if x is None else x.shape
    if shape is None or not _MATRIX < numbers.ndim <= len(shape) or max(numbers.shape[:-2]) != 1:
        return None
    return numbers.reshape(numbers.shape[-2:])


def _is_computed(value: ir.Value) -> bool:
    """Whether the value is no matrix, or is computed by a node that does more than pass it on."""
    while (node := value.producer()) is not None:
        if node.op_type not in _PLAIN:
            return node.op_type in _COMPUTED and node.domain == ""
        source = node.inputs[0]
        if source is None:
            return False
        value = source
    tensor = value.const_value
    if tensor is None or value.is_graph_input():
        return False
    return len(tensor.shape) > _MATRIX and max(tensor.shape.numpy()[:-2]) == 1


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
    return constant_of(value) if is_fixed(value) else None


def _computed(node: ir.Node, inputs: Inputs, output: int) -> NDArray[Any] | None:
    """The output of the node, a view of its inputs if possible."""
    if any(
        each is not None and found is None for each, found in zip(node.inputs, inputs, strict=True)
    ):
        return None
    x, *rest = inputs
    if x is None:
        return None
    try:
        with np.errstate(all="ignore"):
            results = _COMPUTED[node.op_type](x, rest, attributes_of(node), len(node.outputs))
    except (ValueError, IndexError, TypeError):  # a node that onnxruntime would not run either
        return None
    return np.asarray(results[output]) if output < len(results) else None


def _identity(x: Any, rest: Inputs, given: Attributes, outputs: int) -> list[Any]:
    return [x]


def _reshape(x: Any, rest: Inputs, given: Attributes, outputs: int) -> list[Any]:
    (sizes,) = rest
    if sizes is None or given.get("allowzero"):
        raise ValueError("no shape, or allowzero")
    shape = [int(size) for size in np.ravel(sizes)]
    return [x.reshape([x.shape[at] if n == 0 else n for at, n in enumerate(shape)])]


def _arithmetic(operation: Callable[..., Any]) -> Move:
    def compute(x: Any, rest: Inputs, given: Attributes, outputs: int) -> list[Any]:
        if x.dtype.kind != "f":
            raise TypeError("integers, which numpy divides to floats")
        return [operation(x, *rest)]

    return compute


def _cast(x: Any, rest: Inputs, given: Attributes, outputs: int) -> list[Any]:
    import onnx_ir as ir

    dtype = ir.DataType(given["to"]).numpy()
    if dtype.kind != "f" or x.dtype.kind not in "fiu":
        raise TypeError("not a cast of numbers to floats")
    return [x.astype(dtype)]


def _where(x: Any, rest: Inputs, given: Attributes, outputs: int) -> list[Any]:
    chosen, other = rest
    return [np.where(x, chosen, other)]  # type: ignore[arg-type]


_COMPUTED: Final[Mapping[str, Move]] = {
    **MOVED,
    "Add": _arithmetic(np.add),
    "Cast": _cast,
    "Div": _arithmetic(np.divide),
    "Identity": _identity,
    "Mul": _arithmetic(np.multiply),
    "Reshape": _reshape,
    "Sub": _arithmetic(np.subtract),
    "Where": _where,
}
