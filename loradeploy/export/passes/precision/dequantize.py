"""Replace the product of a quantized layer by one with float weights.

A classifier's head that is trained whole has float weights. If the base's head is quantized, it
becomes a float layer with the dequantized weights, and its input is not rounded any more.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from loradeploy.export.graph.edit import add_constant, constant_of, free_name, replace_uses
from loradeploy.export.graph.scopes import linear_scopes
from loradeploy.export.match.integer_scales import scaling_of
from loradeploy.export.match.products import (
    bias_use,
    input_of,
    output_of,
    own_bias,
    products,
    value_of,
)
from loradeploy.export.match.quantized import INTEGER

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
    scopes = linear_scopes(linear.module)
    made = [ir.node("MatMul", [x, constant], name=f"{linear.module}/MatMul", metadata_props=scopes)]
    own = own_bias(node)
    if own is not None:
        added = [made[0].outputs[0], node.inputs[own]]
        made.append(ir.node("Add", added, name=f"{linear.module}/Add", metadata_props=scopes))
    for each in made:
        each.outputs[0].name = free_name(graph, f"{each.name}/y")
        each.outputs[0].type, each.outputs[0].shape = ir.TensorType(dtype), y.shape
    last = y.producer()
    assert last is not None
    graph.insert_after(last, made)
    replace_uses(y, made[-1].outputs[0])
    use = bias_use(made[0], linear.out_features)
    return dataclasses.replace(
        linear,
        nodes=(made[0],),
        weight=constant,
        transposed=False,
        quantized=False,
        bias=None if use is None else value_of(use),
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
