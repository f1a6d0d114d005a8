from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.errors import ExportError
from loradeploy.export.match.linears import Linear, find_linears
from loradeploy.export.passes.side_inputs.inject import inject_side_inputs, remove_side_inputs
from tests.export.graphs import IN, OUT, Builder, linear, manifest_of, numbers, ops, run


def _linears(model: ir.Model) -> list[Linear]:
    return list(find_linears(model).linears.values())


def test_one_product_becomes_gather_matmul_matmul_add() -> None:
    model = linear()
    inject_side_inputs(model, _linears(model))
    assert ops(model) == ["MatMul", "Gather", "Gather", "MatMul", "MatMul", "Add"]
    assert [node.name for node in model.graph][1:] == [
        f"block.proj/{name}"
        for name in (
            "lora_A_gather",
            "lora_B_gather",
            "lora_A_matmul",
            "lora_B_matmul",
            "lora_add",
        )
    ]


def test_side_inputs_are_inputs_with_rank_0_defaults() -> None:
    model = linear()
    inject_side_inputs(model, _linears(model))
    shapes = {v.name: v.shape for v in model.graph.inputs}
    defaults = {n: v.const_value for n, v in model.graph.initializers.items()}
    assert list(shapes) == ["x", "adapter_ids", "block.proj.lora_A", "block.proj.lora_B"]
    assert shapes["block.proj.lora_A"] == ir.Shape(["adapters", IN, "block.proj.rank"])
    assert shapes["block.proj.lora_B"] == ir.Shape(["adapters", "block.proj.rank", OUT])
    assert tuple(defaults["block.proj.lora_A"].shape) == (1, IN, 0)
    assert tuple(defaults["block.proj.lora_B"].shape) == (1, 0, OUT)
    assert defaults["adapter_ids"].numpy().tolist() == [0]


def test_without_side_inputs_the_result_is_the_base_bit_for_bit() -> None:
    base, model = linear(), linear()
    inject_side_inputs(model, _linears(model))
    x = numbers(2, 3, IN)
    assert np.array_equal(run(model, {"x": x}), run(base, {"x": x}))


def test_each_row_uses_the_slot_of_its_adapter_id() -> None:
    base, model = linear(), linear()
    inject_side_inputs(model, _linears(model))
    x, A, B = numbers(3, 5, IN), numbers(2, IN, 2, seed=1), numbers(2, 2, OUT, seed=2)
    side = {"block.proj.lora_A": A, "block.proj.lora_B": B, "adapter_ids": np.array([1, 0, 1])}
    slots = np.array([1, 0, 1])
    expected = run(base, {"x": x}) + x @ A[slots] @ B[slots]
    assert np.abs(run(model, {"x": x, **side}) - expected).max() < 1e-5


def test_one_slot_serves_all_rows() -> None:
    base, model = linear(), linear()
    inject_side_inputs(model, _linears(model))
    x, A, B = numbers(3, 5, IN), numbers(1, IN, 2, seed=1), numbers(1, 2, OUT, seed=2)
    side = {"block.proj.lora_A": A, "block.proj.lora_B": B}
    expected = run(base, {"x": x}) + x @ A @ B
    assert np.abs(run(model, {"x": x, **side}) - expected).max() < 1e-5


def test_inputs_without_a_sequence_axis_keep_their_shape() -> None:
    b = Builder()
    x = b.input("x", ["batch", IN])
    y = b.node("Gemm", [x, b.weight("w", OUT, IN), b.weight("b", OUT)], transB=1, module="m")
    y.shape = ir.Shape(["batch", OUT])
    model = b.model(y)
    rows = numbers(3, IN)
    base = run(model, {"x": rows})
    inject_side_inputs(model, _linears(model))
    A, B = numbers(3, IN, 2, seed=1), numbers(3, 2, OUT, seed=2)
    side = {"m.lora_A": A, "m.lora_B": B, "adapter_ids": np.array([2, 0, 1])}
    expected = base + np.einsum("bi,bir,bro->bo", rows, A[[2, 0, 1]], B[[2, 0, 1]])
    assert np.abs(run(model, {"x": rows, **side}) - expected).max() < 1e-5
    assert np.array_equal(run(model, {"x": rows}), base)


@pytest.mark.parametrize("between", ["nothing", "row by row"])
def test_flattened_rows_are_traced_back_to_their_batch(between: str) -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    flat = b.node("Reshape", [x, b.constant("s", np.array([-1, IN]))], ["rows", IN])
    if between == "row by row":
        flat = b.node("Tanh", [b.node("Add", [b.weight("c", IN), flat])], ["rows", IN])
    y = b.node("Gemm", [flat, b.weight("w", IN, OUT)], ["rows", OUT], module="m")
    model = b.model(y)
    rows = numbers(2, 3, IN)
    base = run(model, {"x": rows})
    c = model.graph.initializers["c"].const_value.numpy() if between == "row by row" else None
    added = inject_side_inputs(model, _linears(model))
    A, B = numbers(2, IN, 2, seed=1), numbers(2, 2, OUT, seed=2)
    side = {"m.lora_A": A, "m.lora_B": B, "adapter_ids": np.array([1, 0])}
    seen = rows if c is None else np.tanh(rows + c)
    expected = base + (seen @ A[[1, 0]] @ B[[1, 0]]).reshape(-1, OUT)
    assert np.abs(run(model, {"x": rows, **side}) - expected).max() < 1e-5
    remove_side_inputs(model, manifest_of(added))
    assert not any(str(node.name).startswith("side_inputs") for node in model.graph)
    assert np.array_equal(run(model, {"x": rows}), base)


def test_the_batch_size_of_flattened_rows_is_not_guessed() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    turned = b.node("Transpose", [x], ["sequence", "batch", IN], perm=[1, 0, 2])
    picked = b.node("Gather", [turned, b.constant("i", np.array(0))], ["picked", IN], axis=0)
    model = b.model(b.node("MatMul", [picked, b.weight("w", IN, OUT)], module="m"))
    with pytest.raises(ExportError, match="are not those of the batch"):
        inject_side_inputs(model, _linears(model))


def test_rows_that_cannot_be_determined_are_refused() -> None:
    b = Builder()
    x = b.input("x", ["batch", "heads", "sequence", IN])
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], module="m")
    model = b.model(y)
    with pytest.raises(
        ExportError, match="m takes an input of shape .*heads.*merge the adapter instead"
    ):
        inject_side_inputs(model, _linears(model))


def test_a_sequence_axis_before_the_batch_axis_is_refused() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    turned = b.node("Transpose", [x], ["sequence", "batch", IN], perm=[1, 0, 2])
    model = b.model(b.node("MatMul", [turned, b.weight("w", IN, OUT)], module="m"))
    with pytest.raises(ExportError, match=r"\[sequence,batch,6\], whose rows are not those"):
        inject_side_inputs(model, _linears(model))


def test_a_module_called_twice_gets_the_same_factors_twice() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    w = b.weight("w", IN, IN)
    once = b.node("MatMul", [x, w], ["batch", "sequence", IN], module="m")
    twice = b.node("MatMul", [once, w], ["batch", "sequence", IN], module="m")
    model = b.model(twice)
    added = inject_side_inputs(model, _linears(model))
    A, B = numbers(1, IN, 2, seed=1), numbers(1, 2, IN, seed=2)
    rows = numbers(2, 3, IN)
    W = w.const_value.numpy() + (A @ B)[0]
    result = run(model, {"x": rows, "m.lora_A": A, "m.lora_B": B})
    assert np.abs(result - rows @ W @ W).max() < 1e-3
    remove_side_inputs(model, manifest_of(added))
    assert ops(model) == ["MatMul", "MatMul"]


def test_a_product_that_is_computed_once_and_repeated_for_all_rows_differs_by_row() -> None:
    """The shapes that were declared for one row are removed: onnxruntime plans memory for them."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    table = b.weight("table", 1, 4, IN)
    w, c = b.weight("w", IN, OUT), b.weight("c", OUT)
    y = b.node("MatMul", [b.node("Tanh", [table], [1, 4, IN]), w], [1, 4, OUT], module="m")
    biased = b.node("Add", [y, c], [1, 4, OUT])
    rows = b.node("Shape", [x], [1], start=0, end=1)
    sizes = b.node("Concat", [rows, b.constant("s", np.array([1, 1]))], [3], axis=0)
    rows.dtype = sizes.dtype = ir.DataType.INT64
    model = b.model(b.node("Expand", [biased, sizes], ["batch", 4, OUT]))
    inject_side_inputs(model, _linears(model))
    A, B = numbers(2, IN, 2, seed=1), numbers(2, 2, OUT, seed=2)
    side = {"m.lora_A": A, "m.lora_B": B, "adapter_ids": np.array([1, 0, 1])}
    result = run(model, {"x": numbers(3, 2, IN), **side})
    read = [np.tanh(value.const_value.numpy()) if value is table else value.const_value.numpy()
            for value in (table, w, c)]  # fmt: skip
    expected = [(read[0] @ (read[1] + A[slot] @ B[slot]) + read[2])[0] for slot in (1, 0, 1)]
    assert np.abs(result - np.stack(expected)).max() < 1e-4
    assert biased.shape is None


def test_a_graph_output_keeps_its_name() -> None:
    model = linear()
    inject_side_inputs(model, _linears(model))
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_a_taken_name_is_refused() -> None:
    b = Builder()
    x = b.input("adapter_ids", ["batch", "sequence", IN])
    model = b.model(b.node("MatMul", [x, b.weight("w", IN, OUT)], module="m"))
    with pytest.raises(ExportError, match="already has a value named adapter_ids"):
        inject_side_inputs(model, _linears(model))


def test_half_precision_graphs_get_half_precision_factors() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN], ir.DataType.FLOAT16)
    y = b.node("MatMul", [x, b.constant("w", numbers(IN, OUT).astype(np.float16))], module="m")
    y.dtype = ir.DataType.FLOAT16
    model = b.model(y)
    assert inject_side_inputs(model, _linears(model)).dtype == "float16"
    assert model.graph.initializers["m.lora_A"].dtype == ir.DataType.FLOAT16


def test_removing_side_inputs_restores_the_graph() -> None:
    base, model = linear(), linear()
    added = inject_side_inputs(model, _linears(model))
    remove_side_inputs(model, manifest_of(added))
    assert ops(model) == ops(base)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert list(model.graph.initializers) == ["w"]
    x = numbers(2, 3, IN)
    assert np.array_equal(run(model, {"x": x}), run(base, {"x": x}))


def test_removing_side_inputs_that_do_not_exist_is_an_error() -> None:
    model = linear()
    manifest = manifest_of(inject_side_inputs(model, _linears(model)))
    with pytest.raises(ExportError, match=r"no side input at block\.proj"):
        remove_side_inputs(linear(), manifest)


# -- heads -------------------------------------------------------------------------------------


def _classifier(*, bias: bool = True) -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", IN])
    inputs = [x, b.weight("classifier.weight", OUT, IN)]
    if bias:
        inputs.append(b.weight("classifier.bias", OUT))
    y = b.node("Gemm", inputs, ["batch", OUT], module="classifier", transB=1, name="logits")
    return b.model(y)


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_defaults_to_the_base_and_is_replaced_per_row(bias: bool) -> None:
    base, model = _classifier(bias=bias), _classifier(bias=bias)
    added = inject_side_inputs(model, [], _linears(model), biased=["classifier"])
    x = numbers(3, IN)
    assert np.abs(run(model, {"x": x}) - run(base, {"x": x})).max() < 1e-5
    assert [s.parameter for s in added.saved] == ["classifier.weight", "classifier.bias"]
    assert {name: v.shape for name, v in added.defaults.items()} == {
        "classifier.weight": (1, IN, OUT),
        "classifier.bias": (1, OUT),
    }
    W, b = numbers(2, IN, OUT, seed=3), numbers(2, OUT, seed=4)
    slots = np.array([1, 0, 1])
    side = {"classifier.weight": W, "classifier.bias": b, "adapter_ids": slots}
    expected = np.einsum("bi,bio->bo", x, W[slots]) + b[slots]
    assert np.abs(run(model, {"x": x, **side}) - expected).max() < 1e-5


def test_a_head_with_a_separate_bias_node_is_replaced_completely() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    shape: list[int | str] = ["batch", "sequence", OUT]
    product = b.node("MatMul", [x, b.weight("w", IN, OUT)], shape, module="score")
    model = b.model(b.node("Add", [product, b.weight("b", OUT)], shape, name="logits"))
    rows = numbers(2, 3, IN)
    before = run(model, {"x": rows})
    inject_side_inputs(model, [], _linears(model))
    assert np.abs(run(model, {"x": rows}) - before).max() < 1e-5
    assert "w" not in model.graph.initializers
    assert "score.bias" in model.graph.initializers


def test_removing_a_head_restores_the_base() -> None:
    base, model = _classifier(), _classifier()
    added = inject_side_inputs(model, [], _linears(model))
    remove_side_inputs(model, manifest_of(added))
    x = numbers(3, IN)
    assert np.abs(run(model, {"x": x}) - run(base, {"x": x})).max() < 1e-5
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert set(find_linears(model).linears) == {"classifier"}
