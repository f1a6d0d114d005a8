"""Statically quantized activations are clipped if an adapter enlarges them: that is a warning."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.export.read.static_ranges import warn_of_ranges
from tests.export.graphs import IN, OUT, Builder, linear


def _quantized(*, fixed: bool, activation: bool) -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", IN])
    held = x if activation else b.weight("w", IN, OUT)
    scale = b.constant("scale", np.float32(0.1)) if fixed else b.input("scale", [])
    q = b.node("QuantizeLinear", [held, scale])
    return b.model(b.node("DequantizeLinear", [q, scale], ["batch", IN]))


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
