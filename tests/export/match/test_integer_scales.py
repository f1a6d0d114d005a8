"""The output of a MatMulInteger layer is the value after all scales, in any order of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from loradeploy.export.match.linears import find_linears
from loradeploy.export.match.modules.identity import CheckpointWeights
from loradeploy.export.match.modules.naming import by_graph
from loradeploy.export.passes.side_inputs.inject import inject_side_inputs
from tests.export.graphs import IN, OUT, Builder, numbers, run
from tests.tolerances import tolerance

Multiplied = Callable[[Builder, ir.Value, ir.Value, ir.Value], ir.Value]


def _times(b: Builder, one: ir.Value, other: ir.Value) -> ir.Value:
    return b.node("Mul", [one, other])


# Functions of the integer sums, the scale of x and the scale of the weight.
ORDERS: dict[str, Multiplied] = {
    "as onnxruntime": lambda b, y, s, t: _times(b, y, _times(b, s, t)),
    "the sums behind": lambda b, y, s, t: _times(b, _times(b, t, s), y),
    "x first": lambda b, y, s, t: _times(b, _times(b, y, s), t),
    "the weight first": lambda b, y, s, t: _times(b, s, _times(b, t, y)),
    "in axes of its own": lambda b, y, s, t: _times(
        b, _times(b, y, t), b.node("Unsqueeze", [s, b.constant("axes", np.array([0]))])
    ),
}


def _integers(multiplied: Multiplied, *, columns: bool) -> tuple[ir.Model, Any]:
    """Return the graph and its weight [out, in]."""
    b = Builder()
    x = b.input("x", ["batch", IN])
    scale = np.full(OUT if columns else (), 0.02, np.float32)
    scale = scale * np.float32([1, 2, 3, 5][:OUT]) if columns else scale
    w = np.random.default_rng(0).integers(-127, 128, (IN, OUT)).astype(np.int8)
    quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    b.nodes.append(quantize)
    for value, kind in zip(quantize.outputs, ("UINT8", "FLOAT", "UINT8"), strict=True):
        value.name, value.type = f"q{kind}{id(value)}", ir.TensorType(ir.DataType[kind])
    q, s, z = quantize.outputs
    sums = b.node("MatMulInteger", [q, b.constant("w", w), z], module="m")
    b.nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.INT32)
    y = b.node("Cast", [sums], to=int(ir.DataType.FLOAT))
    y = multiplied(b, y, s, b.constant("scale", np.asarray(scale)))
    y.shape = ir.Shape(["batch", OUT])
    return b.model(y), (w * scale).T


@pytest.mark.parametrize("columns", [False, True], ids=["tensor", "columns"])
@pytest.mark.parametrize("order", ORDERS)
def test_an_update_is_added_after_all_scales(order: str, columns: bool, tmp_path: Path) -> None:
    model, W = _integers(ORDERS[order], columns=columns)
    x = numbers(3, IN)
    base = run(model, {"x": x})
    assert np.abs(base - x @ W.T).max() < 0.05 * np.abs(base).max(), "8 bits of x"
    save_file({"m.weight": np.ascontiguousarray(W)}, tmp_path / "model.safetensors")
    shown = CheckpointWeights(tmp_path, ["m"]).namer(by_graph)
    assert list(find_linears(model, shown).linears) == ["m"]
    inject_side_inputs(model, list(find_linears(model).linears.values()))
    A, B = numbers(IN, 2, seed=1), numbers(2, OUT, seed=2)
    adapted = run(model, {"x": x, "m.lora_A": A[None], "m.lora_B": B[None]})
    assert np.abs(x @ A @ B).max() > 1, "the adapter does nothing"
    assert np.abs(adapted - base - x @ A @ B).max() <= tolerance("torch-onnx-tiny")


UNKNOWN: dict[str, Multiplied] = {
    "without the scale of x": lambda b, y, s, t: _times(b, y, t),
    "a scale of another node": lambda b, y, s, t: _times(b, _times(b, y, s), b.node("Exp", [t])),
    "scales apart": lambda b, y, s, t: _times(b, b.node("Neg", [_times(b, y, t)]), s),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_a_product_whose_scales_are_not_all_known_takes_no_adapters(what: str) -> None:
    model, _ = _integers(UNKNOWN[what], columns=True)
    assert not find_linears(model).linears


def test_one_constant_can_be_the_scale_of_both() -> None:
    b = Builder()
    x, step = b.input("x", ["batch", IN]), b.constant("step", np.float32(0.05))
    q = b.node("QuantizeLinear", [x, step, b.constant("middle", np.uint8(128))])
    b.nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    w = b.constant("w", np.ones((IN, OUT), np.int8))
    sums = b.node("MatMulInteger", [q, w, b.constants[1]], module="m")
    b.nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.INT32)
    y = b.node("Cast", [sums], to=int(ir.DataType.FLOAT))
    y = _times(b, y, b.constant("both", np.float32(0.05 * 0.02)))
    gate = b.input("gate", ["batch", OUT])
    model = b.model(b.node("Mul", [y, gate], ["batch", OUT]))
    (linear,) = find_linears(model).linears.values()
    y.shape = ir.Shape(["batch", OUT])
    inject_side_inputs(model, [linear])
    A, B = numbers(IN, 2, seed=1), numbers(2, OUT, seed=2)
    feeds = {"x": numbers(3, IN), "gate": numbers(3, OUT, seed=3)}
    base, adapted = (
        run(model, feeds | {"m.lora_A": A[None] * on, "m.lora_B": B[None]}) for on in (0, 1)
    )
    update = feeds["x"] @ A @ B * feeds["gate"]
    assert np.abs(adapted - base - update).max() <= tolerance("torch-onnx-tiny")
