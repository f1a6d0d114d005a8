"""Distances of two arrays at each position, by formulas without cancellation.

Arrays are [count, width]; divergences take logits, not probabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.floating[Any]]

# Below this, exp(x) − 1 − x is computed by its series.
_SMALL: Final = 0.05
# Relative margin that is added to a bound for its own float32 rounding.
_ROUNDED: Final = 1e-4
# If the actual vector is shorter than this share of the expected one, ⟨e, d⟩ cancels.
_SHORT: Final = 0.01


def cosine_distances(
    expected: Values, actual: Values, difference: Values, length: Values
) -> Values:
    """Return 1 − cosine of the vectors e and a of each position; 0 for two zero vectors.

    1 − cos = (‖d‖² − (‖a‖ − ‖e‖)²) / 2 ‖a‖ ‖e‖ with d = a − e,
    and ‖a‖ − ‖e‖ = (2 ⟨e, d⟩ + ‖d‖²) / (‖a‖ + ‖e‖). `length` is ‖e‖.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return _cosine_distances(expected, actual, difference, length)


def _cosine_distances(
    expected: Values, actual: Values, difference: Values, length: Values
) -> Values:
    squared = np.einsum("ij,ij->i", difference, difference)
    longer = 2 * np.einsum("ij,ij->i", expected, difference) + squared  # ‖a‖² − ‖e‖²
    other = np.sqrt(np.maximum(length * length + longer, 0))
    for row in np.flatnonzero(other <= _SHORT * length):
        other[row] = lengths(actual[row : row + 1])[0]
        longer[row] = np.einsum("j,j", difference[row], expected[row] + actual[row])
    both = length + other
    apart = np.maximum(squared - (longer / np.where(both > 0, both, 1)) ** 2, 0)
    zero = (length == 0) | (other == 0)
    distance = apart / np.where(zero, 1, 2 * length * other)
    far: Values = np.where(zero, (length != other).astype(distance.dtype), np.minimum(distance, 2))
    if expected.dtype != np.float64 and not np.isfinite(far).all():  # squares overflow
        exact = [np.asarray(part, np.float64) for part in (expected, actual, difference)]
        return cosine_distances(exact[0], exact[1], exact[2], lengths(exact[0]))
    return far


def lengths(vectors: Values) -> Values:
    """Return ‖v‖ of each position."""
    length: Values = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    return length


def divergence_bounds(
    expected: Values, difference: Values, furthest: Values, log_sum: Values
) -> Values:
    """Return an upper bound of `divergences`, for a fraction of its cost.

    exp(x) − 1 − x ≤ x²/2 exp(|x|), so KL ≤ Var_p(d)/2 exp(2 max|d|). `furthest` is max|d| of each
    position, `log_sum` the logarithm of Σ exp(e).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        p = expected - log_sum[:, np.newaxis]
        np.exp(p, out=p)
        p *= difference
        mean = p.sum(axis=1)
        square = np.einsum("ij,ij->i", p, difference)
        variance = square * (1 + _ROUNDED) - mean * mean * (1 - _ROUNDED)
        bounds: Values = variance / 2 * np.exp(2 * furthest) * (1 + _ROUNDED)
    # An infinite bound makes the caller compute the divergence itself.
    return np.where(np.isfinite(bounds), bounds, np.inf)


def _probabilities(logits: Values) -> Values:
    p: Values = logits - logits.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    return p


def divergences(expected: Values, difference: Values) -> Values:
    """Return KL(p ‖ q) of each position, where q's logits are p's logits + d.

    Σ p (log p − log q) = log Σ p exp(d) − Σ p d. With d shifted by its mean under p, which changes
    nothing, it is log1p(Σ p (exp(d) − 1 − d)): no term is negative, so small d do not cancel.
    """
    p = _probabilities(expected)
    d = difference - np.einsum("ij,ij->i", p, difference)[:, np.newaxis]
    small = d.max(axis=1) < 1
    near: Values = np.log1p(np.einsum("ij,ij->i", p, _excess(np.where(small[:, None], d, 0))))
    for row in np.flatnonzero(~small):
        # exp overflows for large d, where the usual log-sum-exp is accurate enough.
        log_p = np.asarray(expected[row], np.float64)
        log_p = log_p - log_p.max()
        log_p -= np.log(np.exp(log_p).sum())
        q = log_p + d[row]
        near[row] = max(0.0, q.max() + np.log(np.exp(q - q.max()).sum()))
    return near


def _excess(d: Values) -> Values:
    """Return exp(d) − 1 − d, by its series where the difference would cancel."""
    series = d * (1 / 120)
    for term in (1 / 24, 1 / 6, 1 / 2):
        series += term
        series *= d
    series *= d
    if max(d.max(), -d.min()) < _SMALL:
        return series
    return np.where(np.abs(d) < _SMALL, series, np.expm1(d) - d)


def symmetric_divergence(expected: Values, difference: Values) -> float:
    """Return the Jensen–Shannon divergence of one position, in nats.

    With q = p (1 + v) it is ½ Σ p ((1 + v) log1p(v) − (2 + v) log1p(v/2)); the bracket is v²/4 for
    small v.
    """
    p = _probabilities(np.asarray(expected, np.float64))
    q = _probabilities(np.asarray(expected, np.float64) + difference)
    v = np.divide(q - p, p, out=np.zeros_like(p), where=p > 0)
    exact = (1 + v) * np.log1p(np.maximum(v, -1 + 1e-16)) - (2 + v) * np.log1p(v / 2)
    terms = np.where(np.abs(v) < 1e-4, v * v / 4 * (1 - v / 2), exact)
    lost = q[p == 0].sum() * np.log(2)  # where p underflows to zero
    return float(0.5 * ((p * terms).sum() + lost))
