"""Graphs that output probabilities get their logits as an output, so softmax is applied once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import loradeploy as ld
from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.files.peft import save_adapter
from loradeploy.adapter.heads import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from loradeploy.adapter.tasks import SEQUENCE_CLASSIFICATION
from loradeploy.bundle.fitting.labels import head_of
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.outputs import output_of
from loradeploy.bundle.text.pairs import pair_tokens
from loradeploy.errors import UsageError
from loradeploy.export.api import export
from loradeploy.export.read.values.probabilities import add_logits
from loradeploy.files import write_json
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.classification import SCORES
from tests.export.graphs import IN, OUT, Builder, run
from tests.inputs.pairs import give_rules
from tests.tolerances import tolerance

IDS = np.array([[5, 6, 7], [8, 9, 4]])


def _classifier(
    op: str | None, name: str, labels: int = OUT, tokens: bool = False, **given: Any
) -> ir.Model:
    """Return a classifier of texts or `tokens` with the operator `op` applied to its logits."""
    b = Builder()
    ids = b.input("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    x = b.node("Gather", [b.weight("words", 512, IN), ids], ["batch", "sequence", IN])
    x = b.node("MatMul", [x, b.weight("w", IN, IN)], ["batch", "sequence", IN], module="proj")
    shape = ["batch", "sequence", labels] if tokens else ["batch", labels]
    if not tokens:
        x = b.node("ReduceMean", [x, b.constant("axis", np.array([1]))], ["batch", IN], keepdims=0)
    y = b.node("MatMul", [x, b.weight("v", IN, labels)], None, module="classifier", name="scores")
    if op is not None:
        y = b.node(op, [y], shape, **given)
    return b.model(b.node("Identity", [y], shape, name=name))


def _with_tokenizer(model: ir.Model, tokenizer: Path, place: Path, **config: Any) -> Path:
    """An ONNX directory of `model` with the tokenizer of another, and a config.json."""
    place.mkdir()
    ir.save(model, place / "model.onnx")
    for file in tokenizer.glob("*token*"):
        shutil.copyfile(file, place / file.name)
    write_json(place / "config.json", {"vocab_size": 512, **config})
    return give_rules(place, None)


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
    assert add_logits(model.graph, SEQUENCE_CLASSIFICATION, None) is None
    assert [value.name for value in model.graph.outputs] == [name]


def test_logits_that_are_an_output_already_are_kept() -> None:
    model = _classifier("Softmax", "probabilities")
    scores = next(n for n in model.graph if n.name == "scores").outputs[0]
    model.graph.outputs.append(scores)
    assert add_logits(model.graph, SEQUENCE_CLASSIFICATION, None) is None
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


def test_the_number_of_a_regression_s_sigmoid_is_the_score_of_a_pair(
    tiny_bert: Path, tmp_path: Path
) -> None:
    model = _classifier("Sigmoid", "logits", 1)
    graph = _with_tokenizer(model, tiny_bert, tmp_path / "graph", problem_type=REGRESSION)
    export(graph, tmp_path / "b", task="sequence-classification")
    session = AdapterSession(tmp_path / "b")
    ids = np.array([pair_tokens(session.texts.base.tokenizer, "a cup", "won", max_length=64).ids])
    (expected,) = run(model, {"input_ids": ids})
    limit = tolerance("torch-onnx-tiny")
    for activation in (None, "sigmoid"):
        scorer = ld.TextPairScorer(session, activation=activation)
        assert abs(scorer.score([("a cup", "won")])[0] - expected[0]) <= limit
    (answer,) = ld.TextClassifier(session)([("a cup", "won")])
    assert abs(answer.score - expected[0]) <= limit


@pytest.mark.parametrize("stated", [MULTI_LABEL, SINGLE_LABEL])
def test_an_adapter_of_another_problem_is_not_read_through_the_sigmoid_of_a_regression(
    stated: str, tiny_bert: Path, tmp_path: Path
) -> None:
    model = _classifier("Sigmoid", "logits", 1)
    graph = _with_tokenizer(model, tiny_bert, tmp_path / "graph", problem_type=REGRESSION)
    config = AdapterConfig(r=1, lora_alpha=1, target_modules=("proj",), modules_to_save=("head",))
    factors = {"proj": Factors(np.ones((1, IN), np.float32), np.ones((IN, 1), np.float32))}
    save_adapter(Adapter(config, factors, problem_type=stated), tmp_path / "a")
    export(graph, tmp_path / "b", task="sequence-classification", adapters={"a": tmp_path / "a"})
    classifier = ld.TextClassifier(AdapterSession(tmp_path / "b"))
    with pytest.raises(UsageError, match="ends in the Sigmoid of a regression"):
        classifier("a cup", "a")


@pytest.mark.parametrize("op", ["Sigmoid", "Softmax"])
@pytest.mark.parametrize("name", ["logits", "scores_of_tokens"])
def test_tokens_are_answered_with_the_probabilities_of_the_graph(
    op: str, name: str, tiny_bert: Path, tmp_path: Path
) -> None:
    """By its config.json the graph is no language model, whose outputs have the same shape."""
    model = _classifier(op, name, tokens=True)
    given: dict[str, Any] = {"architectures": ["BertForTokenClassification"]}
    graph = _with_tokenizer(model, tiny_bert, tmp_path / "graph", **given)
    manifest = export(graph, tmp_path / "first")
    assert manifest.task == "token-classification"
    assert manifest.problem_type == (MULTI_LABEL if op == "Sigmoid" else None)
    export(tmp_path / "first", tmp_path / "again")
    for bundle in ("first", "again"):
        session = AdapterSession(tmp_path / bundle)
        (answer,) = ld.TokenClassifier(session)("won", aggregation="none")
        ids = np.array([session.texts.base.tokenizer.encode("won")])
        expected = run(model, {"input_ids": ids})[0].max(axis=-1)
        scores = [entity.score for entity in answer.entities]
        assert scores
        assert all(
            np.abs(expected - score).min() < tolerance("torch-onnx-tiny") for score in scores
        )


def test_an_encoder_gets_no_logits(tmp_path: Path) -> None:
    ir.save(_classifier("Sigmoid", "sentence_embedding"), tmp_path / "model.onnx")
    manifest = export(tmp_path / "model.onnx", tmp_path / "b", task="feature-extraction")
    assert [spec.name for spec in manifest.outputs] == ["sentence_embedding"]
    with pytest.raises(UsageError, match="do not show its task"):
        export(tmp_path / "model.onnx", tmp_path / "c")
