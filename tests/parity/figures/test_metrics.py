"""The error figures, compared with numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loradeploy.parity.figures.distances import divergence_bounds, divergences
from loradeploy.parity.figures.expected import Expected
from loradeploy.parity.figures.metrics import Comparison, Figures


def compare(expected: object, actual: object, *, scale: float = 1.0, **place: int) -> Figures:
    comparison = Comparison(scale=scale, logits=True)
    comparison.add(np.array(expected, np.float32), np.array(actual, np.float32), **place)
    return comparison.figures()


def test_equal_arrays_have_no_error() -> None:
    figures = compare([[1.0, -2.0, 3.0]], [[1.0, -2.0, 3.0]])
    errors = (figures.max_abs, figures.p99_abs, figures.mean_abs, figures.max_rel, figures.kl)
    assert errors == (0, 0, 0, 0, 0)
    assert (figures.cosine_distance, figures.top1, figures.top5, figures.margin) == (0, 1, 1, 0)
    assert (figures.max_ulp, figures.js) == (0, 0)


def test_absolute_errors_are_those_of_the_values() -> None:
    figures = compare([[0.0, 1.0], [2.0, 4.0]], [[0.5, 1.0], [2.0, 2.0]])
    assert figures.max_abs == 2.0
    assert figures.mean_abs == pytest.approx(2.5 / 4)
    assert figures.worst is not None
    assert (figures.worst.position, figures.worst.index) == (1, 1)


def test_a_relative_error_near_zero_is_relative_to_the_guard() -> None:
    # 0.01 of the scale 8 is the guard: 0.004 / 0.08, not 0.004 / 0.
    figures = compare([[8.0, 0.0]], [[8.0, 0.004]], scale=8.0)
    assert figures.max_rel == pytest.approx(0.05)


def test_the_percentile_is_within_a_hundredth_of_the_sorted_value() -> None:
    random = np.random.default_rng(0)
    errors = np.abs(random.standard_normal((50, 200))) * 1e-5
    figures = compare(np.zeros_like(errors), errors)
    assert figures.p99_abs == pytest.approx(np.quantile(errors.astype(np.float32), 0.99), rel=0.01)


def test_the_cosine_is_that_of_the_worst_position() -> None:
    figures = compare([[1.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [1.0, 1.0]])
    assert figures.cosine_distance == pytest.approx(1 - 1 / math.sqrt(2))


@pytest.mark.parametrize("other, distance", [([0.0, 0.0], 0.0), ([1.0, 0.0], 1.0)])
def test_the_cosine_distance_of_two_zero_vectors_is_0_and_of_one_zero_vector_1(
    other: list[float], distance: float
) -> None:
    assert compare([[0.0, 0.0]], [other]).cosine_distance == distance


def test_the_cosine_distance_of_a_small_angle_is_half_its_square() -> None:
    # Computing 1 − cos would lose it: 1 − 5e-13 is 1 in float32.
    turned = compare([[1.0, 0.0]], [[math.cos(1e-6), math.sin(1e-6)]]).cosine_distance
    assert turned == pytest.approx(0.5e-12, rel=1e-3)


def test_the_divergence_of_two_bernoulli_distributions_is_the_textbook_value() -> None:
    p, q = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    figures = compare([np.log(p)], [np.log(q)])
    assert figures.kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-6)


def test_the_divergence_does_not_depend_on_a_common_shift() -> None:
    figures = compare([[1.0, 2.0, 3.0]], [[5.0, 6.0, 7.0]])
    assert figures.kl == pytest.approx(0.0, abs=1e-14)


def test_a_small_divergence_is_half_the_variance_of_the_error() -> None:
    # Far below the rounding error of a difference of two logarithms in float64.
    figures = compare([[0.0, 0.0]], [[1e-6, -1e-6]])
    assert figures.kl == pytest.approx(0.5e-12, rel=1e-3)


def test_a_large_divergence_stays_finite() -> None:
    figures = compare([[0.0, -2000.0]], [[-2000.0, 0.0]])
    assert figures.kl == pytest.approx(2000.0)


def test_the_symmetric_divergence_of_two_bernoulli_distributions_is_the_textbook_value() -> None:
    p, q = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    m = (p + q) / 2
    expected = 0.5 * float((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum())
    figures = compare([np.log(p)], [np.log(q)])
    assert figures.js == pytest.approx(expected, rel=1e-6)
    apart = compare([[0.0, -2000.0]], [[-2000.0, 0.0]]).js
    assert apart == pytest.approx(math.log(2)), "two that have nothing in common"
    near = compare([[0.0, 0.0]], [[1e-5, -1e-5]])
    assert near.kl is not None
    assert near.js == pytest.approx(near.kl / 4, rel=1e-3), "a quarter of KL where both are small"


@pytest.mark.parametrize("size", [3, 5, 130, 5000])
def test_the_five_largest_values_are_those_of_a_sort(size: int) -> None:
    random = np.random.default_rng(size)
    expected = random.permutation(size).astype(np.float32)
    actual = expected + 1.5 * random.standard_normal(size).astype(np.float32)
    count = min(5, size)
    both = set(np.argsort(-expected)[:count]) & set(np.argsort(-actual)[:count])
    assert compare([expected], [actual]).top5 == pytest.approx(len(both) / count)


def test_an_error_of_one_ulp_is_1() -> None:
    value = np.float32(3.0)
    figures = compare([[value]], [[np.nextafter(value, np.float32(4))]], scale=3.0)
    assert figures.max_ulp == 1.0
    assert figures.max_rel == pytest.approx(np.spacing(value) / value)


def test_float64_values_that_differ_have_an_error() -> None:
    comparison = Comparison(scale=1.0, logits=True)
    comparison.add(np.array([[1.0, 0.0]]), np.array([[1.0 + 1e-12, 0.0]]))
    assert comparison.figures().max_abs == pytest.approx(1e-12, rel=1e-3)


def test_the_margin_is_the_lead_of_the_expected_token() -> None:
    figures = compare([[1.0, 3.0, 2.5]], [[1.0, 3.0, 3.1]], case=4, first=7)
    assert figures.top1 == 0.0
    assert figures.margin == pytest.approx(0.5)
    first = figures.first_divergence
    assert first is not None
    assert (first.case, first.position, first.expected, first.actual) == (4, 7, 1, 2)


def test_greedy_agreement_counts_only_generated_positions() -> None:
    expected = [[0.0, 1.0]] * 4
    actual = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    figures = compare(expected, actual, first_step=1)
    assert figures.top1 == 0.5
    assert figures.greedy == pytest.approx(2 / 3)
    assert figures.first_divergence is not None
    assert figures.first_divergence.step == 1


def test_values_that_are_not_logits_have_no_divergence_and_no_greedy_token() -> None:
    comparison = Comparison(scale=1.0, logits=False)
    comparison.add(np.ones((1, 2)), np.ones((1, 2)))
    assert (comparison.figures().kl, comparison.figures().top1) == (None, None)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["expected", "actual", "both"])
def test_positions_that_are_not_finite_are_counted_and_change_no_other_figure(
    wrong: float, side: str
) -> None:
    good, bad = [[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, wrong]]
    expected, actual = (good if side == "actual" else bad), (good if side == "expected" else bad)
    figures = compare(expected, actual)
    assert (figures.positions, figures.not_finite, figures.max_abs) == (2, 1, 0.0)


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3\] where \[1, 2\] is expected"):
        compare([[1.0, 2.0]], [[1.0, 2.0, 3.0]])


def test_figures_do_not_depend_on_the_block_size() -> None:
    random = np.random.default_rng(0)
    expected = random.standard_normal((7, 30_000))
    actual = expected + 1e-4 * random.standard_normal(expected.shape)
    figures = compare(expected, actual)
    errors = np.abs(expected.astype(np.float32).astype(float) - actual.astype(np.float32))
    assert figures.positions == 7
    assert figures.max_abs == errors.max()
    assert figures.mean_abs == pytest.approx(errors.mean())


def test_the_distribution_counts_every_value_in_its_half_decade() -> None:
    errors = [0.0, 0.0, 2e-14, 2e-7, 4e-7, 2e-3, 2.5e-3, 5.0]
    figures = compare([[0.0] * len(errors)], [errors])
    counts = ((0.0, 2), (1e-12, 1), (3.16e-7, 1), (1e-6, 1), (3.16e-3, 2), (10.0, 1))
    assert figures.distribution == counts


def test_the_distribution_agrees_with_sorting() -> None:
    errors = 10 ** np.random.default_rng(0).uniform(-9, 2, 5000)
    comparison = Comparison(scale=1.0, logits=False)
    comparison.add(np.zeros((5, 1000)), errors.reshape(5, 1000))
    message = comparison.figures().distribution
    assert sum(count for _, count in message) == len(errors)
    below = 0
    for edge, count in message:
        below += count
        # The bins are 0.8 % wide: values that close to an edge may be on either side.
        low, high = ((errors <= edge * factor).sum() for factor in (0.99, 1.01))
        assert low <= below <= high, (edge, below, low, high)


def test_an_error_beyond_float32_has_a_place_in_the_distribution() -> None:
    comparison = Comparison(scale=1.0, logits=False)
    comparison.add(np.zeros((1, 2)), np.array([[1e39, 0.9]]))
    (small, one), (large, other) = comparison.figures().distribution
    assert (small, one, other) == (1.0, 1, 1)
    assert 1e38 < large < math.inf


# -- precomputed figures of the expected side --------------------------------------------------


@pytest.mark.parametrize("width", [2, 33, 512, 5000])
@pytest.mark.parametrize("size", [0.0, 1e-6, 0.3, 30.0])
def test_precomputed_figures_change_no_result(width: int, size: float) -> None:
    random = np.random.default_rng(width)
    expected = (5 * random.standard_normal((20, width))).astype(np.float32)
    expected[3] = expected[4] = 0.0  # all equal: the greedy token is the first
    actual = (expected + size * random.standard_normal(expected.shape)).astype(np.float32)
    known = Expected.of(expected, logits=True)
    found = []
    for about in (None, known):
        comparison = Comparison(scale=20.0, logits=True)
        comparison.add(expected, actual, about=about)
        found.append(comparison.figures())
    assert found[0] == found[1]
    first = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    others = np.argsort(-actual, axis=1, kind="stable")[:, :5]
    agree = [len(set(a) & set(b)) / len(a) for a, b in zip(first, others, strict=True)]
    assert found[0].top5 == pytest.approx(np.mean(agree))
    assert found[0].top1 == pytest.approx(np.mean(first[:, 0] == others[:, 0]))


@pytest.mark.parametrize("size", [1e-6, 1e-2, 0.5, 20.0])
def test_no_divergence_exceeds_its_bound_and_the_figure_is_the_largest(size: float) -> None:
    random = np.random.default_rng(1)
    expected = (4 * random.standard_normal((60, 300))).astype(np.float32)
    actual = expected + size * random.standard_normal(expected.shape).astype(np.float32)
    difference = actual - expected
    exact = divergences(expected, difference)
    known = Expected.of(expected, logits=True)
    furthest = np.abs(difference).max(axis=1)
    bounds = divergence_bounds(expected, difference, furthest, known.log_sum)
    assert (exact <= bounds).all()
    if size <= 1e-2:  # like rounding errors: the bounds leave few positions to compute
        assert np.median(bounds / exact) < 1.1
    assert compare(expected, actual).kl == exact.max()


def test_the_distance_of_vectors_whose_squares_overflow_is_correct() -> None:
    assert compare([[3e37, 1e37]], [[-3e37, -1e37]]).cosine_distance == pytest.approx(2.0)
    assert compare([[3e30, 0.0]], [[0.0, 3e30]]).cosine_distance == pytest.approx(1.0)
