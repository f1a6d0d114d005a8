"""Embeddings, labels and scores over HTTP equal those of the library."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from loradeploy.runtime.tasks.classification import TextClassifier
from loradeploy.runtime.tasks.embedding import TextEmbedder
from loradeploy.runtime.tasks.pairs import TextPairScorer
from tests.conftest import MakeAdapter
from tests.inputs.pairs import give_rules
from tests.inputs.sentence import write
from tests.runtime.tasks.test_embedding import (  # noqa: F401 - fixtures
    sentence_adapters,
    sentence_base,
    sentence_bundle,
)
from tests.serve.conftest import Running, serving

TEXTS = ["Shares fell.", "The team won the cup in extra time"]


@pytest.fixture(scope="module")
def embedder(sentence_bundle: Path) -> Iterator[Running]:  # noqa: F811
    """A server of the tiny BERT as an embedding model with its adapters."""
    with serving(sentence_bundle, max_inputs=8) as running:
        yield running


@pytest.fixture(scope="module")
def classifier(
    tiny_bert: Path,
    tiny_bert_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """A server of the tiny BERT as a classifier with adapters of two labels and of one score."""
    place = tmp_path_factory.mktemp("classifier")
    shutil.copytree(tiny_bert_bundle, place / "bundle")
    give_rules(place / "bundle")
    made = {"task": "sequence-classification", "modules_to_save": ["classifier"], "scale": 0.3}
    heads = {
        "small": (2, {"problem_type": "single_label_classification", "id2label": {0: "a", 1: "b"}}),
        "score": (1, {"problem_type": "regression", "id2label": {0: "score"}}),
    }
    for name, (labels, config) in heads.items():
        own = make_adapter(tiny_bert, r=4, seed=labels, num_labels=labels, **made)
        shutil.copytree(own, place / name)
        (place / name / "config.json").write_text(json.dumps(config))
    adapters = {name: place / name for name in heads}
    with serving(place / "bundle", adapters=adapters) as running:
        yield running


def test_the_client_gets_the_librarys_vectors(embedder: Running) -> None:
    client, library = embedder.client(), TextEmbedder(embedder.service.session)
    base = embedder.service.catalog.base
    texts = ["The bank", "A b"]  # the adapter `other` has its own prompt "Find: "
    effect = []
    for model, adapter, prompt in (
        (base, None, ""),
        ("plain", "plain", ""),
        ("other",) * 2 + ("Find: ",),
    ):
        answer = client.embeddings.create(model=model, input=texts)  # base64, decoded by the client
        found = np.array([one.embedding for one in answer.data], np.float32)
        expected = library(texts, adapter)
        assert np.array_equal(found, expected)
        numbers = client.embeddings.create(model=model, input=texts, encoding_format="float")
        vectors = np.array([one.embedding for one in numbers.data], np.float32)
        assert np.array_equal(vectors, expected)
        tokens = sum(len(library.tokenizer.encode(prompt + text)) for text in texts)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
        effect.append(found)
    for one, another in itertools.combinations(effect, 2):
        assert np.abs(one - another).max() > 0.01
    named = client.embeddings.create(
        model="other", input=texts, extra_body={"prompt_name": "none"}, encoding_format="float"
    )
    vectors = np.array([one.embedding for one in named.data], np.float32)
    assert np.array_equal(vectors, library(texts, "other", prompt_name="none"))
    assert np.abs(vectors - effect[2]).max() > 0.01
    size = effect[0].shape[1]
    whole = client.embeddings.create(model=base, input=texts[0], dimensions=size)
    assert len(whole.data[0].embedding) == size


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dimensions": 7}, "dimensions"),
    ({"input": [1, 2, 3]}, "input"),
    ({"input": []}, "input"),
    ({"input": ["x"] * 9}, "input"),
    ({"input": "word " * 400}, "truncate"),
    ({"encoding_format": "int8"}, "encoding_format"),
    ({"pooling": "mean"}, "pooling"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[:30])
def test_invalid_embedding_requests_are_refused_by_name(
    embedder: Running, body: dict[str, Any], param: str
) -> None:
    http = embedder.http()
    given = {"model": embedder.service.catalog.base, "input": "x", **body}
    answer = http.post("/v1/embeddings", json=given)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].partition(".")[0] == param


def test_a_long_text_is_truncated_on_request(embedder: Running) -> None:
    text = "word " * 400
    library = TextEmbedder(embedder.service.session)
    http = embedder.http()
    body = {"model": "plain", "input": text, "truncate": True}
    answer = http.post("/v1/embeddings", json=body).json()
    assert answer["usage"]["prompt_tokens"] == 6  # the limit in its own files
    assert np.array_equal(np.float32(answer["data"][0]["embedding"]), library([text], "plain")[0])


def test_texts_of_a_model_without_a_maximum_length_are_limited(
    classifier: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = classifier.service.session.texts.of("small").tokenizer
    monkeypatch.setattr(tokenizer, "positions", None)
    monkeypatch.setattr(tokenizer, "max_length", None)
    http = classifier.http()
    for truncate in (False, True):  # there is no length to truncate to
        body = {"model": "small", "input": ["x", "word " * 8200], "truncate": truncate}
        answer = http.post("/v1/classify", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "input"
        assert "text 2 has " in answer.json()["error"]["message"]
        assert "the service takes 8192" in answer.json()["error"]["message"]
    assert http.post("/v1/classify", json={"model": "small", "input": "x"}).status_code == 200


def test_texts_are_classified_as_by_the_library(classifier: Running) -> None:
    library = TextClassifier(classifier.service.session)
    http = classifier.http()
    for adapter in ("small", "score"):
        answer = http.post("/v1/classify", json={"model": adapter, "input": TEXTS}).json()
        for found, expected in zip(answer["data"], library(TEXTS, adapter), strict=True):
            assert found["scores"] == expected.scores
            assert (found["label"], found["labels"]) == (expected.label, list(expected.labels))
            assert found["num_classes"] == len(found["probs"]) == len(expected.scores)
    refused = http.post("/v1/classify", json={"model": "small", "input": "x", "threshold": 0.4})
    assert refused.status_code == 400
    assert "threshold" in refused.json()["error"]["message"]


def test_documents_are_ranked_as_by_the_library(classifier: Running) -> None:
    documents = ["Shares fell.", "The cup was won", "A new phone", "It rains"]
    query = "Which match was won?"
    library = TextPairScorer(classifier.service.session)
    expected = library.rerank(query, documents, "score")
    body = {"model": "score", "query": query, "documents": documents}
    http = classifier.http()
    answer = http.post("/v1/rerank", json=body).json()
    best = http.post("/v1/rerank", json={**body, "top_n": 2, "return_documents": False}).json()
    several = http.post("/v1/rerank", json={**body, "model": "small"})
    found = [(one["index"], one["relevance_score"]) for one in answer["results"]]
    assert found == [(one.index, one.score) for one in expected]
    assert len({score for _, score in found}) == len(documents)
    assert answer["results"][0]["document"]["text"] == documents[found[0][0]]
    assert [one["index"] for one in best["results"]] == [index for index, _ in found[:2]]
    assert best["results"][0]["document"] is None
    assert several.status_code == 400  # a score needs a single output


def test_other_tasks_are_refused_with_a_message(classifier: Running) -> None:
    client = classifier.client()
    with pytest.raises(openai.NotFoundError, match="it generates no text"):
        client.completions.create(model="small", prompt="x")
    with pytest.raises(openai.NotFoundError, match="it gives no embeddings"):
        client.embeddings.create(model="small", input="x")


def test_the_metrics_of_an_encoder_are_counted(classifier: Running) -> None:
    http = classifier.http()
    http.post("/v1/classify", json={"model": "small", "input": TEXTS})
    text = http.get("/metrics").text
    assert "loradeploy:num_requests_running 0.0" in text
    assert "loradeploy:num_requests_waiting 0.0" in text
    count = next(
        line for line in text.splitlines() if line.startswith("loradeploy:encoder_texts_total ")
    )
    assert float(count.split()[1]) >= 2


def test_documents_are_scored_by_the_files_of_the_adapters_cross_encoder(
    tiny_bert: Path, tiny_bert_bundle: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bert_bundle, tmp_path / "bundle")
    give_rules(tmp_path / "bundle")
    made = {"task": "sequence-classification", "modules_to_save": ["classifier"], "scale": 0.3}
    own = make_adapter(tiny_bert, r=4, seed=1, num_labels=1, **made)
    adapters = {name: tmp_path / name for name in ("plain", "prompted")}
    for place in adapters.values():
        shutil.copytree(own, place)
        (place / "config.json").write_text(json.dumps({"problem_type": "regression"}))
    settings = {
        "model_type": "CrossEncoder",
        "activation_fn": "torch.nn.modules.linear.Identity",
        "prompts": {"query": "Which of these: "},
        "default_prompt_name": "query",
    }
    write(adapters["prompted"], config_sentence_transformers=settings)
    body = {"query": "Which match was won?", "documents": TEXTS}
    with serving(tmp_path / "bundle", adapters=adapters) as running:
        scorer = TextPairScorer(running.service.session)
        http = running.http()
        found = {
            name: http.post("/v1/rerank", json={**body, "model": name}).json() for name in adapters
        }
        for name, answer in found.items():
            expected = scorer.rerank(str(body["query"]), TEXTS, name)
            scores = [one["relevance_score"] for one in answer["results"]]
            assert scores == pytest.approx([one.score for one in expected], abs=1e-6)
        tokens = {name: answer["usage"]["prompt_tokens"] for name, answer in found.items()}
        prompt = len(scorer.tokenizer.encode("Which of these:", special_tokens=False))
        assert tokens["prompted"] - tokens["plain"] >= len(TEXTS) * prompt > 0
