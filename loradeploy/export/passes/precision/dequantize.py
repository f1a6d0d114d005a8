"""Replace the product of a quantized layer by one with float weights.

A classifier's head that is trained whole has float weights. If the base's head is quantized, it
becomes a float layer with the dequantized weights and bias. Neither its input nor its output is
rounded any more, nor limited to the range that was measured on the base's head.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from loradeploy.export.graph.edit import (
    add_constant,
    constant_of,
    free_name,
    input_at,
    only_user,
    remove_unused,
    replace_uses,
)
from loradeploy.export.graph.scopes import linear_scopes
from loradeploy.export.match.integer_scales import scaling_of
from loradeploy.export.match.operators import problem_of
from loradeploy.export.match.products import (
    bias_use,
    input_of,
    output_of,
    own_bias,
    products,
    value_of,
)
from loradeploy.export.match.quantized import INTEGER
from loradeploy.export.match.whole.layouts import layout_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from loradeploy.export.match.linears import Linear
    from loradeploy.export.match.products import Product


def with_float_weight(graph: ir.Graph, linear: Linear) -> Linear:
    """Replace the product of `linear`; return it unchanged if its weight cannot be read."""
    import onnx_ir as ir

    if not linear.quantized or linear.slice is not None or len(linear.nodes) != 1:
        return linear
    (node,) = linear.nodes
    product = next(each for each in products(graph) if each.node is node)
    weight, x, y = _weight(product), input_of(node), output_of(node)
    if weight is None or x is None:
        return linear
    dtype = ir.DataType.FLOAT if x.dtype is None else x.dtype
    name = free_name(graph, f"{linear.module}.weight")
    constant = add_constant(graph, name, weight.astype(dtype.numpy()))
    scopes = linear_scopes(linear.module) | layout_of(node)
    made = [ir.node("MatMul", [x, constant], name=f"{linear.module}/MatMul", metadata_props=scopes)]
    own = own_bias(node)
    if own is not None:
        added = [made[0].outputs[0], _float_bias(graph, node.inputs[own], linear)]
        made.append(ir.node("Add", added, name=f"{linear.module}/Add", metadata_props=scopes))
    for each in made:
        each.outputs[0].name = free_name(graph, f"{each.name}/y")
        each.outputs[0].type, each.outputs[0].shape = ir.TensorType(dtype), y.shape
    last = y.producer()
    assert last is not None
    graph.insert_after(last, made)
    replace_uses(y, made[-1].outputs[0])
    adder = only_user(made[0].outputs[0])
    if own is None and adder is not None and adder.op_type == "Add":
        for index, value in enumerate(adder.inputs):
            adder.replace_input_with(index, _float_bias(graph, value, linear))
        if output_of(adder) is not adder.outputs[0] and bias_use(made[0], linear.out_features):
            replace_uses(output_of(adder), adder.outputs[0])
    remove_unused(graph)  # a bias that was dequantized has the name of the side input
    use = bias_use(made[0], linear.out_features)
    return dataclasses.replace(
        linear,
        nodes=(made[0],),
        weight=constant,
        transposed=False,
        quantized=False,
        bias=None if use is None else value_of(use),
    )


def _float_bias(graph: ir.Graph, value: ir.Value | None, linear: Linear) -> ir.Value | None:
    """The bias of `linear`, as a constant if it is a dequantized one; any other value itself."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or problem_of(node) is not None:
        return value
    held = [input_at(node, index) for index in range(3)]
    given = [None if each is None or each.const_value is None else each for each in held]
    numbers, scale, zero = (None if each is None else constant_of(each) for each in given)
    sizes = (1, linear.out_features)
    if numbers is None or scale is None or numbers.size != linear.out_features:
        return value
    if scale.size not in sizes or (zero is None) != (held[2] is None):
        return value
    offset = np.zeros((), np.float32) if zero is None else zero.reshape(-1).astype(np.float32)
    bias = (numbers.reshape(-1).astype(np.float32) - offset) * scale.reshape(-1)
    return add_constant(
        graph, free_name(graph, f"{linear.module}.bias.float"), bias.astype(scale.dtype)
    )


def _weight(product: Product) -> NDArray[np.float32] | None:
    """The dequantized weight [in, out]; None if it cannot be read."""
    rows = product.rows(list(range(product.out_features)))
    if rows is None:
        return None
    if product.node.op_type == INTEGER:
        scaling = scaling_of(product.node)
        if scaling is None or not scaling.weight:
            return None
        for scale in scaling.weight:
            factors = constant_of(scale).reshape(-1, 1)
            if len(factors) not in (1, product.out_features):
                return None
            rows = rows * factors
    return np.ascontiguousarray(rows.T)
