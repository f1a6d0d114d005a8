"""Products of 8-bit integers are exact, also on x86 processors without VNNI."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from loradeploy.bundle.proof.provider import EXACT_INTEGERS
from loradeploy.export.graph.running import open_graph
from loradeploy.runtime.reading.graph import open_file
from tests.export.graphs import Builder

IN, OUT, STEP = 64, 32, np.float32(0.125)
RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (3, IN)).astype(np.uint8)
W = RNG.integers(-127, 128, (IN, OUT)).astype(np.int8)


def _integers(b: Builder) -> tuple[ir.Model, np.ndarray]:
    x = b.input("x", ["batch", IN], ir.DataType.UINT8)
    sums = b.node("MatMulInteger", [x, b.constant("w", W)])
    sums.type = ir.TensorType(ir.DataType.INT32)
    return b.model(b.node("Cast", [sums], to=int(ir.DataType.FLOAT))), X.astype(int) @ W


def _quantized_to_floats(b: Builder) -> tuple[ir.Model, np.ndarray]:
    x = b.input("x", ["batch", IN], ir.DataType.UINT8)
    step, middle = b.constant("step", STEP), b.constant("middle", np.uint8(128))
    factors = (
        b.node("DequantizeLinear", [x, step, middle]),
        b.node("DequantizeLinear", [b.constant("w", W), step, b.constant("zero", np.int8(0))]),
    )
    return b.model(b.node("MatMul", list(factors))), (X.astype(int) - 128) @ W * STEP * STEP


@pytest.mark.parametrize("opened", [lambda file: open_file(file, None, None), open_graph])
@pytest.mark.parametrize("made", [_integers, _quantized_to_floats])
def test_sums_are_not_cut_to_16_bits(made, opened, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, expected = made(Builder())
    ir.save(model, tmp_path / "model.onnx")
    (sums,) = opened(tmp_path / "model.onnx").run(None, {"x": X})
    np.testing.assert_array_equal(sums, expected.astype(np.float32))


def test_a_given_option_is_obeyed(tmp_path: Path) -> None:
    model, _ = _integers(Builder())
    ir.save(model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(EXACT_INTEGERS, "0")
    open_file(tmp_path / "model.onnx", None, options)
    assert options.get_session_config_entry(EXACT_INTEGERS) == "0"
