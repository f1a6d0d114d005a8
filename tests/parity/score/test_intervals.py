"""The confidence intervals of the scores, compared with published values and known properties."""

from __future__ import annotations

import numpy as np
import pytest

from loradeploy.parity.score.intervals import mean_interval, proportions_interval, t_quantile


@pytest.mark.parametrize(
    ("gained", "lost", "pairs", "level", "expected", "digits"),
    [
        # Airway hyper-responsiveness of Bentur et al. 2009, as in the R package ratesci.
        (1, 7, 21, 0.95, (-0.517, -0.026), 3),
        # PropCIs::scoreci.mp(25, 28, 618, 0.90)
        (28, 25, 618, 0.90, (-0.0148, 0.0247), 4),
        # No pair differs: ± z² / (n + z²).
        (0, 0, 100, 0.95, (-0.036994, 0.036994), 6),
        (0, 10, 10, 0.95, (-1.0, -0.444934), 6),
    ],
)
def test_the_interval_of_paired_proportions_is_tangos_score_interval(
    gained: int,
    lost: int,
    pairs: int,
    level: float,
    expected: tuple[float, float],
    digits: int,
) -> None:
    found = proportions_interval(gained, lost, pairs, level=level)
    assert found == pytest.approx(expected, abs=0.51 * 10**-digits)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 1), (1, 0), (3, 3), (0, 50), (50, 0)])
def test_the_interval_contains_the_difference_and_is_mirrored_if_the_sides_are_exchanged(
    gained: int, lost: int
) -> None:
    low, high = proportions_interval(gained, lost, 50)
    assert low <= (gained - lost) / 50 <= high
    assert high - low > 0.05
    assert proportions_interval(lost, gained, 50) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (10, 2.22814), (99, 1.98422)],
)
def test_the_quantile_of_students_t_is_that_of_published_tables(
    freedom: int, expected: float
) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(expected, rel=3e-3)


def test_the_interval_of_a_mean_is_students_for_examples_of_equal_length() -> None:
    # 1, 2, 3, 4: mean 2.5, deviation 1.29099, times 3.18245 / √4.
    low, high = mean_interval(np.array([1.0, 2.0, 3.0, 4.0]), np.ones(4))
    assert (low, high) == pytest.approx((2.5 - 2.0543, 2.5 + 2.0543), abs=0.01)


def test_long_examples_are_weighted_by_their_tokens() -> None:
    # The same difference for each token: no spread between examples, whatever their lengths.
    counts = np.array([1, 10, 100])
    assert mean_interval(0.5 * counts, counts) == pytest.approx((0.5, 0.5))


def test_the_interval_contains_the_true_mean_at_its_confidence_level() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        counts = random.integers(1, 30, 25)
        low, high = mean_interval(counts * (0.1 + random.standard_normal(25)), counts)
        held += low <= 0.1 <= high
    assert held / 2000 == pytest.approx(0.95, abs=0.03)


def test_one_example_has_no_interval() -> None:
    with pytest.raises(ValueError, match="no spread"):
        mean_interval(np.ones(1), np.ones(1))
