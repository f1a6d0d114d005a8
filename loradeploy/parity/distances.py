"""Distances of two arrays, position by position, by formulas that do not cancel.

Positions are [count, width]; what is of logits takes them as such.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.floating[Any]]

# Choices are compared by the largest value, and by the five largest.
_TOP: Final = 5
# Below this, exp(x) − 1 − x is taken from its series.
_SMALL: Final = 0.05
_STRIPES: Final = 64


def cosine_distances(expected: Values, actual: Values, difference: Values) -> Values:
    """1 − cosine of each position's vectors e and a; two zero vectors are one direction.

    1 − cos = (‖d‖² − (‖a‖ − ‖e‖)²) / 2 ‖a‖ ‖e‖ with d = a − e,
    and ‖a‖ − ‖e‖ = ⟨d, a + e⟩ / (‖a‖ + ‖e‖).
    """
    first, second = _length(expected), _length(actual)
    longer = np.einsum("ij,ij->i", difference, expected + actual) / np.where(
        first + second > 0, first + second, 1
    )
    apart = np.maximum(_length(difference) ** 2 - longer**2, 0)
    zero = (first == 0) | (second == 0)
    distance = apart / np.where(zero, 1, 2 * first * second)
    far: Values = np.where(zero, (first != second).astype(distance.dtype), np.minimum(distance, 2))
    return far


def _length(vectors: Values) -> Values:
    length: Values = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    return length


def _probabilities(logits: Values) -> Values:
    p: Values = logits - logits.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    return p


def divergences(expected: Values, difference: Values) -> Values:
    """KL(p ‖ q) of each position, for q's logits = p's logits + d.

    Σ p (log p − log q) = log Σ p exp(d) − Σ p d. With d shifted by its mean under p, which changes
    nothing, it is log1p(Σ p (exp(d) − 1 − d)): no term is negative, so nothing is lost where d is
    small.
    """
    p = _probabilities(expected)
    d = difference - np.einsum("ij,ij->i", p, difference)[:, np.newaxis]
    small = d.max(axis=1) < 1
    near: Values = np.log1p(np.einsum("ij,ij->i", p, _excess(np.where(small[:, None], d, 0))))
    for row in np.flatnonzero(~small):
        # exp overflows for large d; there the usual log-sum-exp loses nothing that matters.
        log_p = np.asarray(expected[row], np.float64)
        log_p = log_p - log_p.max()
        log_p -= np.log(np.exp(log_p).sum())
        q = log_p + d[row]
        near[row] = max(0.0, q.max() + np.log(np.exp(q - q.max()).sum()))
    return near


def _excess(d: Values) -> Values:
    """exp(d) − 1 − d, by its series where it would cancel."""
    series = d * (1 / 120)
    for term in (1 / 24, 1 / 6, 1 / 2):
        series += term
        series *= d
    series *= d
    if max(d.max(), -d.min()) < _SMALL:
        return series
    return np.where(np.abs(d) < _SMALL, series, np.expm1(d) - d)


def symmetric_divergence(expected: Values, difference: Values) -> float:
    """The Jensen–Shannon divergence of one position, in nats.

    With q = p (1 + v) it is ½ Σ p ((1 + v) log1p(v) − (2 + v) log1p(v/2)); the bracket is v²/4 for
    small v.
    """
    p = _probabilities(np.asarray(expected, np.float64))
    q = _probabilities(np.asarray(expected, np.float64) + difference)
    v = np.divide(q - p, p, out=np.zeros_like(p), where=p > 0)
    exact = (1 + v) * np.log1p(np.maximum(v, -1 + 1e-16)) - (2 + v) * np.log1p(v / 2)
    terms = np.where(np.abs(v) < 1e-4, v * v / 4 * (1 - v / 2), exact)
    lost = q[p == 0].sum() * np.log(2)  # what p has not at all
    return float(0.5 * ((p * terms).sum() + lost))


def shared_largest(expected: Values, actual: Values) -> float:
    """The share of the largest values' indices that two positions have in common."""
    count = min(_TOP, len(expected))
    return len(set(_largest(expected, count)) & set(_largest(actual, count))) / count


def _largest(values: Values, count: int) -> list[int]:
    """The indices of the `count` largest values, the first indices of equal ones.

    The largest of each of many parts give a bound, which leaves few candidates of a vocabulary.
    """
    columns = len(values) // _STRIPES
    if columns > count:
        tops = values[: columns * _STRIPES].reshape(_STRIPES, columns).max(axis=0)
        candidates = np.flatnonzero(values >= np.partition(tops, -count)[-count])
    else:
        candidates = np.arange(len(values))
    order = np.argsort(-values[candidates], kind="stable")[:count]
    indices: list[int] = candidates[order].tolist()
    return indices
