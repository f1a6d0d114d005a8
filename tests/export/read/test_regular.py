"""Normalization of graphs: equivalent forms of exporters become one, on minimal graphs."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.errors import ExportError
from loradeploy.export.api import export
from loradeploy.export.graph.sound import check_opens
from loradeploy.export.match.linears import find_linears
from loradeploy.export.match.operators import MICROSOFT
from loradeploy.export.read.regular import (
    _Failures,
    complete_outputs,
    complete_shapes,
    drop_identities,
    lift_constants,
    quantize_constants,
    remove_weight_inputs,
)
from loradeploy.runtime.session import AdapterSession
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


def test_a_constant_behind_identities_is_used_directly() -> None:
    b = Builder()
    x, w = b.input("x", ["batch", IN]), b.weight("w", IN, IN)
    again = b.node("Identity", [b.node("Identity", [w], [IN, IN])], [IN, IN])
    y = b.node("MatMul", [b.node("MatMul", [x, w], None), again], None)
    model = b.model(b.node("Identity", [y], ["batch", IN], name="out"))
    rows = numbers(2, IN)
    before = run(model, {"x": rows})
    drop_identities(model)
    # The Identity of the graph output is kept: its input is not a constant.
    assert ops(model) == ["MatMul", "MatMul", "Identity"]
    assert [node.inputs[1] for node in list(model.graph)[:2]] == [w, w]
    np.testing.assert_array_equal(run(model, {"x": rows}), before)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_float_weights_that_the_graph_quantizes_become_integers(axis: int | None) -> None:
    """As quantization-aware training exports them; onnxruntime folds them to the same integers."""
    b = Builder()
    x, w = b.input("x", ["batch", IN]), numbers(IN, OUT)
    size = () if axis is None else (w.shape[axis],)
    scale = b.constant("scale", np.full(size, 0.02, np.float32))
    zero = b.constant("zero", np.full(size, 3, np.int8))
    along = {} if axis is None else {"axis": axis}
    integers = b.node("QuantizeLinear", [b.constant("w", w), scale, zero], **along)
    integers.dtype = ir.DataType.INT8
    again = b.node("DequantizeLinear", [integers, scale, zero], [IN, OUT], **along)
    model = b.model(b.node("MatMul", [x, again], ["batch", OUT], module="m", name="y"))
    rows = {"x": numbers(2, IN)}
    before = run(model, rows)
    assert find_linears(model).linears == {}
    quantize_constants(model.graph)
    assert ops(model) == ["DequantizeLinear", "MatMul"]
    assert find_linears(model).linears["m"].quantized
    np.testing.assert_array_equal(run(model, rows), before)


@pytest.mark.parametrize(
    ("shape", "size", "quantized"), [((OUT,), 1, True), ((IN, OUT), OUT - 1, False)]
)
def test_only_scales_that_fit_quantize_constants(
    shape: tuple[int, ...], size: int, quantized: bool
) -> None:
    """A scale of shape [1] fits a vector, too, which has no axis 1."""
    b = Builder()
    scale, zero = np.full(size, 0.02, np.float32), np.full(size, 3, np.int8)
    given = [b.constant("w", numbers(*shape)), b.constant("scale", scale), b.constant("zero", zero)]
    integers = b.node("QuantizeLinear", given)
    model = b.model(b.node("DequantizeLinear", [integers, *given[1:]]))
    quantize_constants(model.graph)
    assert ("QuantizeLinear" not in ops(model)) == quantized


def test_an_identity_that_computes_a_graph_output_is_kept() -> None:
    b = Builder()
    b.input("x", ["batch", IN])
    model = b.model(b.node("Identity", [b.weight("w", IN, IN)], [IN, IN], name="y"))
    drop_identities(model)
    assert ops(model) == ["Identity"]
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_missing_shapes_of_products_are_inferred() -> None:
    b = Builder()
    x = b.input("x", ["batch", 3, IN])
    h = b.node("Tanh", [x], None, name="h")
    model = b.model(b.node("MatMul", [h, b.weight("w", IN, OUT)], None, module="m", name="y"))
    complete_shapes(model)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert [str(size) for size in product.inputs[0].shape] == ["batch", "3", str(IN)]


@pytest.mark.parametrize("declared", [["batch", IN], ["batch", 3, IN + 1], []], ids=str)
def test_declared_shapes_that_contradict_the_operators_are_dropped(
    declared: list[int | str], caplog: pytest.LogCaptureFixture
) -> None:
    b = Builder()
    x = b.input("x", ["batch", 3, IN])
    h = b.node("Sigmoid", [b.node("Tanh", [x], declared, name="h")], None)
    model = b.model(b.node("MatMul", [h, b.weight("w", IN, OUT)], None, module="m", name="y"))
    complete_shapes(model)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert [str(size) for size in product.inputs[0].shape] == ["batch", "3", str(IN)]
    assert not caplog.records


def test_a_declared_shape_that_cannot_be_inferred_is_kept_where_another_was_wrong(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Shape inference does not know FastGelu, so only the declaration gives the shape after it."""
    b = Builder()
    x = b.input("x", ["batch", IN])
    wrong = b.node("MatMul", [x, b.weight("w1", IN, OUT)], ["batch", OUT + 5], name="wrong")
    h = b.node("FastGelu", [wrong], ["batch", OUT], name="h", domain=MICROSOFT)
    t = b.node("Tanh", [h], None)
    y = b.node("MatMul", [t, b.weight("w2", OUT, IN)], None, module="m", name="y")
    model = b.model(y)
    model.graph.opset_imports[MICROSOFT] = 1
    complete_shapes(model)
    assert [str(value.shape) for value in (wrong, h, t)] == [f"[batch,{OUT}]"] * 3
    assert not caplog.records


@pytest.mark.parametrize(
    ("message", "failed"), [("Shape inference failed: %s", True), ("x", False)]
)
def test_only_log_lines_of_a_failed_inference_are_suppressed(message: str, failed: bool) -> None:
    failures = _Failures()
    record = logging.LogRecord("onnx_ir", logging.WARNING, "", 0, message, ("x",), None)
    assert failures.filter(record) is not failed
    assert failures.seen is failed


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_shapes_are_inferred_for_a_product_with_the_weight_first(op: str) -> None:
    """It is rewritten to x W only if the axes of x are known."""
    b = Builder()
    h = b.node("Tanh", [b.input("x", ["batch", IN, 3])], None, name="h")
    w = b.weight("w", OUT, IN, *([1] if op == "Conv" else []))
    model = b.model(b.node(op, [h, w] if op == "Conv" else [w, h], None, name="y"))
    complete_shapes(model)
    assert h.shape is not None and [str(size) for size in h.shape] == ["batch", str(IN), "3"]


def test_outputs_without_a_shape_get_the_one_that_onnxruntime_infers(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", ["batch", 3, IN])
    none = b.node("Tanh", [x], None, name="none")
    known = b.node("Tanh", [x], ["rows", 3, IN], name="known")
    model = b.model(none, known)
    ir.save(model, tmp_path / "model.onnx")
    complete_outputs(model.graph, check_opens(tmp_path / "model.onnx"))
    assert [str(value.shape) for value in (none, known)] == ["[batch,3,6]", "[rows,3,6]"]


@pytest.mark.parametrize(("declared", "right"), [(None, True), (["batch", OUT], False)])
def test_an_output_of_another_rank_than_declared_is_refused(
    declared: list[int | str] | None, right: bool, tmp_path: Path
) -> None:
    """onnxruntime accepts it, and a session would read axes that the output does not have."""
    b = Builder()
    ids = b.input("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    x = b.node("Gather", [b.weight("words", 50, IN), ids])
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], module="block.proj")
    model = b.model(b.node("Identity", [y], declared, name="last_hidden_state"))
    ir.save(model, tmp_path / "model.onnx")
    if not right:
        with pytest.raises(ExportError, match=r"last_hidden_state has 3 axes.* \['batch', 4\]"):
            export(tmp_path / "model.onnx", tmp_path / "b", task="feature-extraction")
        return
    export(tmp_path / "model.onnx", tmp_path / "b", task="feature-extraction")
    session = AdapterSession(tmp_path / "b")
    feeds = {"input_ids": np.array([[5, 6, 7]])}
    assert session.run(["last_hidden_state"], feeds)[0].shape == (1, 3, OUT)


def test_a_weight_that_is_also_a_graph_input_becomes_a_constant() -> None:
    model = linear()
    w = model.graph.initializers["w"]
    model.graph.inputs.append(w)
    remove_weight_inputs(model)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert list(model.graph.initializers) == ["w"]
    assert list(find_linears(model).linears) == ["block.proj"]
