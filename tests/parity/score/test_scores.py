"""Task metrics on held-out data: correct bundles keep the score, wrong ones fail."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import DataError, UsageError
from loradeploy.parity.backends.table import BACKENDS
from loradeploy.parity.checks.mistakes import wrong_adapter
from loradeploy.parity.figures.tolerances import UNIT
from loradeploy.parity.report.results import ParityReport, Score, Variant
from loradeploy.parity.score.heldout import Example, check_data
from loradeploy.parity.score.scores import SCORE_LIMITS, Answers, _loss, judge_score
from tests.cli.calling import exit_status
from tests.conftest import MakeAdapter, Topics, generated_tokens, once
from tests.train.conftest import WORDS, write_lines

ANY = BACKENDS[0]
PROMPTS = ["Hi", "The capital of France is"]
Parity = Callable[..., ParityReport]


@pytest.fixture
def parity() -> Parity:
    """A function that runs `loradeploy.parity` with scores and little else."""

    def run(bundle: Path, **options: Any) -> ParityReport:
        given = {"prompts": PROMPTS, "certificate": False, "examples": 40}
        return ld.parity(bundle, **{**given, "tokens": generated_tokens(bundle, 2), **options})

    return run


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty labeled texts of words of three topics."""
    generator = random.Random(0)
    return write_lines(
        tmp_path_factory.mktemp("topics") / "topics.jsonl",
        [
            {"text": " ".join(generator.choices(words, k=3 + number % 9)), "label": topic}
            for number in range(20)
            for topic, words in WORDS.items()
        ],
    )


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of different lengths, each with a fixed completion."""
    lines = [
        {"prompt": f"Question {'!' * (n % 7)} {n}:", "completion": f" answer {n % 3}."}
        for n in range(30)
    ]
    return write_lines(tmp_path_factory.mktemp("lessons") / "lessons.jsonl", lines)


@pytest.fixture(scope="module")
def classifier(shared: Path, tiny_bert: Path, topics: Path) -> Path:
    """An adapter for the tiny BERT, trained to classify the topics."""
    return _trained(
        shared / "topics-adapter", tiny_bert, topics, task="sequence-classification", max_steps=60
    )


@pytest.fixture(scope="module")
def speaker(shared: Path, tiny_llama: Path, lessons: Path) -> Path:
    """An adapter for the tiny Llama, trained on the prompts and completions of `lessons`."""
    return _trained(shared / "lessons-adapter", tiny_llama, lessons, max_steps=40)


def _trained(place: Path, model: Path, data: Path, **settings: Any) -> Path:
    given = {"batch_size": 8, "rank": 8, "learning_rate": 5e-3, "max_length": 64, **settings}
    return once(place, lambda partial: ld.train(model, data, partial, **given))


@pytest.fixture(scope="module")
def bundles(
    shared: Path, tiny_bert: Path, tiny_llama: Path, classifier: Path, speaker: Path
) -> dict[str, Path]:
    """A bundle with side inputs and the trained adapter for each task."""
    return {
        name: once(
            shared / f"scored-{name}",
            lambda place, model=model, adapter=adapter: ld.export(  # type: ignore[misc]
                model, place, adapters={"it": adapter}
            ),
        )
        for name, model, adapter in (
            ("accuracy", tiny_bert, classifier),
            ("perplexity", tiny_llama, speaker),
        )
    }


def scores(report: ParityReport) -> dict[tuple[str, str | None], Score]:
    """Return the first metric of each backend and adapter."""
    found = reversed(report.scores)
    return {(score.backend, score.adapter): score for score in found}


# -- what agrees -------------------------------------------------------------------------------


def test_a_classifier_keeps_its_accuracy(
    tiny_bert: Path, bundles: dict[str, Path], topics: Path, parity: Parity
) -> None:
    report = parity(bundles["accuracy"], model=tiny_bert, evaluate=topics)
    assert report.passed, report.failures
    found = scores(report)
    assert found.keys() == {("onnx-side-inputs", "it"), ("onnx-merged", "it")}
    for score in found.values():
        assert (score.metric, score.examples) == ("accuracy", 40)
        assert score.value == score.reference > 0.9, "the adapter learned nothing"
        # Forty examples that all agree still leave an interval of this width.
        assert (score.low, score.high) == pytest.approx((-0.0876, 0.0876), abs=1e-3)
    f1 = [score for score in report.scores if score.metric == "macro_f1"]
    assert len(f1) == 2 and all(score.value == score.reference > 0.9 for score in f1)
    assert f"scores: 40 of 60 examples in {topics}" in report.notes


def test_scores_are_those_of_the_first_of_two_settings_of_one_provider(
    bundles: dict[str, Path], tiny_bert: Path, topics: Path, parity: Parity
) -> None:
    report = parity(
        bundles["accuracy"],
        model=tiny_bert,
        evaluate=topics,
        providers=["cpu", ("cpu", {"arena": "0"})],
        optimization=["basic"],
        backends=["onnx-side-inputs"],
        others=[f"base={bundles['accuracy']}/model.onnx"],
        phases=["padded-batch"],
        controls=False,
    )
    assert report.passed, report.failures
    assert {(r.backend, r.variant) for r in report.results} == {
        ("onnx-side-inputs", Variant("cpu", "basic")),
        ("onnx-side-inputs", Variant("cpu arena=0", "basic")),
        ("other:base", None),
    }
    assert [(score.backend, score.metric) for score in report.scores] == [
        ("onnx-side-inputs", "accuracy"),
        ("onnx-side-inputs", "macro_f1"),
    ]
    assert f"scores: 40 of 60 examples in {topics}, on cpu, basic" in report.notes


def test_a_language_model_keeps_its_perplexity_with_the_adapter_and_without(
    tiny_llama: Path, bundles: dict[str, Path], lessons: Path, parity: Parity
) -> None:
    report = parity(bundles["perplexity"], model=tiny_llama, evaluate=lessons)
    assert report.passed, report.failures
    found = scores(report)
    side, base = found["onnx-side-inputs", "it"], found["onnx-side-inputs", None]
    assert found.keys() == {
        ("onnx-side-inputs", None), ("onnx-side-inputs", "it"), ("onnx-merged", "it"),
    }  # fmt: skip
    assert 1 < side.reference < base.reference / 10, "the adapter learned nothing"
    for score in found.values():
        assert score.low <= score.difference <= score.high
        assert abs(score.difference) < 1e-4 * score.reference
        assert score.limit == pytest.approx(0.001 * score.reference)


def test_the_perplexity_is_that_of_the_models_own_loss(
    tiny_llama: Path, bundles: dict[str, Path], lessons: Path, parity: Parity
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loradeploy.train.data.examples import read_conversations
    from loradeploy.train.data.features import Collator, conversation_features
    from loradeploy.train.data.sources import Source

    report = parity(bundles["perplexity"], model=tiny_llama, evaluate=lessons)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    features = conversation_features(read_conversations(Source(lessons)), tokenizer, 128).features
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        loss = model(**Collator(tokenizer.pad_token_id)(features)).loss
    message = scores(report)["onnx-side-inputs", None].reference
    assert message == pytest.approx(float(loss.exp()), rel=1e-4)


def test_the_same_seed_draws_the_same_examples_and_another_seed_others(
    tiny_llama: Path, bundles: dict[str, Path], lessons: Path, parity: Parity
) -> None:
    given = {"evaluate": lessons, "examples": 5, "backends": ["onnx-side-inputs"]}
    first, again, other = (
        parity(bundles["perplexity"], model=tiny_llama, seed=seed, **given).scores[0].reference
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_each_adapter_can_have_its_own_data(
    tiny_llama: Path,
    bundles: dict[str, Path],
    lessons: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    parity: Parity,
) -> None:
    other = write_lines(tmp_path / "other.jsonl", [{"text": f"{n} is {n}"} for n in range(12)])
    report = parity(
        bundles["perplexity"],
        model=tiny_llama,
        adapters={"other": make_adapter(tiny_llama, seed=1)},
        evaluate=[f"it={lessons}", f"other={other}"],
        backends=["onnx-side-inputs"],
    )
    assert report.passed, report.failures
    assert {score.adapter: score.examples for score in report.scores} == {"it": 30, "other": 12}


@pytest.mark.parametrize(("precision", "merge"), [("int8", False), ("int4", False), ("int8", True)])
def test_a_packed_bundle_is_scored_against_the_weights_before_packing(
    precision: str,
    merge: bool,
    tiny_llama: Path,
    bundles: dict[str, Path],
    speaker: Path,
    lessons: Path,
    tmp_path: Path,
    parity: Parity,
) -> None:
    given = {"model": tiny_llama, "evaluate": lessons, "adapters": {"it": speaker}}
    path = "onnx-merged" if merge else "onnx-side-inputs"
    place = tmp_path / "packed"
    ld.export(tiny_llama, place, adapters={"it": speaker}, precision=precision, merge=merge)
    packed = scores(parity(place, backends=[path], **given))[path, "it"]
    whole = scores(parity(bundles["perplexity"], backends=["onnx-side-inputs"], **given))
    fp32 = whole["onnx-side-inputs", "it"]
    assert packed.reference == fp32.reference
    assert abs(packed.difference) > 10 * abs(fp32.difference), "nothing was rounded"
    assert packed.low < packed.difference < packed.high
    assert packed.limit == pytest.approx(SCORE_LIMITS[precision].perplexity * packed.reference)


# -- what does not agree -----------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_a_merged_graph_with_another_adapter_fails(
    metric: str,
    tiny_bert: Path,
    tiny_llama: Path,
    bundles: dict[str, Path],
    classifier: Path,
    speaker: Path,
    topics: Path,
    lessons: Path,
    tmp_path: Path,
    parity: Parity,
) -> None:
    model, adapter, data = {
        "accuracy": (tiny_bert, classifier, topics),
        "perplexity": (tiny_llama, speaker, lessons),
    }[metric]
    wrong = wrong_adapter(load_adapter(adapter))
    assert wrong is not None
    save_adapter(wrong, tmp_path / "wrong")
    ld.export(bundles[metric], tmp_path / "merged", adapters={"it": tmp_path / "wrong"}, merge=True)
    report = parity(
        tmp_path / "merged",
        model=model,
        adapters={"it": adapter},
        evaluate=data,
        backends=["onnx-merged"],
    )
    assert not any(score.passed for score in report.scores)
    score = report.scores[0]
    assert f"ONNX merged, it: {metric} {score.message}" in report.failures
    assert "certainly worse" in str(score.message)


def answers(*sums: float, counts: int = 1) -> Answers:
    return Answers(np.array(sums, np.float64), np.full(len(sums), counts))


@pytest.mark.parametrize("precision", SCORE_LIMITS)
@pytest.mark.parametrize("examples", [2, 20, 100, 1000, 10_000])
def test_equal_answers_pass_for_any_number_of_examples(precision: str, examples: int) -> None:
    limits = SCORE_LIMITS[precision]
    right = np.resize([1.0, 1.0, 1.0, 0.0], examples)
    losses = np.random.default_rng(0).gamma(2.0, 2.0, examples)
    for metric, sums in (("accuracy", right), ("perplexity", losses)):
        side = Answers(sums, np.ones(examples, np.int64))
        score = judge_score(ANY, None, metric, side, side, getattr(limits, metric))
        assert score.passed, score.message
        assert score.message is None


@pytest.mark.parametrize("turned", [1, 2])
@pytest.mark.parametrize("examples", [20, 100, 1000, 5000, 8300, 20_000])
def test_a_few_changed_ties_do_not_fail(turned: int, examples: int) -> None:
    expected = np.ones(examples)
    actual = expected.copy()
    actual[:turned] = 0
    ones = np.ones(examples, np.int64)
    score = judge_score(ANY, None, "accuracy", Answers(expected, ones), Answers(actual, ones), 1e-3)
    assert score.passed, score.message


def test_a_possible_loss_fails_and_too_few_examples_to_exclude_it_are_reported() -> None:
    def score(examples: int) -> Score:
        expected = np.ones(examples)
        actual = expected.copy()
        actual[: round(0.009 * examples)] = 0  # 0.9 % are lost, 1 % is allowed
        ones = np.ones(examples, np.int64)
        return judge_score(
            ANY, "it", "accuracy", Answers(expected, ones), Answers(actual, ones), 0.01
        )

    few, enough = score(444), score(4444)
    assert few.passed
    assert "too few examples" in str(few.message)
    assert not enough.passed
    assert "may be worse" in str(enough.message)


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
@pytest.mark.parametrize(("reference", "other"), [(1.0, np.nan), (np.nan, 1.0), (np.nan, np.nan)])
def test_nan_fails_on_either_side(metric: str, reference: float, other: float) -> None:
    expected, actual = answers(1.0, reference), answers(1.0, other)
    score = judge_score(ANY, None, metric, expected, actual, 0.1)
    assert not score.passed
    assert ("PyTorch" if np.isnan(reference) else "it gives") in str(score.message)


@pytest.mark.parametrize("metric", ["macro_f1", "micro_f1", "entity_f1"])
@pytest.mark.parametrize("swapped", [False, True])
def test_counts_that_are_nan_fail_on_either_side(metric: str, swapped: bool) -> None:
    right = np.ones((4, 2, 3))
    broken = right.copy()
    broken[1] = np.nan
    sides = [dataclasses.replace(answers(*[0.0] * 4), tallies=t) for t in (right, broken)]
    score = judge_score(ANY, None, metric, *(reversed(sides) if swapped else sides), 0.1)
    assert not score.passed
    assert ("PyTorch gives" if swapped else "it gives") in str(score.message)


def test_the_loss_of_logits_is_the_cross_entropy_of_each_labeled_token() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]))
    total, count = _loss(logits, Example((0, 1, 2), (-100, 1, 2)))
    assert (total, count) == (pytest.approx(-np.log(0.25) - np.log(0.7)), 2)


def test_every_precision_that_parity_supports_has_score_limits() -> None:
    assert SCORE_LIMITS.keys() == UNIT.keys()
    assert all(limit.reason for limit in SCORE_LIMITS.values())


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "lines", "message"),
    [
        ("accuracy", [{"text": "a", "label": "weather"}] * 2, "it: .*line 1: the label 'weather'"),
        ("accuracy", [{"prompt": "a", "completion": "b"}] * 2, "label is None"),
        ("accuracy", [], "has no examples"),
        ("accuracy", [{"text": "a", "label": "tech"}], "contains one example"),
        ("perplexity", [{"text": "a", "label": "tech"}] * 2, "data for a classifier"),
        ("perplexity", [{"prompt": "a " * 200, "completion": "b"}] * 2, "no tokens of the loss"),
    ],
)
def test_data_that_cannot_be_scored_is_reported_in_one_line(
    metric: str,
    lines: list[Any],
    message: str,
    tiny_bert: Path,
    tiny_llama: Path,
    bundles: dict[str, Path],
    tmp_path: Path,
    parity: Parity,
) -> None:
    model = {"accuracy": tiny_bert, "perplexity": tiny_llama}[metric]
    data = write_lines(tmp_path / "data.jsonl", lines)
    with pytest.raises(DataError, match=message) as raised:
        parity(bundles[metric], model=model, evaluate=data)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ["onnx-native"]}, "nothing to evaluate"),
        ({"examples": 1}, "give 2 or more"),
        ({"evaluate": {"nobody": "x.jsonl"}}, "'nobody' is not scored, only base, it"),
        ({"evaluate": ["x.jsonl", "y.jsonl"]}, "two data sets to evaluate base on"),
    ],
)
def test_contradictory_options_are_reported_in_one_line(
    options: dict[str, Any],
    message: str,
    tiny_llama: Path,
    bundles: dict[str, Path],
    lessons: Path,
    parity: Parity,
) -> None:
    with pytest.raises(UsageError, match=message):
        parity(bundles["perplexity"], model=tiny_llama, **{"evaluate": lessons, **options})


def test_a_task_without_a_metric_is_refused_by_name(bundles: dict[str, Path], topics: Path) -> None:
    other = dataclasses.replace(read_manifest(bundles["accuracy"]), task="vision-tower")
    with pytest.raises(UsageError, match="no task metric is known for vision-tower"):
        check_data(other, (), topics, 10)


# -- output ------------------------------------------------------------------------------------


def test_the_command_shows_the_scores_and_exits_with_2_on_other_labels(
    tiny_bert: Path,
    bundles: dict[str, Path],
    topics: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*options: object) -> int:
        given = [bundles["accuracy"], "--model", tiny_bert, *options]
        return exit_status("parity", *given, "--backends", "onnx-merged")

    assert command("--evaluate", topics, "--examples", 30) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("accuracy of")]
    assert "ONNX merged, it" in line
    assert line.endswith("on 30 examples")
    result = json.loads((bundles["accuracy"] / "parity.json").read_text())
    assert result["scores"][0]["metric"] == "accuracy"
    others = write_lines(tmp_path / "o.jsonl", [{"text": "rain", "label": "weather"}] * 3)
    assert command("--evaluate", others) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert "'weather'" in output.err


@pytest.mark.slow
def test_minilm_trained_on_news_topics_keeps_its_accuracy(
    minilm: Path, topics_of_news: Topics, tmp_path: Path, parity: Parity
) -> None:
    topic = topics_of_news.adapter
    ld.export(minilm, tmp_path / "bundle", adapters=[topic])
    given = {"model": minilm, "evaluate": topics_of_news.held_out, "examples": 60}
    given["phases"] = ["one row"]
    report = parity(tmp_path / "bundle", backends=["onnx-side-inputs", "onnx-merged"], **given)
    assert report.passed, report.failures
    assert {score.backend for score in report.scores} == {"onnx-side-inputs", "onnx-merged"}
    for score in report.scores:
        assert score.reference > 0.8, f"the adapter learned too little: {score}"
        if score.metric == "accuracy":
            assert score.low < score.difference < score.high

    wrong = wrong_adapter(load_adapter(topic))
    assert wrong is not None
    save_adapter(wrong, tmp_path / "wrong")
    ld.export(
        tmp_path / "bundle", tmp_path / "merged", adapters={"topic": tmp_path / "wrong"}, merge=True
    )
    failed = parity(tmp_path / "merged", adapters=[topic], backends=["onnx-merged"], **given)
    assert [score.passed for score in failed.scores] == [False, False]
