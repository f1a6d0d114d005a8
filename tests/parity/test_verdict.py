"""The verdict and the table that it rests on."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from loradeploy.errors import UsageError
from loradeploy.parity.metrics import Comparison, Figures
from loradeploy.parity.tolerances import METRICS, REACH, TOLERANCES, tolerances
from loradeploy.parity.verdict import failure, judge

EXPECTED = np.array([[10.0, 2.0, -3.0], [1.0, 8.0, 0.5]])


def figures(error: float) -> Figures:
    """Of values that are off by `error` in one place."""
    comparison = Comparison(scale=10.0, logits=True)
    actual = EXPECTED.copy()
    actual[0, 0] += error
    comparison.add(EXPECTED, actual)
    return comparison.figures()


def verdict(found: Figures, *, effect: float | None = 5.0, scale: float = 10.0) -> str | None:
    return failure(found, judge(found, TOLERANCES["fp32"], scale=scale, effect=effect))


def test_rounding_passes() -> None:
    assert verdict(figures(1e-5)) is None


def test_an_error_beyond_the_tolerance_fails_and_says_where() -> None:
    said = verdict(figures(1e-2))
    assert said is not None
    assert "max abs 0.01 > 0.0002" in said
    assert "prompt 1, position 0" in said


def test_an_error_that_is_not_far_below_the_effect_fails() -> None:
    assert verdict(figures(1e-5), effect=1e-5 * 9) is not None
    assert verdict(figures(1e-5), effect=1e-5 * 11) is None


@pytest.mark.parametrize("effect", [None, 0.0])
def test_where_there_is_no_effect_the_error_is_judged_alone(effect: float | None) -> None:
    assert verdict(figures(1e-5), effect=effect) is None
    assert verdict(figures(1e-2), effect=effect) is not None


def test_absolute_limits_grow_with_the_values_and_never_shrink() -> None:
    def limit(scale: float) -> float:
        checks = judge(figures(0.0), TOLERANCES["fp32"], scale=scale, effect=None)
        return next(check.limit for check in checks if check.metric == "max_abs")

    assert limit(0.01) == limit(REACH) == TOLERANCES["fp32"]["max_abs"].value
    assert limit(10 * REACH) == pytest.approx(10 * limit(REACH))


def test_another_token_by_a_hair_is_a_tie_and_by_more_a_failure() -> None:
    for lead, passes in ((1e-5, True), (1e-2, False)):
        comparison = Comparison(scale=1.0, logits=True)
        comparison.add(np.array([[1.0, 1.0 - lead]]), np.array([[1.0, 1.0 + 1e-6]]))
        found = comparison.figures()
        checks = judge(found, TOLERANCES["fp32"], scale=1.0, effect=None)
        assert found.top1 == 0.0
        margin = next(check for check in checks if check.metric == "margin")
        assert margin.passed is passes, margin


def test_values_that_are_not_finite_fail_whatever_the_figures() -> None:
    found = dataclasses.replace(figures(0.0), not_finite=1)
    assert "NaN or infinite" in str(verdict(found))


def test_a_figure_that_is_not_a_number_fails() -> None:
    found = dataclasses.replace(figures(0.0), max_abs=math.nan)
    assert "max abs nan" in str(verdict(found))


def test_nothing_compared_is_no_agreement() -> None:
    assert verdict(Comparison(scale=1.0, logits=True).figures()) == "no positions were compared"


@pytest.mark.parametrize("precision", TOLERANCES)
def test_every_precision_has_a_limit_and_a_reason_for_every_metric(precision: str) -> None:
    limits = TOLERANCES[precision]
    assert list(limits) == [metric.name for metric in METRICS]
    assert all(limit.value > 0 and limit.reason for limit in limits.values())


def test_a_precision_without_tolerances_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="bf16"):
        tolerances("bf16")
