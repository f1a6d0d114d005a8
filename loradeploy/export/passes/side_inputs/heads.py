"""Heads as side inputs: y = x W + b becomes y = x W[adapter_ids] + b[adapter_ids].

`M.weight` [adapters, in, out] and `M.bias` [adapters, out] default to the base's own, [1, …].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.manifest import SavedTarget
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import add_constant, constant_of, replace_uses
from loradeploy.export.graph.names import (
    HEAD_ADD,
    HEAD_PRODUCT,
    HEAD_SQUEEZE,
    HEAD_UNSQUEEZE,
    step_name,
)
from loradeploy.export.graph.scopes import linear_scopes
from loradeploy.export.match.linears import Linear
from loradeploy.export.match.whole.biases import has_unclear_bias
from loradeploy.export.match.whole.layouts import annotate_layout, is_conv1d
from loradeploy.export.passes.side_inputs.rows import rows_of
from loradeploy.export.passes.side_inputs.surgery import Surgery

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


def replace_head(surgery: Surgery, linear: Linear, *, with_bias: bool) -> list[SavedTarget]:
    """Make the weight and bias of `linear` side inputs.

    `with_bias`: add a bias of zeros if the graph has none.

    Raises:
        ExportError: the module is called several times, is quantized, or its rows are not known.
    """
    module, graph = linear.module, surgery.graph
    unclear = linear.slice is not None or has_unclear_bias(linear)
    if len(linear.nodes) != 1 or linear.quantized or unclear:
        raise ExportError(f"{module} is used in a way that cannot be a side input: merge instead")
    node, last = linear.nodes[0], _last_of(linear)
    rows = rows_of(graph, node, module)
    if rows.moved:
        raise ExportError(f"{module} flattens its rows and cannot be a side input: merge instead")
    x = rows.x
    numbers = constant_of(linear.weight)
    weight = np.ascontiguousarray(numbers.T if linear.transposed else numbers)[np.newaxis]
    bias = None
    if linear.bias is not None:
        bias = constant_of(linear.bias).reshape(1, -1)
        _free(graph, linear.bias)
    elif with_bias:
        bias = np.zeros((1, linear.out_features), weight.dtype)
    _free(graph, linear.weight)

    W = _parameter(surgery, f"{module}.weight", weight)
    shape = (linear.out_features, linear.in_features)
    conv1d = is_conv1d(linear)
    saved = [
        SavedTarget(
            parameter=f"{module}.weight",
            input=f"{module}.weight",
            shape=shape[::-1] if conv1d else shape,
            transposed=not conv1d,
        )
    ]
    chain = surgery.chain(last, module)
    w = chain.add("Gather", "head_weight_gather", [W, surgery.ids], axis=0)  # [rows, in, out]
    if rows.no_sequence:
        x = chain.add("Unsqueeze", HEAD_UNSQUEEZE, [x, surgery.sequence_axis])  # [batch, 1, in]
    y = chain.add("MatMul", HEAD_PRODUCT, [x, w])  # [batch, sequence, out]
    if bias is not None:
        b = _parameter(surgery, f"{module}.bias", bias)
        saved.append(
            SavedTarget(
                parameter=f"{module}.bias",
                input=f"{module}.bias",
                shape=(linear.out_features,),
                transposed=False,
            )
        )
        b = chain.add("Gather", "head_bias_gather", [b, surgery.ids], axis=0)  # [rows, out]
        b = chain.add("Unsqueeze", "head_bias_unsqueeze", [b, surgery.sequence_axis])
        y = chain.add("Add", HEAD_ADD, [y, b])
    if rows.no_sequence:
        y = chain.add("Squeeze", HEAD_SQUEEZE, [y, surgery.sequence_axis])  # [batch, out]
    replace_uses(last.outputs[0], y)
    for dead in dict.fromkeys((last, node)):
        graph.remove(dead, safe=True)
    return saved


def restore_head(
    graph: ir.Graph, module: str, nodes: Mapping[str, ir.Node], *, conv1d: bool
) -> None:
    """Make the head `module` constant again, with its defaults.

    `conv1d`: whether the checkpoint stores its weight as [in, out].

    Raises:
        ExportError: the graph does not have it as `replace_head` made it.
    """
    import onnx_ir as ir

    product = nodes.get(step_name(module, HEAD_PRODUCT))
    if product is None:
        raise ExportError(f"the graph has no side input at {module}: it was changed")
    unsqueeze, squeeze, add = (
        nodes.get(step_name(module, step)) for step in (HEAD_UNSQUEEZE, HEAD_SQUEEZE, HEAD_ADD)
    )
    first, last = unsqueeze or product, squeeze or add or product
    x = first.inputs[0]
    scopes = linear_scopes(module)
    made: list[ir.Node] = []
    for part, op in (("weight", "MatMul"), ("bias", "Add")):
        name = f"{module}.{part}"
        side_input = graph.initializers.get(name)
        if side_input is None:
            continue
        default = np.ascontiguousarray(constant_of(side_input)[0])
        _free(graph, side_input)
        constant = add_constant(graph, name, default)
        operand = made[-1].outputs[0] if made else x
        node = ir.node(op, [operand, constant], name=f"{module}/{op}", metadata_props=scopes)
        node.outputs[0].name = node.name
        node.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(default.dtype))
        made.append(node)
    if conv1d:
        # The contrary is not recorded: bundles of earlier versions did not know this layout.
        annotate_layout(made[:1], conv1d=True)
    graph.insert_after(last, made)
    shape = last.outputs[0].shape
    for node in made:
        node.outputs[0].shape = shape
    replace_uses(last.outputs[0], made[-1].outputs[0])


def _parameter(surgery: Surgery, name: str, default: NDArray[Any]) -> ir.Value:
    surgery.defaults[name] = default
    return surgery.side_input(name, ["adapters", *default.shape[1:]], default)


def _free(graph: ir.Graph, constant: ir.Value) -> None:
    """Rename the initializer: its name is needed, and other nodes may still use it."""
    graph.initializers.pop(str(constant.name))
    constant.name = f"{constant.name}/replaced"
    graph.register_initializer(constant)


def _last_of(linear: Linear) -> ir.Node:
    """The node that computes the linear's output: its product, or the addition of its bias."""
    node = linear.nodes[0]
    if linear.bias is None or node.op_type == "Gemm":
        return node
    return next(iter(node.outputs[0].uses())).node
