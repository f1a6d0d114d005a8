"""Pairs of texts: classes, scores and ranks equal those of transformers and PEFT, per row."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.text.pairs import pair_tokens
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import BundleError, DataError, UsageError
from loradeploy.parity.inputs.row_feeds import plain_feeds, types_of
from loradeploy.parity.inputs.tokens import make_cases
from loradeploy.runtime.prompts import read_requests
from loradeploy.runtime.tasks.encoder import given_texts
from loradeploy.runtime.text.padding import pad
from tests.cli.calling import call
from tests.conftest import MakeAdapter
from tests.inputs.pairs import give_rules
from tests.tolerances import tolerance
from tests.train.conftest import WORDS, write_lines

QUERY = "Which match was won?"
DOCUMENTS = ["Shares fell.", "The team won the cup in extra time", "", "A new phone " * 60]
PAIRS = [(QUERY, document) for document in DOCUMENTS]
TRAINED = {"task": "sequence-classification", "problem_type": "multi-label", "learning_rate": 2e-2}


def related(file: Path) -> Path:
    """Write pairs of words, labeled as related if both are of one topic."""
    topics = list(WORDS)
    rows = [
        {
            "text": WORDS[topic][n],
            "text_pair": WORDS[other][n + 1],
            "label": ["related"] if topic == other else [],
        }
        for n in range(7)
        for topic in topics
        for other in topics
    ]
    return write_lines(file, rows)


@pytest.fixture(scope="module")
def model(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with a tokenizer that sets token types for pairs."""
    place = tmp_path_factory.mktemp("pairs") / "model"
    shutil.copytree(tiny_bert, place)
    return give_rules(place)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a single output, trained on pairs."""
    place = tmp_path_factory.mktemp("adapter")
    data = related(place / "related.jsonl")
    ld.train(model, data, place / "related", max_steps=6, batch_size=8, rank=4, **TRAINED)
    return place / "related"


@pytest.fixture(scope="module")
def bundle(tiny_bert_bundle: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundle") / "bundle"
    shutil.copytree(tiny_bert_bundle, place)
    return give_rules(place)


@pytest.fixture
def session(bundle: Path, adapter: Path, bert_adapters: dict[str, Path]) -> ld.AdapterSession:
    session = ld.AdapterSession(bundle)
    session.load("related", adapter)
    session.load("small", bert_adapters["small"])
    return session


def peft_logits(model: Path, adapter: Path, *, labels: int = 1, types: bool = True) -> NDArray[Any]:
    """Return PEFT's logits [pairs, labels] for PAIRS; token types are all 0 without `types`."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels)
    tuned = peft.PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for pair in PAIRS:
        fed = tokenizer([pair[0]], [pair[1]], truncation=True, return_tensors="pt")
        if not types:
            fed.pop("token_type_ids")
        with torch.no_grad():
            rows.append(tuned(**fed).logits[0].numpy())
    return np.stack(rows)


def sigmoid(logits: NDArray[Any]) -> NDArray[Any]:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def test_classes_and_scores_of_pairs_are_those_of_transformers_and_peft(
    session: ld.AdapterSession,
    model: Path,
    adapter: Path,
    bert_adapters: dict[str, Path],
    make_adapter: MakeAdapter,
) -> None:
    one_output = make_adapter(model, task="sequence-classification", num_labels=1)
    logits = peft_logits(model, adapter)[:, 0]
    scorer, limit = ld.TextPairScorer(session), tolerance("torch-onnx-tiny")
    scores = scorer.score(PAIRS, "related")
    assert np.abs(scores - sigmoid(logits)).max() <= limit
    untyped = peft_logits(model, adapter, types=False)[:, 0]
    assert np.abs(scores - sigmoid(untyped)).max() > 10 * limit, "token types are seen"
    numbers = ld.TextPairScorer(session, activation="identity").score(PAIRS, "related")
    assert np.abs(numbers - logits).max() <= limit
    session.load("peft", one_output)  # its files declare no labels
    theirs = sigmoid(peft_logits(model, one_output)[:, 0])
    assert np.abs(scorer.score(PAIRS, "peft") - theirs).max() <= limit

    expected = peft_logits(model, bert_adapters["small"], labels=2)
    found = ld.TextClassifier(session)([list(pair) for pair in PAIRS], "small")  # type: ignore[misc]
    given = np.array([list(one.scores.values()) for one in found])
    exponents = np.exp(expected - expected.max(-1, keepdims=True))
    assert np.abs(given - exponents / exponents.sum(-1, keepdims=True)).max() <= limit


def test_the_score_of_a_pair_does_not_depend_on_the_batch(
    session: ld.AdapterSession, bert_adapters: dict[str, Path]
) -> None:
    classify = ld.TextClassifier(session)
    texts = [PAIRS[1], PAIRS[1], PAIRS[1], PAIRS[1][0], PAIRS[3]]
    session.load("large", bert_adapters["large"])
    adapters = ["related", "small", "large", "small", "related"]
    together = classify(texts, adapters)
    for text, name, one in zip(texts, adapters, together, strict=True):
        (alone,) = classify([text], name)
        assert list(alone.scores) == list(one.scores)
        assert abs(alone.score - one.score) <= tolerance("rows")
    assert together[1].score != together[3].score, "the second text is seen"
    assert together[1].score != together[2].score, "the adapter is seen"
    scorer = ld.TextPairScorer(session)
    whole = scorer.score(PAIRS, "related")
    assert np.abs(scorer.score(PAIRS, "related", batch_size=1) - whole).max() <= tolerance("rows")
    assert len({round(score, 9) for score in whole}) == len(PAIRS)


def test_documents_are_ranked_by_their_scores(session: ld.AdapterSession) -> None:
    scorer = ld.TextPairScorer(session)
    scores = scorer.score(PAIRS, "related")
    ranked = scorer.rerank(QUERY, DOCUMENTS, "related")
    assert [one.index for one in ranked] == [int(i) for i in np.argsort(-scores)]
    assert ranked == [ld.RankedDocument(one.index, float(scores[one.index])) for one in ranked]
    assert scorer.rerank(QUERY, DOCUMENTS, "related", top_k=2) == ranked[:2]
    twice = scorer.rerank(QUERY, [DOCUMENTS[0]] * 3, "related")
    assert [one.index for one in twice] == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.score(PAIRS), "the base has no trained head"),
        (lambda s: s.score(PAIRS, "small"), "adapter 'small' has 2 outputs .*TextClassifier"),
        (lambda s: s.score(["a"], "related"), "pair 1 is the text 'a': give two texts"),
        (lambda s: s.score([("a", 1)], "related"), "a pair is of two str"),
        (lambda s: s.score([], "related"), "no texts"),
        (lambda s: s.rerank(QUERY, DOCUMENTS[1], "related"), "a list of documents"),
        (lambda s: s.rerank(QUERY, DOCUMENTS, "related", top_k=0), "top_k is 0"),
        (lambda s: type(s)(s.session, activation="tanh"), "`activation` is 'tanh': give sigmoid"),
    ],
)
def test_adapters_and_texts_without_a_score_are_refused(
    session: ld.AdapterSession, call: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        call(ld.TextPairScorer(session))


@pytest.mark.parametrize(
    ("declared", "activation"),
    [
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            "identity",
        ),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, None),
        ({}, "sigmoid"),
    ],
)
def test_the_activation_is_read_from_sentence_transformers_files(
    bundle: Path, tmp_path: Path, declared: dict[str, Any], activation: str | None
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    file = tmp_path / "bundle" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | declared))
    session = ld.AdapterSession(tmp_path / "bundle")
    if activation is None:
        with pytest.raises(BundleError, match=r"config\.json: the activation .*Tanh.*sigmoid or"):
            ld.TextPairScorer(session)
    else:
        assert ld.TextPairScorer(session).activation == activation


def test_the_command_line_runs_and_checks_pairs(
    session: ld.AdapterSession, bundle: Path, model: Path, adapter: Path, tmp_path: Path
) -> None:
    lines = [{"text": a, "text_pair": b, "adapter": str(adapter)} for a, b in PAIRS]
    asked = write_lines(
        tmp_path / "asked.jsonl", [*lines, {"text": QUERY, "adapter": str(adapter)}]
    )
    printed = [
        json.loads(line) for line in call("run", bundle, "--input", asked, "--json").splitlines()
    ]
    assert [(one["text"], one.get("text_pair")) for one in printed] == [*PAIRS, (QUERY, None)]
    expected = ld.TextPairScorer(session).score(PAIRS, "related")
    assert np.allclose([one["scores"]["related"] for one in printed[:-1]], expected)

    checked = tmp_path / "bundle"
    shutil.copytree(bundle, checked)
    report = ld.parity(
        checked,
        model=model,
        adapters={"related": adapter},
        prompts=asked,
        evaluate=related(tmp_path / "data.jsonl"),
        examples=20,
    )
    assert report.passed, report
    assert {score.metric for score in report.scores} >= {"micro_f1"}


def test_parity_uses_token_types_for_pairs(bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    cases = make_cases(bundle, manifest, prompts=[PAIRS[1], QUERY], generated=None, seed=0)
    (tokens, text, *_), tokenizer = cases.prompts, Tokenizer(bundle)
    types = pair_tokens(tokenizer, *PAIRS[1], max_length=None).types
    assert types is not None
    ids, mask = pad([text, tokens], cases.pad, left=False)
    fed = plain_feeds(manifest, ids, mask, cases.known)["token_type_ids"]
    assert fed.tolist() == [[0] * ids.shape[1], list(types)]
    with pytest.raises(DataError, match="a text and a pair of texts are the same tokens"):
        types_of([(tokens, types), (tokens, None)])
    decoder = dataclasses.replace(manifest, task="feature-extraction")
    with pytest.raises(UsageError, match="pairs of texts, and the bundle is for feature-ext"):
        make_cases(bundle, decoder, prompts=[PAIRS[1]], generated=None, seed=0)


def test_an_export_declares_whether_pairs_have_token_types(
    tiny_bert_bundle: Path, tiny_bert: Path, model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    from loradeploy.export.files.tokenizers import declare_token_types

    names = AutoTokenizer.from_pretrained(tiny_bert).model_input_names
    settings = json.loads((tiny_bert_bundle / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == names

    shutil.copytree(model, tmp_path / "base")
    source = tmp_path / "base" / "tokenizer_config.json"
    values = {"tokenizer_class": "BertTokenizer", "pad_token": "<|endoftext|>"}
    source.write_text(json.dumps(values))
    shutil.copytree(tmp_path / "base", tmp_path / "bundle")
    declare_token_types(tmp_path / "base", tmp_path / "bundle")
    assert Tokenizer(tmp_path / "bundle").token_types


def test_other_tasks_refuse_pairs(
    session: ld.AdapterSession, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    asked = write_lines(tmp_path / "asked.jsonl", [{"text": "a", "text_pair": "b"}])
    with pytest.raises(UsageError, match="text_pair: only for sequence classifiers"):
        call("run", tiny_llama_bundle, "--input", asked)
    for line in ({"prompt": "a", "text_pair": "b"}, {"text": "a", "text_pair": 1}):
        with pytest.raises(DataError, match="line 1: give a pair as two texts, text and text_pair"):
            read_requests(write_lines(tmp_path / "broken.jsonl", [line]))
    with pytest.raises(UsageError, match=r"text 1 is a pair .*: sequence classifiers take pairs"):
        given_texts([PAIRS[0]])  # type: ignore[list-item]
