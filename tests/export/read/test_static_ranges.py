"""Activations in fixed ranges are found, for a warning and for a trial without them."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.export.read.static_ranges import remove_ranges, warn_of_ranges
from tests.export.graphs import IN, OUT, Builder, linear, numbers, run


def _quantized(*, fixed: bool, activation: bool) -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", IN])
    held = x if activation else b.weight("w", IN, OUT)
    scale = b.constant("scale", np.float32(0.1)) if fixed else b.input("scale", [])
    q = b.node("QuantizeLinear", [held, scale])
    q.type = ir.TensorType(ir.DataType.UINT8)
    return b.model(b.node("DequantizeLinear", [q, scale], ["batch", IN]))


def _negative(model: ir.Model, value: ir.Value) -> ir.Value:
    node = ir.node("Neg", [value], name="negative")
    node.outputs[0].name, node.outputs[0].type = "negative", value.type
    node.outputs[0].shape = value.shape
    model.graph.append(node)
    return node.outputs[0]


def test_fixed_ranges_of_activations_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_ranges(_quantized(fixed=True, activation=True).graph)
    assert "1 activations of the graph are quantized in ranges" in caplog.text
    assert "what an adapter makes larger is cut off" in caplog.text


@pytest.mark.parametrize(("fixed", "activation"), [(False, True), (True, False)])
def test_dynamic_ranges_and_ranges_of_weights_are_no_warning(
    fixed: bool, activation: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_ranges(_quantized(fixed=fixed, activation=activation).graph)
        warn_of_ranges(linear().graph)
    assert not caplog.records


def test_activations_without_their_ranges_are_not_clipped() -> None:
    model, x = _quantized(fixed=True, activation=True), 100 * numbers(2, IN)
    (dequantized,) = model.graph.outputs
    model.graph.outputs[0] = _negative(model, dequantized)
    assert np.abs(run(model, {"x": x})).max() < np.abs(x).max(), "the range is smaller"
    assert remove_ranges(model.graph)
    assert (run(model, {"x": x}) == -x).all()


@pytest.mark.parametrize(("fixed", "activation"), [(False, True), (True, False)])
def test_weights_and_dynamic_ranges_stay_quantized(fixed: bool, activation: bool) -> None:
    model = _quantized(fixed=fixed, activation=activation)
    assert not remove_ranges(model.graph)
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "DequantizeLinear"]
