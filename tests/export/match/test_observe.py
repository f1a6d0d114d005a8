"""The batch axis of each layer is found by running the graph, regardless of its symbolic shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import constant_of, set_constant
from loradeploy.export.match.linears import Linear, find_linears
from loradeploy.export.match.observe import observe
from loradeploy.export.match.products import input_of, output_of
from loradeploy.export.passes.side_inputs.inject import inject_side_inputs, remove_side_inputs
from loradeploy.export.passes.side_inputs.output_scale import Change
from loradeploy.export.read.regular import drop_identities
from tests.export.graphs import IN, OUT, Builder, manifest_of, numbers, run
from tests.tolerances import tolerance

Shape = list[int | str] | None
MODULE = "block.proj"


def _integers(b: Builder, *values: int) -> ir.Value:
    return b.constant(f"integers_{len(b.constants)}", np.array(values, np.int64))


def _product(b: Builder, x: ir.Value, into: int = IN) -> ir.Value:
    return b.node("MatMul", [x, b.weight("w", into, OUT)], module=MODULE, name="y")


def _front(b: Builder, x: ir.Value, stated: Shape) -> ir.Value:
    return _product(b, b.node("Relu", [x], stated))


def _sequence_first(b: Builder, x: ir.Value, stated: Shape) -> ir.Value:
    y = _product(b, b.node("Transpose", [x], stated, perm=[1, 0, 2]))
    return b.node("Transpose", [y], perm=[1, 0, 2])


def _flattened(b: Builder, x: ir.Value, stated: Shape) -> ir.Value:
    y = _product(b, b.node("Reshape", [x, _integers(b, -1, IN)], stated))
    shape = _concatenated(b, _sizes(b, x), OUT)
    return b.node("Reshape", [y, shape])


def _windows(b: Builder, x: ir.Value, stated: Shape) -> ir.Value:
    """Reshape to [batch · sequence, 2, in / 2], like windows of an image."""
    y = _product(b, b.node("Reshape", [x, _integers(b, -1, 2, IN // 2)], stated), IN // 2)
    shape = _concatenated(b, _sizes(b, x), 2 * OUT)
    return b.node("Reshape", [y, shape])


def _four_axes(b: Builder, x: ir.Value, stated: Shape) -> ir.Value:
    return _product(b, b.node("Unsqueeze", [x, _integers(b, 2)], stated))


def _first_token(b: Builder, x: ir.Value, stated: Shape) -> ir.Value:
    index = b.constant("index", np.array(0, np.int64))
    return _product(b, b.node("Gather", [x, index], stated, axis=1))


def _concatenated(b: Builder, sizes: ir.Value, size: int) -> ir.Value:
    shape = b.node("Concat", [sizes, _integers(b, size)], axis=0)
    shape.type = ir.TensorType(ir.DataType.INT64)
    return shape


def _sizes(b: Builder, x: ir.Value) -> ir.Value:
    """Return the sizes [batch, sequence] of x."""
    shape = b.node("Shape", [x])
    sizes = b.node("Slice", [shape, _integers(b, 0), _integers(b, 2)])
    shape.type = sizes.type = ir.TensorType(ir.DataType.INT64)
    return sizes


LAYOUTS = {
    "front": _front,
    "sequence-first": _sequence_first,
    "flattened": _flattened,
    "windows": _windows,
    "four-axes": _four_axes,
    "first-token": _first_token,
}


def _graph(
    layout: Callable[[Builder, ir.Value, Shape], ir.Value],
    stated: Shape = None,
    batch: int | str = "batch",
) -> ir.Model:
    b = Builder()
    x = b.input("x", [batch, "sequence", IN])
    return b.model(layout(b, x, stated))


def _seen(model: ir.Model) -> list[Linear]:
    """Return the linears of the graph after observing a run."""
    linears = list(find_linears(model).linears.values())
    nodes = [node for linear in linears for node in linear.nodes]
    values = [value for node in nodes for value in (input_of(node), output_of(node)) if value]
    observe(model, values, Path(), {})
    return linears


def _merged(model: ir.Model, update: NDArray[np.float32]) -> ir.Model:
    weight = model.graph.initializers["w"]
    set_constant(weight, constant_of(weight) + update)
    return model


def _expected(
    make: Callable[[], ir.Model], x: NDArray[np.float32], updates: list[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Compute each row separately, by the graph with the row's update merged into the weight."""
    rows = [run(_merged(make(), update), {"x": x[i : i + 1]}) for i, update in enumerate(updates)]
    return np.concatenate(rows)


@pytest.mark.parametrize("stated", [None, ["unk__1", "unk__2", IN]], ids=["unstated", "renamed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_row_has_its_own_adapter_in_every_layout(layout: str, stated: Shape) -> None:
    if stated is not None and layout not in ("front", "sequence-first"):
        pytest.skip("of another rank")
    model = _graph(LAYOUTS[layout], stated)
    linears = _seen(model)
    into = linears[0].in_features
    inject_side_inputs(model, linears)
    x = numbers(3, 4, IN)
    A, B = numbers(3, into, 2, seed=1), numbers(3, 2, OUT, seed=2)
    side = {f"{MODULE}.lora_A": A, f"{MODULE}.lora_B": B, "adapter_ids": np.arange(3)}
    expected = _expected(lambda: _graph(LAYOUTS[layout]), x, list(A @ B))
    base = run(_graph(LAYOUTS[layout]), {"x": x})
    assert np.abs(run(model, {"x": x, **side}) - expected).max() < tolerance("rows")
    assert np.abs(expected - base).max() > 1
    assert np.array_equal(run(model, {"x": x}), base)


def test_a_symbol_on_the_wrong_axis_is_ignored() -> None:
    model = _graph(_sequence_first, ["batch", "sequence", IN])
    inject_side_inputs(model, _seen(model))
    x, A, B = numbers(2, 5, IN), numbers(2, IN, 2, seed=1), numbers(2, 2, OUT, seed=2)
    side = {f"{MODULE}.lora_A": A, f"{MODULE}.lora_B": B, "adapter_ids": np.arange(2)}
    expected = _expected(lambda: _graph(_sequence_first), x, list(A @ B))
    assert np.abs(run(model, {"x": x, **side}) - expected).max() < tolerance("rows")


@pytest.mark.parametrize("layout", ["front", "sequence-first", "flattened", "windows"])
def test_a_single_row_has_its_adapter_in_every_layout(layout: str) -> None:
    model = _graph(LAYOUTS[layout], batch=1)
    linears = _seen(model)
    inject_side_inputs(model, linears)
    x, into = numbers(1, 4, IN), linears[0].in_features
    A, B = numbers(1, into, 2, seed=1), numbers(1, 2, OUT, seed=2)
    side = {f"{MODULE}.lora_A": A, f"{MODULE}.lora_B": B}
    expected = _expected(lambda: _graph(LAYOUTS[layout], batch=1), x, list(A @ B))
    assert np.abs(run(model, {"x": x, **side}) - expected).max() < tolerance("rows")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_scaled_and_shifted_per_row(layout: str) -> None:
    model = _graph(LAYOUTS[layout])
    (linear,) = _seen(model)
    inject_side_inputs(model, [linear], changes=[Change(linear, scale=True, offset=False)])
    x, scale = numbers(3, 4, IN), numbers(3, OUT, seed=3)
    A, B = numbers(3, linear.in_features, 0), numbers(3, 0, OUT)
    side = {f"{MODULE}.lora_A": A, f"{MODULE}.lora_B": B, f"{MODULE}.scale": scale}
    side["adapter_ids"] = np.arange(3)
    weight = constant_of(_graph(LAYOUTS[layout]).graph.initializers["w"])
    updates = [weight * row - weight for row in scale]
    expected = _expected(lambda: _graph(LAYOUTS[layout]), x, updates)
    assert np.abs(run(model, {"x": x, **side}) - expected).max() < tolerance("rows")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_removing_side_inputs_restores_the_base(layout: str) -> None:
    model = _graph(LAYOUTS[layout])
    linears = _seen(model)
    change = Change(linears[0], scale=True, offset=True)
    added = inject_side_inputs(model, linears, changes=[change])
    remove_side_inputs(model, manifest_of(added))
    before = _graph(LAYOUTS[layout])
    assert [node.op_type for node in model.graph] == [node.op_type for node in before.graph]
    x = numbers(3, 4, IN)
    assert np.array_equal(run(model, {"x": x}), run(before, {"x": x}))


# -- what is refused -----------------------------------------------------------------------------


def _mean_of_the_batch(b: Builder, x: ir.Value, stated: Shape) -> ir.Value:
    return _product(b, b.node("ReduceMean", [x, _integers(b, 0)], stated, keepdims=1))


def _tokens_in_turn(b: Builder, x: ir.Value, stated: Shape) -> ir.Value:
    """Reshape to [sequence · batch, in]."""
    first = b.node("Transpose", [x], perm=[1, 0, 2])
    return _product(b, b.node("Reshape", [first, _integers(b, -1, IN)], stated))


@pytest.mark.parametrize("layout", [_mean_of_the_batch, _tokens_in_turn])
def test_axes_that_mix_or_reorder_the_batch_are_refused(
    layout: Callable[[Builder, ir.Value, Shape], ir.Value],
) -> None:
    model = _graph(layout, ["batch", IN])
    with pytest.raises(ExportError, match=rf"{MODULE}.*rows are not those of the batch"):
        inject_side_inputs(model, _seen(model))


def test_a_graph_that_does_not_run_gets_no_new_symbols() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    unknown = ir.node("Unknown", [x], domain="elsewhere")
    unknown.outputs[0].name = "unknown"
    unknown.outputs[0].shape = ir.Shape(["unk__1", "unk__2", IN])
    unknown.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    b.nodes.append(unknown)
    model = b.model(_product(b, unknown.outputs[0]))
    with pytest.raises(ExportError, match=r"does not run here: .*Unknown"):
        inject_side_inputs(model, _seen(model))


def test_missing_types_and_shapes_are_filled_in() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN], ir.DataType.FLOAT16)
    hidden = b.node("Relu", [x])
    weight = b.constant("w", numbers(IN, OUT).astype(np.float16))
    y = b.node("MatMul", [hidden, weight], module=MODULE, name="y")
    hidden.type = y.type = None
    model = b.model(y)
    added = inject_side_inputs(model, _seen(model))
    assert added.dtype == "float16"
    assert y.shape is not None and y.shape[-1] == OUT


def test_a_bias_after_an_identity_is_the_layers_bias() -> None:
    b = Builder()
    x, shared = b.input("x", ["batch", IN]), b.weight("shared", OUT)
    same = b.node("Identity", [shared])
    model = b.model(b.node("Gemm", [x, b.weight("w", IN, OUT), same], module=MODULE, name="y"))
    drop_identities(model)
    assert find_linears(model).linears[MODULE].bias is shared
