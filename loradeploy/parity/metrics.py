"""How far two arrays are from each other, accumulated as the arrays come.

Everything is computed in the wider of the two sides' dtypes, float32 at least, by formulas that do
not cancel; sums are kept in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.floating[Any]]

# Relative errors are taken against no less than this share of the largest expected value: next to
# an expected zero, a rounding error is as large as one likes to say.
RELATIVE_GUARD: Final = 0.01

# Positions are compared in blocks that stay in the processor's cache.
_BLOCK: Final = 1 << 16
# Absolute errors are counted by the upper bits of their float32 form: the exponent and seven bits
# of the fraction, so that a percentile is known to within 0.8 %.
_DROPPED_BITS: Final = 16
_BINS: Final = 1 << (31 - _DROPPED_BITS)
_LARGEST: Final = 0x7F7FFFFF  # float32's largest number, above which bins have no edge
# Half decades of a distribution: all errors below 1e-12 count as that.
_SMALLEST_HALF: Final = -24
# Choices are compared by the largest value, and by the five largest.
_TOP: Final = 5
# Below this, exp(x) − 1 − x is taken from its series.
_SMALL: Final = 0.05
_STRIPES: Final = 64


@dataclass(frozen=True)
class Place:
    """Where an error is the largest: `index` is that of the token, label or feature."""

    case: int
    position: int
    index: int
    expected: float
    actual: float


@dataclass(frozen=True)
class Divergence:
    """A position at which the largest value is not where it is expected.

    `margin`: by how much the expected token leads the chosen one in the reference. `step`: how many
    tokens were generated before, None within the prompt.
    """

    case: int
    position: int
    step: int | None
    expected: int
    actual: int
    margin: float


@dataclass(frozen=True)
class Figures:
    """What a comparison came to.

    Relative errors are guarded (`RELATIVE_GUARD`), `max_ulp` is the largest of them in units of
    the last place of float32. `cosine_distance` (1 − cosine), `kl` (nats, reference ‖ other) and
    `js` (Jensen–Shannon, where `kl` is the largest) are the worst position's. `top1` is the share
    of positions with the same largest value, `top5` of the five largest that both sides have,
    `greedy` of generated tokens that are the same. What needs logits is None where there are none,
    `greedy` where nothing was generated.
    `margin`: the largest margin of all divergences, 0 where there is none.
    `not_finite`: positions with a value, on either side, that is no finite number; they are in no
    other figure.
    `distribution`: how many values have an absolute error up to each upper edge and above the one
    half a decade before. Edges begin at 1e-12, and are good to 1 %; 0 counts the values without any
    error. What holds no values is left out.
    """

    positions: int
    not_finite: int
    max_abs: float
    p99_abs: float
    mean_abs: float
    max_rel: float
    p99_rel: float
    mean_rel: float
    max_ulp: float
    cosine_distance: float
    kl: float | None
    js: float | None
    top1: float | None
    top5: float | None
    greedy: float | None
    margin: float
    worst: Place | None
    first_divergence: Divergence | None
    distribution: tuple[tuple[float, int], ...] = ()


class Comparison:
    """Accumulates the differences between expected and actual values.

    `scale`: the largest absolute value that is expected anywhere, for the relative error's guard.
    `logits`: whether a position holds logits, whose distribution and largest value mean something.
    """

    def __init__(self, *, scale: float, logits: bool) -> None:
        self._guard = max(RELATIVE_GUARD * scale, float(np.finfo(np.float32).tiny))
        self._logits = logits
        self._positions = self._compared = self._not_finite = 0
        self._absolute, self._relative = _Errors(), _Errors()
        self._max_ulp = self._max_distance = self._max_kl = self._max_js = self._margin = 0.0
        self._agree = self._steps = self._steps_agree = 0
        self._shared = 0.0
        self._worst: Place | None = None
        self._first: Divergence | None = None

    def add(
        self,
        expected: NDArray[Any],
        actual: NDArray[Any],
        *,
        case: int = 0,
        first: int = 0,
        first_step: int | None = None,
    ) -> None:
        """Take in consecutive positions of a case, both arrays [positions, width].

        `first` is the number of the first of these positions in the case, `first_step` the number
        of the position whose values choose the first generated token.

        Raises:
            ValueError: the shapes differ.
        """
        if expected.shape != actual.shape:
            raise ValueError(f"{list(actual.shape)} where {list(expected.shape)} is expected")
        kind = np.result_type(expected, actual, np.float32)
        rows = max(1, _BLOCK // max(1, expected.shape[1]))
        for start in range(0, len(expected), rows):
            block = slice(start, start + rows)
            self._add(
                np.asarray(expected[block], kind),
                np.asarray(actual[block], kind),
                case,
                first + start,
                first_step,
            )

    def figures(self) -> Figures:
        """The figures of all that was added."""
        seen = max(1, self._compared)
        absolute, relative, logits = self._absolute, self._relative, self._logits
        return Figures(
            positions=self._positions,
            not_finite=self._not_finite,
            max_abs=absolute.largest,
            p99_abs=absolute.percentile(0.99),
            mean_abs=absolute.mean,
            max_rel=relative.largest,
            p99_rel=relative.percentile(0.99),
            mean_rel=relative.mean,
            max_ulp=self._max_ulp,
            cosine_distance=self._max_distance,
            kl=self._max_kl if logits else None,
            js=self._max_js if logits else None,
            top1=self._agree / seen if logits else None,
            top5=self._shared / seen if logits else None,
            greedy=self._steps_agree / self._steps if self._steps else None,
            margin=self._margin,
            worst=self._worst,
            first_divergence=self._first,
            distribution=absolute.distribution(),
        )

    def _add(
        self, expected: Values, actual: Values, case: int, first: int, first_step: int | None
    ) -> None:
        numbers = np.arange(first, first + len(expected))
        finite = np.isfinite(expected).all(axis=1) & np.isfinite(actual).all(axis=1)
        self._positions += len(expected)
        if not finite.all():
            self._not_finite += int((~finite).sum())
            expected, actual, numbers = expected[finite], actual[finite], numbers[finite]
        if not expected.size:
            return
        self._compared += len(expected)
        difference = actual - expected
        self._add_errors(expected, actual, np.abs(difference), case, numbers)
        distance = _cosine_distance(expected, actual, difference)
        self._max_distance = max(self._max_distance, float(distance.max()))
        if self._logits:
            self._add_divergence(expected, difference)
            self._add_choices(expected, actual, case, numbers, first_step)

    def _add_errors(
        self,
        expected: Values,
        actual: Values,
        error: Values,
        case: int,
        numbers: NDArray[np.int64],
    ) -> None:
        worst = int(error.argmax())
        if self._worst is None or float(error.flat[worst]) > self._absolute.largest:
            row, index = divmod(worst, error.shape[1])
            self._worst = Place(
                case,
                int(numbers[row]),
                index,
                float(expected[row, index]),
                float(actual[row, index]),
            )
        self._absolute.add(error)
        base = np.abs(expected)
        np.maximum(base, self._guard, out=base)
        relative = error / base
        largest = int(relative.argmax())
        if float(relative.flat[largest]) > self._relative.largest:
            unit = float(np.spacing(np.float32(base.flat[largest])))
            self._max_ulp = max(self._max_ulp, float(error.flat[largest]) / unit)
        self._relative.add(relative)

    def _add_divergence(self, expected: Values, difference: Values) -> None:
        kl = _divergence(expected, difference)
        worst = int(kl.argmax())
        if float(kl[worst]) > self._max_kl:
            self._max_kl = float(kl[worst])
            self._max_js = _symmetric_divergence(expected[worst], difference[worst])

    def _add_choices(
        self,
        expected: Values,
        actual: Values,
        case: int,
        numbers: NDArray[np.int64],
        first_step: int | None,
    ) -> None:
        expected_top, actual_top = expected.argmax(axis=1), actual.argmax(axis=1)
        agree = expected_top == actual_top
        self._agree += int(agree.sum())
        self._shared += sum(map(_shared, expected, actual))
        if first_step is not None:
            generated = numbers >= first_step
            self._steps += int(generated.sum())
            self._steps_agree += int((agree & generated).sum())
        for row in np.flatnonzero(~agree):
            step = None if first_step is None else int(numbers[row]) - first_step
            margin = float(expected[row, expected_top[row]] - expected[row, actual_top[row]])
            self._margin = max(self._margin, margin)
            divergence = Divergence(
                case=case,
                position=int(numbers[row]),
                step=step if step is not None and step >= 0 else None,
                expected=int(expected_top[row]),
                actual=int(actual_top[row]),
                margin=margin,
            )
            if self._first is None or _order(divergence) < _order(self._first):
                self._first = divergence


class _Errors:
    """Largest, mean and percentiles of non-negative numbers, as they come."""

    def __init__(self) -> None:
        self.largest = self._sum = 0.0
        self._count = 0
        self._histogram = np.zeros(_BINS, np.int64)

    def add(self, values: Values) -> None:
        self.largest = max(self.largest, float(values.max()))
        self._sum += float(values.sum(dtype=np.float64))
        self._count += values.size
        with np.errstate(over="ignore"):
            bits = values.astype(np.float32, copy=False).view(np.uint32) >> _DROPPED_BITS
        counts = np.bincount(bits.ravel())
        self._histogram[: len(counts)] += counts

    @property
    def mean(self) -> float:
        return self._sum / max(1, self._count)

    def percentile(self, share: float) -> float:
        """The upper edge of the bin in which the percentile lies."""
        if not self._count:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self._histogram), share * self._count))
        if index == 0:  # zeros and what float32 cannot tell from them
            return 0.0
        return min(float(_upper_edges(np.array([index]))[0]), self.largest)

    def distribution(self) -> tuple[tuple[float, int], ...]:
        """Upper edges and counts, in half decades (`Figures`)."""
        bins = np.flatnonzero(self._histogram)
        counts: dict[float, int] = {}
        for index, edge in zip(bins, _upper_edges(bins), strict=True):
            half = max(_SMALLEST_HALF, math.ceil(2 * math.log10(edge)))
            upper = 0.0 if index == 0 else float(f"{10 ** (half / 2):.3g}")
            counts[upper] = counts.get(upper, 0) + int(self._histogram[index])
        return tuple(sorted(counts.items()))


def _upper_edges(bins: NDArray[np.int64]) -> NDArray[np.float64]:
    """The largest number that each bin of a histogram holds."""
    codes = np.minimum((bins + 1) << _DROPPED_BITS, _LARGEST).astype(np.int32)
    edges: NDArray[np.float64] = codes.view(np.float32).astype(np.float64)
    return edges


def _order(divergence: Divergence) -> tuple[bool, int, int]:
    """Generated tokens before the prompt's, early ones before late ones."""
    step = divergence.step
    return (step is None, divergence.position if step is None else step, divergence.case)


def _cosine_distance(expected: Values, actual: Values, difference: Values) -> Values:
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


def _divergence(expected: Values, difference: Values) -> Values:
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


def _symmetric_divergence(expected: Values, difference: Values) -> float:
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


def _shared(expected: Values, actual: Values) -> float:
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
