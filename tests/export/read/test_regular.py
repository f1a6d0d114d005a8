"""What exporters write in several ways is written in one, on the smallest graphs that show it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from loradeploy.export.match.linears import find_linears
from loradeploy.export.read.regular import (
    close_inputs,
    complete_shapes,
    drop_identities,
    lift_constants,
)
from tests.export.graphs import IN, OUT, Builder, linear, numbers, ops, run


def test_constants_of_nodes_become_initializers() -> None:
    b = Builder()
    x = b.input("x", ["batch", IN])
    tensor = ir.tensor(numbers(IN, OUT), name="w")
    w = b.node("Constant", [], [IN, OUT], name="w", value=tensor)
    model = b.model(b.node("MatMul", [x, w], ["batch", OUT], module="m", name="y"))
    assert find_linears(model).linears == {}
    lift_constants(model)
    assert ops(model) == ["MatMul"]
    assert list(find_linears(model).linears) == ["m"]
    rows = numbers(2, IN)
    np.testing.assert_allclose(run(model, {"x": rows}), rows @ tensor.numpy(), atol=1e-5)


def test_a_constant_behind_identities_is_used_as_it_is() -> None:
    b = Builder()
    x, w = b.input("x", ["batch", IN]), b.weight("w", IN, IN)
    again = b.node("Identity", [b.node("Identity", [w], [IN, IN])], [IN, IN])
    y = b.node("MatMul", [b.node("MatMul", [x, w], None), again], None)
    model = b.model(b.node("Identity", [y], ["batch", IN], name="out"))
    rows = numbers(2, IN)
    before = run(model, {"x": rows})
    drop_identities(model)
    # What gives the graph's output is no constant, and stays.
    assert ops(model) == ["MatMul", "MatMul", "Identity"]
    assert [node.inputs[1] for node in list(model.graph)[:2]] == [w, w]
    np.testing.assert_array_equal(run(model, {"x": rows}), before)


def test_an_identity_that_gives_an_output_stays() -> None:
    b = Builder()
    b.input("x", ["batch", IN])
    model = b.model(b.node("Identity", [b.weight("w", IN, IN)], [IN, IN], name="y"))
    drop_identities(model)
    assert ops(model) == ["Identity"]
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_shapes_are_inferred_where_a_product_lacks_its_own() -> None:
    b = Builder()
    x = b.input("x", ["batch", 3, IN])
    h = b.node("Tanh", [x], None, name="h")
    model = b.model(b.node("MatMul", [h, b.weight("w", IN, OUT)], None, module="m", name="y"))
    complete_shapes(model)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert [str(size) for size in product.inputs[0].shape] == ["batch", "3", str(IN)]


def test_a_weight_that_is_an_input_too_becomes_a_constant() -> None:
    model = linear()
    w = model.graph.initializers["w"]
    model.graph.inputs.append(w)
    close_inputs(model)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert list(model.graph.initializers) == ["w"]
    assert list(find_linears(model).linears) == ["block.proj"]
