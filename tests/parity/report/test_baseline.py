"""Baselines: a result worse than an earlier report fails, even within the limits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.errors import UsageError
from loradeploy.files import write_json
from loradeploy.parity.figures.metrics import Comparison
from loradeploy.parity.figures.tolerances import METRICS, Limit
from loradeploy.parity.report.baseline import (
    FACTOR,
    check_comparable,
    compare_with_baseline,
    read_baseline,
)
from loradeploy.parity.report.results import (
    AdapterFacts,
    Control,
    Environment,
    Inputs,
    ParityReport,
    Regression,
    Result,
    Score,
    Variant,
)
from loradeploy.parity.verdict import judge
from tests.cli.calling import exit_status
from tests.parity.graphs import in_numpy, token_model
from tests.parity.reports import ON_CPU

POSITIONS = 200
LIMITS = {metric.name: Limit(1e-4, "of this test") for metric in METRICS}
ERROR = 6e-5  # above the floor, below the limit


def result(error: float = ERROR, *, other: int = 0, backend: str = "onnx", **more: Any) -> Result:
    """A result with `error` at one position and another greedy token at `other` positions."""
    expected = np.tile(np.array([[1.0, 0.0]]), (POSITIONS, 1))
    expected[:other] = [1.0, 1.0 - 1e-5]
    actual = expected.copy()
    actual[-1, 0] += error
    actual[:other] = [1.0 - 1e-5, 1.0]
    comparison = Comparison(scale=1.0, logits=True)
    comparison.add(expected, actual, first_step=0)
    verdict = judge(comparison.figures(), LIMITS, effect=None)
    given = {"adapter": "sport", "phase": "decode", **more}
    return verdict.result(backend=backend, title=backend, **given)


def score(metric: str, difference: float, low: float, high: float) -> Score:
    return Score("onnx", "onnx", None, metric, 100, 0.5, 0.5 + difference, difference, low, high,
                 1.0, True)  # fmt: skip


REPORT = ParityReport(
    bundle="bundle",
    task="causal-lm",
    mode="side-inputs",
    precision="fp32",
    base="tiny",
    base_digest="sha256:" + "0" * 64,
    graph_digest="sha256:" + "1" * 64,
    data_digest=None,
    inputs=Inputs("built-in prompts", 16, 500, 32, 0),
    environment=Environment({}, {}, (ON_CPU,)),
    created="2026-01-01T00:00:00+00:00",
    results=(
        result(),
        result(backend="other", variant=Variant("cpu", "all")),
        Result("peft", "PEFT", None, None, "not run", "peft is not installed"),
    ),
    adapters=(AdapterFacts("sport", "sha256:22", 0.5, 0.1),),
    controls=(Control("doubled alpha", "twice", "sport", True, 0.4, 0.5),),
    scores=(score("accuracy", 0.0, -0.02, 0.02), score("perplexity", 0.0, -0.1, 0.1)),
)


def changed(**fields: Any) -> ParityReport:
    return dataclasses.replace(REPORT, **fields)


def with_first(first: Result | None) -> ParityReport:
    return changed(results=(*filter(None, (first,)), *REPORT.results[1:]))


@pytest.fixture
def since(tmp_path: Path) -> Callable[..., tuple[Regression, ...]]:
    """A function that returns the regressions of a report since `REPORT` or another one."""

    def compare(now: ParityReport, before: ParityReport = REPORT) -> tuple[Regression, ...]:
        write_json(tmp_path / "old.json", before.to_json())
        held = compare_with_baseline(now, read_baseline(tmp_path / "old.json"))
        assert held.baseline == str(tmp_path / "old.json")
        assert held.passed == (now.passed and not held.regressions)
        return held.regressions

    return compare


Since = Callable[..., tuple[Regression, ...]]


def test_the_same_report_has_no_regressions(since: Since) -> None:
    assert since(REPORT) == ()


@pytest.mark.parametrize("factor", [0.1, 1.0, FACTOR * 0.95])
def test_a_better_or_equally_noisy_result_is_no_regression(factor: float, since: Since) -> None:
    assert since(with_first(result(ERROR * factor))) == ()


def test_a_larger_error_is_reported_with_both_figures(since: Since) -> None:
    now = with_first(result(ERROR * FACTOR * 1.05))
    assert now.passed, "the limits alone would let it through"
    found = {regression.metric: regression for regression in since(now)}
    assert "max_abs" in found
    assert (found["max_abs"].before, found["max_abs"].now) == pytest.approx((ERROR, 9.45e-5))
    assert found["max_abs"].where == "onnx, sport, decode"
    assert "max_abs was 6e-05, now 9.5e-05: more than 1.5 times" in found["max_abs"].message


def test_an_error_far_below_its_limit_can_grow(since: Since) -> None:
    assert since(with_first(result(9e-6)), with_first(result(1e-8))) == ()
    assert since(with_first(result(0.0)), with_first(result(0.0))) == ()


def test_tokens_that_no_longer_agree_are_reported_and_a_single_tie_is_not(since: Since) -> None:
    assert since(with_first(result(other=1))) == ()
    found = {regression.metric for regression in since(with_first(result(other=5)))}
    assert {"top1", "greedy"} <= found


WORSE: dict[str, tuple[ParityReport, str]] = {
    "a failure": (with_first(result(1.0)), "passed before, now failed: max abs 1 >"),
    "a result that is gone": (with_first(None), "passed before, now missing"),
    "a backend that is not run": (
        with_first(dataclasses.replace(result(), outcome="not run", message="no peft here")),
        "passed before, now not run: no peft here",
    ),
    "another variant": (
        changed(results=(REPORT.results[0], dataclasses.replace(REPORT.results[1], variant=None))),
        "passed before, now missing",
    ),
    "fewer prompts": (
        changed(inputs=dataclasses.replace(REPORT.inputs, prompts=15)),
        "15 prompts were compared, 16 before",
    ),
    "fewer positions": (
        with_first(
            dataclasses.replace(
                result(),
                figures=dataclasses.replace(result().figures, positions=POSITIONS - 1),  # type: ignore[type-var]
            )
        ),
        "199 positions were compared, 200 before",
    ),
    "an adapter that is gone": (changed(adapters=()), "it was compared before"),
    "controls that are not made": (changed(controls=()), "now: not run"),
    "a control that passes": (
        changed(controls=(dataclasses.replace(REPORT.controls[0], caught=False),)),
        "100 % of the mistakes were caught before, now: 0.0 %",
    ),
    "a score that is gone": (changed(scores=REPORT.scores[1:]), "accuracy is not scored"),
    "accuracy": (
        changed(scores=(score("accuracy", -0.03, -0.05, 0.0), REPORT.scores[1])),
        "accuracy is -0.03 from the reference, before +0 (-0.02 to +0.02)",
    ),
    "perplexity": (
        changed(scores=(REPORT.scores[0], score("perplexity", 0.2, 0.1, 0.3))),
        "perplexity is +0.2 from the reference",
    ),
}


@pytest.mark.parametrize("what", WORSE)
def test_every_kind_of_regression_is_reported(what: str, since: Since) -> None:
    now, reported = WORSE[what]
    assert any(reported in regression.message for regression in since(now))


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_a_score_within_its_interval_or_better_is_no_regression(metric: str, since: Since) -> None:
    within = score(metric, -0.019 if metric == "accuracy" else 0.09, -1, 1)
    better = score(metric, 0.5 if metric == "accuracy" else -0.5, -1, 1)
    for other in (within, better):
        scores = tuple(other if own.metric == metric else own for own in REPORT.scores)
        assert since(changed(scores=scores)) == ()


def test_a_result_that_failed_before_is_no_regression(since: Since) -> None:
    assert since(with_first(result(1.0)), with_first(result(1.0))) == ()


def test_a_figure_that_became_nan_is_reported(since: Since) -> None:
    broken = dataclasses.replace(
        result(), checks=(dataclasses.replace(result().checks[0], value=np.nan),)
    )
    assert {"max_abs"} <= {regression.metric for regression in since(with_first(broken))}


# -- what cannot be compared -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", "feature-extraction"),
        ("mode", "merged"),
        ("precision", "fp16"),
        ("base_digest", "sha256:" + "2" * 64),
    ],
)
def test_a_baseline_of_another_bundle_or_check_is_refused(
    field: str, value: str, since: Since
) -> None:
    with pytest.raises(UsageError, match="is not comparable"):
        since(changed(**{field: value}))


def test_without_digests_the_names_are_compared(since: Since) -> None:
    unknown = changed(base_digest=None)
    assert since(unknown, unknown) == ()
    with pytest.raises(UsageError, match="it is against tiny, not other"):
        since(changed(base_digest=None, base="other"), unknown)


def edited(**fields: Any) -> str:
    return json.dumps({**REPORT.to_json(), **fields})


BROKEN = {
    "no file": (None, "does not exist"),
    "no JSON": ("{", "not readable as JSON"),
    "another JSON": ("{}", "is not a parity report"),
    "a newer schema": (edited(schema_version=99), "schema version 99"),
    "no results": (edited(results=None), "malformed parity report"),
    "results of text": (edited(results=["x"]), "malformed parity report"),
    "a figure of text": (
        edited(results=[{**REPORT.to_json()["results"][0], "checks": [{"value": "x"}]}]),
        "malformed parity report",
    ),
    "a task that is not a text": (edited(task=3), "task is 3, no text"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_baseline_is_refused(how: str, tmp_path: Path) -> None:
    text, message = BROKEN[how]
    if text is not None:
        (tmp_path / "old.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_baseline(tmp_path / "old.json")


def test_a_huge_baseline_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "old.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UsageError, match="more than"):
        read_baseline(tmp_path / "old.json")


# -- in use ------------------------------------------------------------------------------------


def test_a_candidate_that_got_worse_fails_against_its_baseline(tmp_path: Path) -> None:
    reference = token_model(tmp_path / "reference.onnx")
    candidate, baseline = tmp_path / "new.onnx", tmp_path / "old.json"
    ld.compare(reference, token_model(candidate, error=2e-6), report=baseline)
    assert ld.compare(reference, candidate, baseline=baseline).passed
    token_model(candidate, error=1.5e-5)
    assert ld.compare(reference, candidate).passed, "the limits alone would let it through"
    report = ld.compare(reference, candidate, baseline=baseline)
    assert not report.passed
    assert report.to_json()["regressions"]
    with pytest.raises(UsageError, match="another reference"):
        ld.compare(token_model(tmp_path / "x.onnx", error=1), candidate, baseline=baseline)


def test_the_command_exits_with_1_on_a_regression_and_2_on_another_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = token_model(tmp_path / "reference.onnx")
    baseline = tmp_path / "old.json"
    ld.compare(reference, in_numpy, report=baseline)
    worse = token_model(tmp_path / "worse.onnx", error=1.5e-5)
    assert exit_status("parity", worse, "--against", reference, "--baseline", baseline) == 1
    assert "max_abs was" in capsys.readouterr().out


def test_a_bundle_is_refused_before_anything_runs(
    tiny_llama: Path, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    write_json(tmp_path / "old.json", changed(task="feature-extraction").to_json())
    with pytest.raises(UsageError, match="its task is feature-extraction, not causal-lm"):
        ld.parity(tiny_llama_bundle, model=tiny_llama, baseline=tmp_path / "old.json")


def test_a_baseline_can_only_be_compared_with_a_report_of_its_kind(tmp_path: Path) -> None:
    write_json(tmp_path / "old.json", REPORT.to_json())
    baseline = read_baseline(tmp_path / "old.json")
    same = {"task": REPORT.task, "mode": REPORT.mode, "precision": REPORT.precision}
    check_comparable(baseline, base="moved", base_digest=REPORT.base_digest, **same)
