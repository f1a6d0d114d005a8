"""Graphs that output probabilities get their logits as an output, so softmax is applied once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.heads import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from loradeploy.adapter.tasks import SEQUENCE_CLASSIFICATION
from loradeploy.bundle.fitting.labels import head_of
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import UsageError
from loradeploy.export.api import export
from loradeploy.export.read.probabilities import give_logits
from loradeploy.files import write_json
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.classification import SCORES
from tests.export.graphs import IN, OUT, Builder, run
from tests.tolerances import tolerance

IDS = np.array([[5, 6, 7], [8, 9, 4]])


def _classifier(op: str | None, name: str, labels: int = OUT, **given: Any) -> ir.Model:
    """Return a text classifier with the operator `op` applied to its logits."""
    b = Builder()
    ids = b.input("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    x = b.node("Gather", [b.weight("words", 50, IN), ids], ["batch", "sequence", IN])
    x = b.node("MatMul", [x, b.weight("w", IN, IN)], ["batch", "sequence", IN], module="proj")
    x = b.node("ReduceMean", [x, b.constant("axis", np.array([1]))], ["batch", IN], keepdims=0)
    y = b.node("MatMul", [x, b.weight("v", IN, labels)], None, module="classifier", name="scores")
    if op is not None:
        y = b.node(op, [y], ["batch", labels], **given)
    return b.model(b.node("Identity", [y], ["batch", labels], name=name))


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
def test_other_outputs_are_not_changed(op: str | None, name: str, given: dict[str, int]) -> None:
    model = _classifier(op, name, **given)
    assert give_logits(model.graph, SEQUENCE_CLASSIFICATION, None) is None
    assert [value.name for value in model.graph.outputs] == [name]


def test_logits_that_are_an_output_already_are_kept() -> None:
    model = _classifier("Softmax", "probabilities")
    scores = next(n for n in model.graph if n.name == "scores").outputs[0]
    model.graph.outputs.append(scores)
    assert give_logits(model.graph, SEQUENCE_CLASSIFICATION, None) is None
    assert [value.name for value in model.graph.outputs] == ["probabilities", "scores"]


@pytest.mark.parametrize(
    ("op", "labels", "stated", "expected"),
    [
        ("Sigmoid", OUT, None, MULTI_LABEL),
        ("Sigmoid", OUT, SINGLE_LABEL, SINGLE_LABEL),
        ("Sigmoid", 1, None, MULTI_LABEL),
        ("Sigmoid", 1, REGRESSION, REGRESSION),
        ("Softmax", OUT, None, SINGLE_LABEL),
    ],
)
def test_the_problem_type_is_that_of_the_config_or_follows_from_the_operator(
    op: str, labels: int, stated: str | None, expected: str, tmp_path: Path
) -> None:
    """Labels and scores are those of the graph, unless the config states another problem type."""
    model = _classifier(op, "scores_of_labels", labels)
    (given,) = run(model, {"input_ids": IDS[:1]})
    ir.save(model, tmp_path / "model.onnx")
    write_json(tmp_path / "config.json", {"problem_type": stated, "vocab_size": 50})
    manifest = export(tmp_path / "model.onnx", tmp_path / "b", task="sequence-classification")
    assert manifest.problem_type == expected
    session = AdapterSession(tmp_path / "b")
    (raw,) = session.run([output_of(manifest)], {"input_ids": IDS[:1]})
    answers = SCORES[expected](raw[0])
    same = (op, stated) != ("Sigmoid", SINGLE_LABEL)
    assert (np.abs(answers - given).max() <= tolerance("torch-onnx-tiny")) == same


def test_an_adapter_without_a_head_uses_the_problem_type_of_the_graph(tmp_path: Path) -> None:
    """Without a config.json too: the bundle gets one with the problem type."""
    ir.save(_classifier("Sigmoid", "logits"), tmp_path / "model.onnx")
    manifest = export(tmp_path / "model.onnx", tmp_path / "b", task="sequence-classification")
    config = AdapterConfig(r=1, lora_alpha=1, target_modules=("proj",))
    factors = {"proj": Factors(np.ones((1, IN), np.float32), np.ones((IN, 1), np.float32))}
    adapter = Adapter(config, factors)
    assert head_of(adapter, manifest, model_config(tmp_path / "b")).problem_type == MULTI_LABEL


def test_an_encoder_gets_no_logits(tmp_path: Path) -> None:
    ir.save(_classifier("Sigmoid", "sentence_embedding"), tmp_path / "model.onnx")
    manifest = export(tmp_path / "model.onnx", tmp_path / "b", task="feature-extraction")
    assert [spec.name for spec in manifest.outputs] == ["sentence_embedding"]
    with pytest.raises(UsageError, match="do not show its task"):
        export(tmp_path / "model.onnx", tmp_path / "c")
