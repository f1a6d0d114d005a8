"""Rewrite scaled, transposed and fused products as MatMul, Gemm and Add.

    Gemm         α x W + β C        →   Gemm x (α W) + (β C) for C [out]; Add for any other C
    FusedGemm    act(α x W + β C)   →   the same, and act after it
    FusedMatMul  α x W              →   MatMul x W, and Mul by α after it
    either, of xᵀ                   →   Transpose, and the same of x
    Einsum       bsi,io->bso        →   MatMul x W; for bsi,oi->bso with Wᵀ as a constant

The rest of the export supports only y = x W + b, without factors of the product or the bias. The
results of the graph stay the same, up to the rounding of α W. onnxruntime's optimizer fuses a layer
and a Mul or Div before or after it into a FusedMatMul (MatMulScaleFusion), whose α also scales an
adapter's update. This is right if W is the checkpoint's matrix, which a name alone does not prove:
another tool may have divided W by α. Such a product is marked (`SCALE`).
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    add_constant,
    constant_of,
    free_name,
    integer_of,
    is_fixed,
    name_of,
    number_of,
    replace_uses,
    source_of,
)
from loradeploy.export.match.operators import MICROSOFT, check_operators, problem_of
from loradeploy.export.match.own_factors import SCALED

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

# Metadata of a product that had an α: its value.
SCALE: Final = "loradeploy.alpha"
# Nodes that may be between the initializer of a float weight and the product.
_CARRIERS: Final = ("Cast", "Identity", "Transpose")
# Activations of FusedGemm without parameters.
_ACTIVATIONS: Final = ("Relu", "Sigmoid", "Tanh")
# Equations of x W: the other axes of x, its last axis, the matrix's two axes, the output's last.
_LINEAR: Final = re.compile(r"(\.\.\.|[A-Za-z]+)([A-Za-z]),([A-Za-z])([A-Za-z])->\1([A-Za-z])")
# Floats of fewer bytes are rounded when they are scaled, except by a power of two.
_EXACT_BYTES: Final = 4


def normalize_products(graph: ir.Graph) -> None:
    """Rewrite every Gemm and FusedMatMul with a constant weight that is not y = x W + b.

    Products that cannot be rewritten stay unchanged, and cannot take adapters.

    Raises:
        ExportError: a FusedMatMul with a constant weight has an input or attribute that is unknown.
    """
    for node in list(graph):
        if node.op_type == "FusedGemm" and node.domain == MICROSOFT:
            _separate_activation(graph, node)
        if node.op_type == "Gemm" and node.domain == "":
            _to_standard_gemm(graph, node)
        elif node.op_type == "FusedMatMul" and node.domain == MICROSOFT:
            _to_standard_matmul(graph, node)
        elif node.op_type == "Einsum" and node.domain == "":
            _einsum_to_matmul(graph, node)


def _einsum_to_matmul(graph: ir.Graph, node: ir.Node) -> None:
    """Replace an Einsum that is x W with a constant matrix by a MatMul."""
    equation = node.attributes["equation"].as_string().replace(" ", "")
    found = _LINEAR.fullmatch(equation)
    weight = _weight(node.inputs[1]) if found is not None and len(node.inputs) == 2 else None
    if found is None or weight is None or len(weight.shape) != 2:
        return
    front, into, rows, columns, out = found.groups()
    if into == out or into in front or out in front or {rows, columns} != {into, out}:
        return
    if _is_broadcast(node.inputs[0], weight.shape[columns == into]):
        return
    if rows == out:
        node.replace_input_with(1, _separate_weight(graph, node, np.ascontiguousarray(weight.T)))
    node.attributes.clear()
    node.op_type = "MatMul"


def _is_broadcast(x: ir.Value | None, size: int) -> bool:
    """Whether x's last axis and the weight's `size` may be broadcast, which MatMul refuses."""
    given = None if x is None or not x.shape else x.shape[-1]
    return given != size if isinstance(given, int) else size == 1


def _separate_activation(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a FusedGemm by a Gemm and its activation."""
    import onnx_ir as ir

    attribute = node.attributes.get("activation")
    activation = None if attribute is None else attribute.as_string()
    if activation not in _ACTIVATIONS or problem_of(node) or not _is_constant(node.inputs[1]):
        return
    node.attributes.pop("activation")
    node.op_type, node.domain = "Gemm", ""
    y = node.outputs[0]
    act = ir.node(activation, [y], name=f"{name_of(node)}/{activation}")
    act.outputs[0].name = act.name
    graph.insert_after(node, act)
    replace_uses(y, act.outputs[0], keep=[act])


def _to_standard_gemm(graph: ir.Graph, node: ir.Node) -> None:
    alpha, beta = number_of(node, "alpha"), number_of(node, "beta")
    transposed, addend = (
        integer_of(node, "transA"),
        node.inputs[2] if len(node.inputs) > 2 else None,
    )
    standard_addend = addend is None or _is_bias(node, addend) or _comes_quantized(addend)
    if not _is_constant(node.inputs[1]) or (
        alpha == 1 and beta == 1 and not transposed and standard_addend
    ):
        return
    weight = _weight(node.inputs[1]) if alpha != 1 else None
    x = node.inputs[0]
    if alpha != 1 and (weight is None or not _scales(weight, alpha)):
        return
    if transposed and (x is None or x.shape is None):
        return
    check_operators(name_of(node), [node])
    if weight is not None:
        _scale_weight(graph, node, weight, alpha)
        node.metadata_props[SCALE] = str(alpha)
    if transposed:
        _transpose_input(graph, node)
    if addend is not None and not (beta == 1 and standard_addend):
        _to_standard_addend(graph, node, addend, beta)
    for name in ("alpha", "beta", "transA"):
        node.attributes.pop(name, None)


def _to_standard_matmul(graph: ir.Graph, node: ir.Node) -> None:
    alpha, weight = number_of(node, "alpha"), _weight(node.inputs[1])
    x = node.inputs[0]
    if weight is None or len(weight.shape) != 2:
        return
    transposed = integer_of(node, "transA")
    if transposed and (x is None or x.shape is None or len(x.shape) < 2):
        return
    check_operators(name_of(node), [node])
    if integer_of(node, "transB"):
        node.replace_input_with(1, _separate_weight(graph, node, np.ascontiguousarray(weight.T)))
    if alpha != 1:
        _scale_output(graph, node, alpha, weight.dtype)
        node.metadata_props[SCALE] = str(alpha)
    if transposed:
        _transpose_input(graph, node)
    node.attributes.clear()
    node.op_type, node.domain = "MatMul", ""


def _scale_weight(graph: ir.Graph, node: ir.Node, weight: NDArray[Any], alpha: float) -> None:
    scaled = weight.astype(np.float32) * np.float32(alpha)
    node.replace_input_with(1, _separate_weight(graph, node, scaled.astype(weight.dtype)))


def _scale_output(graph: ir.Graph, node: ir.Node, factor: float, kind: np.dtype[Any]) -> None:
    """Multiply the node's output by `factor`, in the dtype `kind`, for all users."""
    import onnx_ir as ir

    y = node.outputs[0]
    constant = free_name(graph, f"{name_of(node)}.alpha")
    scale = add_constant(graph, constant, np.array(factor, kind))
    mul = ir.node("Mul", [y, scale], name=f"{name_of(node)}{SCALED}")
    mul.outputs[0].name = mul.name
    graph.insert_after(node, mul)
    replace_uses(y, mul.outputs[0], keep=[mul])


def _separate_weight(graph: ir.Graph, node: ir.Node, numbers: NDArray[Any]) -> ir.Value:
    """A new weight for the node, because other nodes may share the old one."""
    value: ir.Value | None = node.inputs[1]
    while value is not None and (carrier := value.producer()) is not None:
        value = carrier.inputs[0]
    assert value is not None
    return add_constant(graph, free_name(graph, f"{value.name}.plain"), numbers)


def _transpose_input(graph: ir.Graph, node: ir.Node) -> None:
    """Insert a Transpose of the last two axes before the node's input."""
    import onnx_ir as ir

    x = node.inputs[0]
    assert x is not None and x.shape is not None
    order = list(range(len(x.shape)))
    order[-2:] = order[:-3:-1]
    transpose = ir.node(
        "Transpose", [x], attributes={"perm": order}, name=f"{name_of(node)}/transposed"
    )
    transposed = transpose.outputs[0]
    transposed.name, transposed.type = transpose.name, x.type
    transposed.shape = ir.Shape([x.shape[axis] for axis in order])
    graph.insert_before(node, transpose)
    node.replace_input_with(0, transposed)


def _to_standard_addend(graph: ir.Graph, node: ir.Node, addend: ir.Value, beta: float) -> None:
    """Make C a constant [out], or else add it after the product."""
    import onnx_ir as ir

    node.replace_input_with(2, None)
    if beta == 0:
        return
    if is_fixed(addend):
        numbers, size = constant_of(addend), _outputs(node)
        flat = numbers.size in (1, size) and numbers.size == (numbers.shape or (1,))[-1]
        scaled = (numbers.astype(np.float32) * np.float32(beta)).astype(numbers.dtype)
        if flat:
            scaled = np.ascontiguousarray(np.broadcast_to(scaled.reshape(-1), (size,)))
        addend = add_constant(graph, free_name(graph, f"{addend.name}.plain"), scaled)
        if flat:
            node.replace_input_with(2, addend)
            return
    elif beta != 1:
        kind = np.float32 if addend.dtype is None else addend.dtype.numpy()
        factor = add_constant(
            graph, free_name(graph, f"{name_of(node)}.beta"), np.array(beta, kind)
        )
        scale = ir.node("Mul", [addend, factor], name=f"{name_of(node)}{SCALED}")
        scaled_addend = scale.outputs[0]
        scaled_addend.name, scaled_addend.type = scale.name, addend.type
        scaled_addend.shape = addend.shape
        graph.insert_before(node, scale)
        addend = scaled_addend
    y = node.outputs[0]
    add = ir.node("Add", [y, addend], name=f"{name_of(node)}/added")
    add.outputs[0].name = add.name
    graph.insert_after(node, add)
    replace_uses(y, add.outputs[0], keep=[add])


def _is_bias(node: ir.Node, addend: ir.Value) -> bool:
    """Whether C is a constant [out]."""
    return is_fixed(addend) and constant_of(addend).shape == (_outputs(node),)


def _comes_quantized(value: ir.Value) -> bool:
    """Whether C is a quantized constant, which is kept."""
    node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear" and _is_constant(value)


def _weight(value: ir.Value | None) -> NDArray[Any] | None:
    """The values of a product's input, if it is a constant of floats."""
    steps = []
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in _CARRIERS or node.domain != "":
            return None
        steps.append(node)
        value = node.inputs[0]
    if not is_fixed(value):
        return None
    numbers = constant_of(value)
    if value.dtype is None or not value.dtype.is_floating_point():
        return None
    for node in reversed(steps):
        check_operators(name_of(node), [node])
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            numbers = numbers.transpose(None if perm is None else perm.as_ints())
        elif node.op_type == "Cast":
            numbers = numbers.astype(_dtype(node))
    return numbers


def _dtype(cast: ir.Node) -> np.dtype[Any]:
    import onnx_ir as ir

    return ir.DataType(cast.attributes["to"].as_int()).numpy()


def _is_constant(value: ir.Value | None) -> bool:
    """Whether a product's weight is a constant, of floats or of dequantized integers."""
    return is_fixed(source_of(value, (*_CARRIERS, "DequantizeLinear")))


def _scales(weight: NDArray[Any], alpha: float) -> bool:
    """Whether scaling `weight` loses no more than the rounding of float32."""
    if weight.dtype.itemsize >= _EXACT_BYTES or alpha == 1:
        return True
    scaled = weight.astype(np.float32) * np.float32(alpha)
    stored = scaled.astype(weight.dtype).astype(np.float32)
    return abs(math.frexp(alpha)[0]) == 0.5 and bool((stored == scaled).all())


def _outputs(node: ir.Node) -> int:
    """The number of outputs of the Gemm."""
    y = node.outputs[0].shape
    if y is not None and isinstance(y[-1], int):
        return y[-1]
    value = node.inputs[1]
    transposed = integer_of(node, "transB")
    while value is not None and (carrier := value.producer()) is not None:
        transposed ^= carrier.op_type == "Transpose"
        value = carrier.inputs[0]
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        raise ExportError(f"{name_of(node)}: the graph does not specify the size of its outputs")
    return int(value.const_value.shape.numpy()[0 if transposed else 1])
