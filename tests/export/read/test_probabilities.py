"""A graph that gives probabilities gives its logits too, so that nothing makes them twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.bundle.outputs import output_of
from loradeploy.export.api import export
from loradeploy.export.read.probabilities import give_logits
from loradeploy.runtime.session import AdapterSession
from tests.export.graphs import IN, OUT, Builder, run
from tests.tolerances import tolerance

IDS = np.array([[5, 6, 7], [8, 9, 4]])


def _classifier(op: str | None, name: str, **given: Any) -> ir.Model:
    """A classifier of texts, its scores behind `op`."""
    b = Builder()
    ids = b.input("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    x = b.node("Gather", [b.weight("words", 50, IN), ids], ["batch", "sequence", IN])
    x = b.node("MatMul", [x, b.weight("w", IN, IN)], ["batch", "sequence", IN], module="proj")
    x = b.node("ReduceMean", [x, b.constant("axis", np.array([1]))], ["batch", IN], keepdims=0)
    y = b.node("MatMul", [x, b.weight("v", IN, OUT)], None, module="classifier", name="scores")
    if op is not None:
        y = b.node(op, [y], ["batch", OUT], **given)
    return b.model(b.node("Identity", [y], ["batch", OUT], name=name))


@pytest.mark.parametrize("op", ["Softmax", "Sigmoid"])
@pytest.mark.parametrize("name", ["logits", "output_0"])
def test_the_logits_are_the_main_output(op: str, name: str, tmp_path: Path) -> None:
    model = _classifier(op, name)
    probabilities = run(model, {"input_ids": IDS})
    expected = run(_classifier(None, name), {"input_ids": IDS})
    ir.save(model, tmp_path / "model.onnx")
    manifest = export(tmp_path / "model.onnx", tmp_path / "b", task="sequence-classification")
    assert output_of(manifest) == "logits"
    kept = "probabilities" if name == "logits" else name
    found = AdapterSession(tmp_path / "b").run(["logits", kept], {"input_ids": IDS})
    for one, other in zip(found, (expected, probabilities), strict=True):
        assert np.abs(one - other).max() <= tolerance("torch-onnx-tiny")


@pytest.mark.parametrize(
    ("op", "name", "given"),
    [
        ("Tanh", "logits", {}),
        (None, "logits", {}),
        ("Softmax", "logits", {"axis": 0}),
        ("Sigmoid", "last_hidden_state", {}),
    ],
    ids=["an activation", "logits", "over the rows", "of an encoder"],
)
def test_other_outputs_stay(op: str | None, name: str, given: dict[str, int]) -> None:
    model = _classifier(op, name, **given)
    assert not give_logits(model.graph)
    assert [value.name for value in model.graph.outputs] == [name]


def test_logits_that_are_given_beside_stay_the_logits() -> None:
    model = _classifier("Softmax", "probabilities")
    scores = next(n for n in model.graph if n.name == "scores").outputs[0]
    model.graph.outputs.append(scores)
    assert not give_logits(model.graph)
    assert [value.name for value in model.graph.outputs] == ["probabilities", "scores"]
