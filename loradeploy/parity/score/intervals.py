"""95 % confidence intervals of paired differences: of two proportions, and of two mean losses.

Both sides are evaluated on the same examples, so the interval is that of the difference per
example, in which the large common part cancels (Miller 2024, "Adding Error Bars to Evals",
arXiv:2411.00640, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEVEL: Final = 0.95


def proportions_interval(
    gained: int, lost: int, pairs: int, *, level: float = LEVEL
) -> tuple[float, float]:
    """Return the interval of (gained − lost) / pairs: Tango's score interval, paired proportions.

    `gained`: pairs that are right on the second side only; `lost`: on the first side only. The
    interval consists of all values that a score test does not reject (Tango 1998, Statistics in
    Medicine 17, 891–908). Unlike a standard error's, it has a width even if no pair differs:
    ± z² / (pairs + z²).
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    found = (gained - lost) / pairs

    def rejected(difference: float) -> bool:
        return abs(_score(gained, lost, pairs, difference)) > z

    return _edge(found, -1.0, rejected), _edge(found, 1.0, rejected)


def mean_interval(differences: NDArray[np.float64], counts: NDArray[Any]) -> tuple[float, float]:
    """Return the t interval of Σ differences / Σ counts, with the variance of a ratio estimator.

    `differences` [examples]: the sum of each example over its `counts` [examples] tokens. The
    tokens of an example are not independent, so the sampling unit is the example (Cochran 1977,
    Sampling Techniques, section 6.3): residuals d − mean · n, with examples − 1 degrees of freedom.

    Raises:
        ValueError: fewer than two examples.
    """
    examples = len(differences)
    if examples < 2:
        raise ValueError(f"{examples} examples have no spread")
    mean = float(differences.sum() / counts.sum())
    residuals = differences - mean * counts
    variance = examples / (examples - 1) * float((residuals**2).sum()) / float(counts.sum()) ** 2
    half = t_quantile(0.5 + LEVEL / 2, examples - 1) * math.sqrt(variance)
    return mean - half, mean + half


def t_quantile(p: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution, to within 0.3 %.

    Exact for one and two degrees of freedom, otherwise the expansion about the normal quantile
    (Abramowitz & Stegun 26.7.5).
    """
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))


def _score(gained: int, lost: int, pairs: int, difference: float) -> float:
    """Return Tango's statistic: how far the counts are from `difference`, in standard errors."""
    # q: the maximum likelihood probability of a lost pair given the difference, a quadratic's root.
    a = 2 * pairs
    b = -gained - lost + (2 * pairs - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    q = -2 * c / (b + root) if b > 0 else (root - b) / (2 * a)  # avoids cancellation
    variance = pairs * (2 * q + difference * (1 - difference))
    distance = gained - lost - pairs * difference
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def _edge(inside: float, outside: float, rejected: Callable[[float], bool]) -> float:
    """Return the value between `inside` and `outside` where rejection begins, by bisection."""
    if not rejected(outside):
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return inside
