"""required.onnx, the graph without default side inputs, on a minimal bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import load_file

from loradeploy.export.match.linears import find_linears
from loradeploy.export.passes.forms.required import write_required
from loradeploy.export.passes.side_inputs.inject import inject_side_inputs
from tests.export.graphs import IN, OUT, linear, manifest_of, numbers, run

FACTORS = {
    "block.proj.lora_A": numbers(1, IN, 2, seed=1),
    "block.proj.lora_B": numbers(1, 2, OUT, seed=2),
}
X = {"x": numbers(2, 3, IN)}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with the graph of one linear layer with side inputs, and the files beside it."""
    model = linear()
    manifest = manifest_of(inject_side_inputs(model, list(find_linears(model).linears.values())))
    ir.save(model, tmp_path / "model.onnx")
    (tmp_path / "adapters").mkdir()
    write_required(tmp_path, manifest, {"sport": FACTORS})
    return tmp_path


def result(directory: Path, feeds: dict[str, Any]) -> Any:
    """Run required.onnx and return its output."""
    file = directory / "required.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert {value.name for value in session.get_inputs()} == feeds.keys()
    assert session.get_overridable_initializers() == []
    return session.run(None, feeds)[0]


def test_the_files_of_base_and_adapter_feed_every_input(directory: Path) -> None:
    expected = run(linear(), X)
    base = load_file(directory / "required.safetensors")
    np.testing.assert_array_equal(result(directory, {**X, **base}), expected)
    sport = load_file(directory / "adapters" / "sport.safetensors")
    A, B = FACTORS.values()
    adapted = expected + X["x"] @ A[0] @ B[0]
    np.testing.assert_allclose(result(directory, {**X, **sport}), adapted, atol=1e-5)


def test_the_graph_with_defaults_is_not_changed(directory: Path) -> None:
    model = ir.load(directory / "model.onnx")
    np.testing.assert_array_equal(run(model, X), run(linear(), X))
