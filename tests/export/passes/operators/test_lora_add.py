"""Updates as calls of the operator, on minimal graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import LORA_ADD_OPERATOR
from loradeploy.errors import ExportError
from loradeploy.export.match.linears import find_linears
from loradeploy.export.match.whole.parts import find_parts
from loradeploy.export.passes.operators.calls import remove_operators, use_operators
from loradeploy.export.passes.side_inputs.inject import inject_side_inputs, remove_side_inputs
from tests.export.graphs import IN, OUT, Arrays, Builder, linear, manifest_of, numbers, ops, run
from tests.tolerances import tolerance

FEEDS: Arrays = {
    "x": numbers(3, 5, IN),
    "block.proj.lora_A": numbers(2, IN, 4, seed=1),
    "block.proj.lora_B": numbers(2, 4, OUT, seed=2),
    "adapter_ids": np.array([1, 0, 1]),
}


def with_slots() -> tuple[ir.Model, Manifest]:
    """One linear layer with side inputs."""
    model = linear()
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    return model, manifest_of(added)


def with_calls() -> tuple[ir.Model, Manifest]:
    """One linear layer whose update is a call."""
    model, manifest = with_slots()
    use_operators(model, manifest)
    return model, manifest


def with_library(model: ir.Model, library: Path, feeds: Arrays) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library))
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def test_an_update_is_one_call() -> None:
    model, _ = with_calls()
    assert ops(model) == ["MatMul", "LoraAdd"]
    assert {value.name for value in model.graph.inputs} == {*FEEDS, "adapter_ranks"}
    assert model.opset_imports["loradeploy"] == 1


def test_without_a_library_the_call_computes_what_its_nodes_computed() -> None:
    plain, calls = with_slots()[0], with_calls()[0]
    np.testing.assert_array_equal(run(calls, FEEDS), run(plain, FEEDS))
    assert np.abs(run(calls, FEEDS) - run(linear(), {"x": FEEDS["x"]})).max() > 1


def test_the_library_computes_the_same(operator_library: Path) -> None:
    model, _ = with_calls()
    (found,) = with_library(model, operator_library, FEEDS).values()
    np.testing.assert_allclose(found, run(model, FEEDS), atol=tolerance("torch-onnx-tiny"))


def test_ranks_that_are_fed_change_nothing_without_a_library() -> None:
    model, _ = with_calls()
    ranked = FEEDS | {"adapter_ranks": np.array([[1], [2]])}
    np.testing.assert_array_equal(run(model, ranked), run(model, FEEDS))


def test_the_calls_can_be_removed() -> None:
    (plain, _), (model, manifest) = with_slots(), with_calls()
    remove_operators(model, [LORA_ADD_OPERATOR])
    assert ops(model) == ops(plain)
    assert {node.name for node in model.graph} == {node.name for node in plain.graph}
    assert {value.name for value in model.graph.inputs} == {*FEEDS}
    assert not model.functions
    assert "loradeploy" not in model.opset_imports
    np.testing.assert_array_equal(run(model, FEEDS), run(plain, FEEDS))
    remove_side_inputs(model, manifest)
    assert ops(model) == ops(linear())


def test_a_graph_without_calls_is_not_what_its_manifest_says() -> None:
    with pytest.raises(ExportError, match="has calls of no operator, its manifest lists LoraAdd"):
        remove_operators(with_slots()[0], [LORA_ADD_OPERATOR])


def test_a_call_that_is_the_graphs_output_keeps_its_name() -> None:
    model, _ = with_calls()
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_a_product_that_is_called_twice_has_two_calls() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    w = b.weight("w", IN, IN)
    y = b.node("MatMul", [x, w], ["batch", "sequence", IN], module="proj", name="first")
    z = b.node("MatMul", [y, w], ["batch", "sequence", IN], module="proj", name="second")
    model = b.model(z)
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    feeds = {
        "x": FEEDS["x"],
        "proj.lora_A": numbers(1, IN, 2, seed=1),
        "proj.lora_B": numbers(1, 2, IN, seed=2),
    }
    before = run(model, feeds)
    use_operators(model, manifest_of(added))
    assert ops(model) == ["MatMul", "LoraAdd"] * 2
    np.testing.assert_array_equal(run(model, feeds), before)


def test_a_product_of_unknown_shape_before_a_bias_is_a_call() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    shape = ["batch", "sequence", OUT]
    product = b.node("MatMul", [x, b.weight("w", IN, OUT)], shape, module="block.proj")
    y = b.node("Add", [product, b.weight("b", OUT)], shape, module="block.proj", name="y")
    model = b.model(y)
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    expected = run(model, FEEDS)
    product.shape = None  # as torch.onnx leaves it
    use_operators(model, manifest_of(added))
    assert ops(model).count("LoraAdd") == 1
    np.testing.assert_array_equal(run(model, FEEDS), expected)
    product.type = None
    remove_operators(model, [LORA_ADD_OPERATOR])
    np.testing.assert_array_equal(run(model, FEEDS), expected)


def test_rows_without_a_sequence_keep_their_nodes() -> None:
    b = Builder()
    x = b.input("x", ["batch", IN])
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], ["batch", OUT], module="proj")
    model = b.model(y)
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    before = ops(model)
    assert use_operators(model, manifest_of(added)) == ()
    assert ops(model) == before


def test_an_embedding_keeps_its_nodes() -> None:
    b = Builder()
    ids = b.input("ids", ["batch", "sequence"], ir.DataType.INT64)
    e = b.node("Gather", [b.weight("t", 9, IN), ids], ["batch", "sequence", IN], module="embed")
    y = b.node("MatMul", [e, b.weight("w", IN, OUT)], ["batch", "sequence", OUT], module="proj")
    model = b.model(y)
    added = inject_side_inputs(
        model,
        list(find_linears(model).linears.values()),
        embeddings=[find_parts(model)["embed"]],
    )
    use_operators(model, manifest_of(added))
    assert ops(model).count("LoraAdd") == 1
    feeds = {
        "ids": np.array([[1, 2], [3, 4]]),
        "embed.lora_A": numbers(1, 9, 2, seed=1),
        "embed.lora_B": numbers(1, 2, IN, seed=2),
        "proj.lora_A": numbers(1, IN, 3, seed=3),
        "proj.lora_B": numbers(1, 3, OUT, seed=4),
    }
    with_calls_found = run(model, feeds)
    remove_operators(model, [LORA_ADD_OPERATOR])
    np.testing.assert_array_equal(run(model, feeds), with_calls_found)
