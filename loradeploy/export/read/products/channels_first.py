"""Rewrite linear layers whose input has the features before the positions as products x W.

    Conv    x [batch, in, …], W [out, in, 1, …], b   →   MatMul, and Add of b
    MatMul  W [out, in] x […, in, positions]         →   MatMul

each between two Transposes. Converters for some accelerators write layers in this form. Only those
that are a matrix in an adapter or the checkpoint are rewritten: a convolution takes other adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.base_files import base_tensors
from loradeploy.export.graph.edit import (
    add_constant,
    constant_of,
    free_name,
    name_of,
    replace_uses,
    source_of,
)
from loradeploy.export.match.modules.naming import module_of
from loradeploy.export.match.operators import check_operators

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter

# Whether a module (None if its name is not known) is a matrix with these outputs and inputs.
IsMatrix = Callable[[str | None, int, int], bool]

_WEIGHT: Final = ".weight"
# Operators that may be between the weight of a product and its initializer.
_CARRIERS: Final = ("Cast", "DequantizeLinear", "Identity", "Transpose")


def matrices_of(adapters: Iterable[Adapter], checkpoint: Path | None) -> IsMatrix:
    """Recognize matrices by the shapes of the checkpoint, or by the factors of an adapter.

    Raises:
        ModelError: the checkpoint cannot be read.
    """
    targeted = {
        (module, pair.B.shape[0], pair.A.shape[1])
        for adapter in adapters
        for module, pair in adapter.factors.items()
        if pair.kind == "linear"
    }
    tensors = {} if checkpoint is None else base_tensors(checkpoint)
    stored = {
        name.removesuffix(_WEIGHT): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.endswith(_WEIGHT)
    }
    shapes = {frozenset(shape) for shape in stored.values() if len(shape) == 2}

    def is_matrix(module: str | None, out: int, into: int) -> bool:
        if module in stored:
            return stored[module] in ((out, into), (into, out))
        return (module, out, into) in targeted or frozenset((out, into)) in shapes

    return is_matrix


def features_last(graph: ir.Graph, is_matrix: IsMatrix) -> None:
    """Rewrite every such Conv and MatMul as a product x W."""
    for node in list(graph):
        if node.domain != "" or node.op_type not in ("Conv", "MatMul"):
            continue
        at = 0 if node.op_type == "MatMul" else 1
        weight, x = node.inputs[at], node.inputs[1 - at]
        matrix = None if weight is None else _matrix(node, weight)
        if x is None or x.shape is None or weight is None or matrix is None:
            continue
        rank, source = len(x.shape), source_of(x, _CARRIERS)
        if rank < (2 if at == 0 else 3) or (source is not None and source.is_initializer()):
            continue
        found = module_of(node)
        if not is_matrix(None if found is None else found[0], *matrix.shape):
            continue
        check_operators(name_of(node), [node])
        # The axis of features goes to the end, and back.
        axes = list(range(rank))
        order = [*axes[:-2], rank - 1, rank - 2] if at == 0 else [0, *axes[2:], 1]
        _to_product(graph, node, x, weight, matrix, order)


def _to_product(
    graph: ir.Graph,
    node: ir.Node,
    x: ir.Value,
    weight: ir.Value,
    matrix: NDArray[Any],
    order: Sequence[int],
) -> None:
    """Change `node` to a MatMul of x, with its axes in `order`, and the transposed `matrix`."""
    import onnx_ir as ir

    bias = node.inputs[2] if len(node.inputs) > 2 else None
    first = _transpose(f"{name_of(node)}/features_last", x, order)
    graph.insert_before(node, first)
    turned = np.ascontiguousarray(matrix.T)
    constant = add_constant(graph, free_name(graph, f"{weight.name}.matrix"), turned)
    node.resize_inputs(2)
    node.replace_input_with(0, first.outputs[0])
    node.replace_input_with(1, constant)
    node.attributes.clear()
    node.op_type = "MatMul"
    y = node.outputs[0]
    made = y
    behind: list[ir.Node] = []
    if bias is not None:
        add = ir.node("Add", [y, bias], name=f"{name_of(node)}/bias")
        made = add.outputs[0]
        made.name = add.name
        behind.append(add)
    back = [order.index(axis) for axis in range(len(order))]
    last = _transpose(f"{name_of(node)}/features_first", made, back)
    graph.insert_after(node, [*behind, last])
    replace_uses(y, last.outputs[0], keep=[*behind, last])
    if (whole := last.outputs[0].shape) is not None:
        y.shape = made.shape = ir.Shape([whole[axis] for axis in order])
    made.type = y.type


def _transpose(name: str, value: ir.Value, order: Sequence[int]) -> ir.Node:
    import onnx_ir as ir

    node = ir.node("Transpose", [value], attributes={"perm": list(order)}, name=name)
    out = node.outputs[0]
    out.name, out.type = name, value.type
    if value.shape is not None:
        out.shape = ir.Shape([value.shape[axis] for axis in order])
    return node


def _matrix(node: ir.Node, weight: ir.Value) -> NDArray[Any] | None:
    """The weight [out, in] of a MatMul from the left, or of a convolution with kernel size 1."""
    if not weight.is_initializer() or weight.is_graph_input() or weight.const_value is None:
        return None
    if weight.dtype is None or not weight.dtype.is_floating_point():
        return None
    shape = tuple(int(size) for size in weight.const_value.shape.numpy())
    if node.op_type == "MatMul":
        return constant_of(weight) if len(shape) == 2 else None
    if len(shape) < 3 or any(size != 1 for size in shape[2:]) or not _is_plain(node):
        return None
    return constant_of(weight).reshape(shape[:2])


def _is_plain(conv: ir.Node) -> bool:
    """Whether the convolution has one group, strides of 1 and no padding."""
    attributes = conv.attributes
    group = attributes["group"].as_int() if "group" in attributes else 1
    strides = attributes["strides"].as_ints() if "strides" in attributes else ()
    pads = attributes["pads"].as_ints() if "pads" in attributes else ()
    return group == 1 and all(stride == 1 for stride in strides) and not any(pads)
