"""The verdict on a comparison, and the table of limits that it uses."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from loradeploy.errors import UsageError
from loradeploy.parity.figures.metrics import Comparison, Figures
from loradeploy.parity.figures.tolerances import (
    ASSUMED,
    EFFECT_SHARE,
    LEAST,
    METRICS,
    ROOM,
    UNIT,
    Limit,
    assumed,
    calibrated,
)
from loradeploy.parity.verdict import judge

EXPECTED = np.array([[10.0, 2.0, -3.0], [1.0, 8.0, 0.5]])
GAP = 5e-5


def figures(error: float) -> Figures:
    """Return figures of values with `error` in one place."""
    comparison = Comparison(scale=10.0, logits=True)
    actual = EXPECTED.copy()
    actual[0, 0] += error
    comparison.add(EXPECTED, actual)
    return comparison.figures()


def limits(gap: float = GAP) -> dict[str, Limit]:
    """Return float32 limits calibrated with a rounding error of `gap` in the same place."""
    return calibrated("fp32", figures(gap), scale=10.0)


def verdict(found: Figures, *, effect: float | None = 5.0) -> str | None:
    return judge(found, limits(), effect=effect).failure


def test_rounding_passes() -> None:
    assert verdict(figures(1e-5)) is None


def test_an_error_beyond_the_tolerance_fails_and_says_where() -> None:
    message = verdict(figures(1e-2))
    assert message is not None
    assert f"max abs 0.01 > {ROOM * GAP:.2g}" in message
    assert "prompt 1, position 0" in message


def test_an_error_that_is_not_far_below_the_effect_fails() -> None:
    assert verdict(figures(1e-5), effect=1e-5 * 9) is not None
    assert verdict(figures(1e-5), effect=1e-5 * 11) is None


def test_rounding_that_hides_a_small_effect_is_named_as_such() -> None:
    message = verdict(figures(1e-5), effect=2e-5)
    assert message is not None and "\n" not in message
    assert "can be rounding" in message and "nearly untrained" in message
    coarse = verdict(figures(1e-4), effect=5e-4)
    assert coarse is not None and "can be rounding" in coarse
    assert "untrained" not in coarse  # the effect is above the limit of the error
    wrong = verdict(figures(1e-2), effect=2e-5)
    assert wrong is not None and "untrained" not in wrong


@pytest.mark.parametrize("effect", [None, 0.0])
def test_without_an_effect_only_the_error_is_judged(effect: float | None) -> None:
    assert verdict(figures(1e-5), effect=effect) is None
    assert verdict(figures(1e-2), effect=effect) is not None


def test_limits_are_a_multiple_of_the_measured_error_and_state_it() -> None:
    for name in ("max_abs", "p99_abs"):
        measured, limit = getattr(figures(GAP), name), limits()[name]
        assert limit.value == pytest.approx(ROOM * measured), name
        assert f"{measured:.1e}, which PyTorch's float32 is off" in limit.reason
    wide = limits(gap=1e-2)["kl"].value  # proportional to the square of the gap
    assert wide == pytest.approx(ROOM**2 * float(figures(1e-2).kl or 0))


def test_a_measured_error_of_zero_still_allows_a_few_roundings() -> None:
    found = limits(gap=0.0)
    assert found["max_abs"].value == LEAST["fp32"] * UNIT["fp32"] * 10.0
    assert "are always allowed" in found["max_abs"].reason
    assert all(limit.value > 0 for limit in found.values())


@pytest.mark.parametrize(("rows", "share"), [(1, 1.0), (40, 0.1)])
def test_the_mean_of_few_rounding_errors_may_be_as_large_as_the_largest(
    rows: int, share: float
) -> None:
    comparison = Comparison(scale=10.0, logits=True)
    for _ in range(rows):
        comparison.add(EXPECTED, EXPECTED)
    found = calibrated("fp32", comparison.figures(), scale=10.0)
    assert found["mean_abs"].value == pytest.approx(share * found["max_abs"].value)


def test_limits_that_are_assumed_grow_with_the_values() -> None:
    one, ten = (assumed("fp32", scale=scale) for scale in (1.0, 10.0))
    assert ten["max_abs"].value == pytest.approx(10 * one["max_abs"].value)
    assert ten["kl"].value == pytest.approx(100 * one["kl"].value)
    assert ten["max_rel"].value == one["max_rel"].value


def test_another_greedy_token_by_a_small_margin_is_a_tie_and_by_more_a_failure() -> None:
    for lead, passes in ((1e-5, True), (1e-2, False)):
        comparison = Comparison(scale=1.0, logits=True)
        comparison.add(np.array([[1.0, 1.0 - lead]]), np.array([[1.0, 1.0 + 1e-6]]))
        found = comparison.figures()
        checks = judge(found, assumed("fp32", scale=1.0), effect=None).checks
        assert found.top1 == 0.0
        margin = next(check for check in checks if check.metric == "margin")
        assert margin.passed is passes, margin


def test_values_that_are_not_finite_fail_regardless_of_the_figures() -> None:
    found = dataclasses.replace(figures(0.0), not_finite=1)
    assert "NaN or infinite" in str(verdict(found))


def test_a_figure_that_is_not_a_number_fails() -> None:
    found = dataclasses.replace(figures(0.0), max_abs=math.nan)
    assert "max abs nan" in str(verdict(found))


def test_a_comparison_of_nothing_does_not_pass() -> None:
    assert verdict(Comparison(scale=1.0, logits=True).figures()) == "no positions were compared"


@pytest.mark.parametrize("precision", UNIT)
def test_every_precision_has_a_limit_and_a_reason_for_every_metric(precision: str) -> None:
    found = calibrated(precision, figures(GAP), scale=10.0)
    assert set(found) == {metric.name for metric in METRICS}
    assert all(limit.value > 0 and limit.reason for limit in found.values())
    assert found["effect_share"].value == EFFECT_SHARE[precision]


def test_a_precision_without_assumed_limits_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=f"int4, only for {', '.join(ASSUMED)}"):
        assumed("int4", scale=1.0)
