"""Labels and vectors: as transformers gives them, and the same in every batch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.adapter.peft import load_adapter, save_adapter
from loradeploy.errors import AdapterMismatchError, UsageError
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.classification import TextClassifier
from loradeploy.runtime.tasks.embedding import TextEmbedder
from tests.conftest import MakeAdapter
from tests.tolerances import tolerance

TEXTS = ["Shares fell.", "The match was won in the last minute of extra time", "A"]


@pytest.fixture
def classifier(
    tiny_bert_bundle: Path, bert_adapters: dict[str, Path], tmp_path: Path
) -> TextClassifier:
    """A classifier whose adapter `large` names its labels and `small` does not."""
    named = dataclasses.replace(load_adapter(bert_adapters["large"]), labels=("sport", "business"))
    save_adapter(named, tmp_path / "large")
    session = AdapterSession(tiny_bert_bundle)
    session.load("small", bert_adapters["small"])
    session.load("large", tmp_path / "large")
    return TextClassifier(session)


def test_scores_are_those_of_peft(
    classifier: TextClassifier, tiny_bert: Path, bert_adapters: dict[str, Path]
) -> None:
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    model = peft.PeftModel.from_pretrained(base, bert_adapters["small"]).eval()
    for text, result in zip(TEXTS, classifier(TEXTS, "small"), strict=True):
        ids = torch.tensor([classifier.tokenizer.encode(text)])
        with torch.no_grad():
            expected = torch.softmax(model(input_ids=ids).logits, -1)[0].numpy()
        scores = np.array(list(result.scores.values()))
        assert np.abs(scores - expected).max() <= tolerance("torch-onnx-tiny")
        assert result.score == scores.max()
        assert result.label == list(result.scores)[int(scores.argmax())]


def test_a_text_gets_the_same_score_in_every_batch(classifier: TextClassifier) -> None:
    adapters = ["small", None, "large"]
    together = classifier(TEXTS, adapters)
    for batch_size in (1, 2):
        for ours, theirs in zip(
            classifier(TEXTS, adapters, batch_size=batch_size), together, strict=True
        ):
            assert ours.label == theirs.label
            assert abs(ours.score - theirs.score) <= tolerance("rows")
    (alone,) = classifier(TEXTS[2], "large")
    assert abs(alone.score - together[2].score) <= tolerance("rows")


def test_labels_are_the_adapters_own_else_the_bundles(classifier: TextClassifier) -> None:
    small, large, base = classifier([TEXTS[0]] * 3, ["small", "large", None])
    assert list(large.scores) == ["sport", "business"]
    assert list(small.scores) == list(base.scores) == ["LABEL_0", "LABEL_1"]
    assert (small.adapter, large.adapter, base.adapter) == ("small", "large", None)
    assert base.score == 0.5  # the checkpoint has no head


def test_a_long_text_is_cut_and_not_refused(classifier: TextClassifier) -> None:
    (result,) = classifier(["word " * 500], "small")
    assert 0 < result.score <= 1


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no texts"),
        (["a"], {"adapters": ["small", "small"]}, "2 adapters for a batch of 1 rows"),
        (["a"], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_classified_is_refused(
    classifier: TextClassifier, texts: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        classifier(texts, **options)


def test_a_decoder_is_no_classifier(llama_session: AdapterSession) -> None:
    with pytest.raises(UsageError, match="no classifier"):
        TextClassifier(llama_session)
    with pytest.raises(UsageError, match="no embeddings"):
        TextEmbedder(llama_session)


def test_a_model_whose_scores_are_no_probabilities_is_refused(
    tiny_bert_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bert_bundle, tmp_path / "copy")
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps({**config, "problem_type": "regression"}))
    with pytest.raises(UsageError, match="regression"):
        TextClassifier(AdapterSession(bundle))


def test_vectors_are_masked_means_of_length_one(
    tiny_bert: Path, bert_adapters: dict[str, Path], tmp_path: Path
) -> None:
    import peft
    import torch
    from transformers import AutoModel

    from loradeploy.export.api import export

    export(tiny_bert, tmp_path / "bundle", task="feature-extraction")
    session = AdapterSession(tmp_path / "bundle")
    session.load("small", bert_adapters["headless"])
    embed = TextEmbedder(session)
    vectors = embed(TEXTS, ["small", None, "small"])
    assert vectors.shape == (3, 48) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    model = peft.PeftModel.from_pretrained(
        AutoModel.from_pretrained(tiny_bert), bert_adapters["headless"]
    ).eval()
    ids = torch.tensor([embed.tokenizer.encode(TEXTS[0])])
    with torch.no_grad():
        mean = model(input_ids=ids).last_hidden_state[0].mean(0)
    expected = (mean / mean.norm()).numpy()
    assert np.abs(vectors[0] - expected).max() <= tolerance("torch-onnx-tiny")
    assert np.abs(vectors[0] - embed(TEXTS[0])[0]).max() > 1e-3


def test_adapters_with_different_numbers_of_labels_share_a_batch(
    tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    task = "sequence-classification"
    adapters = {
        f"n{count}": make_adapter(tiny_bert, task=task, num_labels=count, seed=count, scale=0.1)
        for count in (2, 5, 3)
    }
    bundle = tmp_path / "bundle"
    manifest = export(tiny_bert, bundle, adapters=adapters, task=task)
    assert {s.shape[0] for s in manifest.saved if s.parameter.startswith("classifier")} == {5}
    classify = TextClassifier(AdapterSession(bundle))
    texts = ["Shares rose", "The striker", "A new phone"]
    for result, count in zip(classify(texts, ["n2", "n5", "n3"]), (2, 5, 3), strict=True):
        assert len(result.scores) == count
        assert sum(result.scores.values()) == pytest.approx(1)
        (alone,) = classify([texts[(2, 5, 3).index(count)]], f"n{count}")
        assert result.label == alone.label
        assert result.score == pytest.approx(alone.score, abs=1e-5)
    report = ld.parity(bundle, model=tiny_bert, prompts=texts)
    assert report.passed
    later = make_adapter(tiny_bert, task=task, num_labels=4, seed=9)
    classify.session.load("later", later)
    assert len(classify([texts[0]], "later")[0].scores) == 4
    many = make_adapter(tiny_bert, task=task, num_labels=6, seed=9)
    with pytest.raises(AdapterMismatchError, match=r"classifier\.\w+ is \[6"):
        classify.session.load("many", many)
