"""How far two arrays are from each other, accumulated in float64 as the arrays come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Relative errors are taken against no less than this share of the largest expected value: next to
# an expected zero, a rounding error is as large as one likes to say.
RELATIVE_GUARD: Final = 0.01

# Positions are compared in blocks that stay in the processor's cache.
_BLOCK: Final = 1 << 16
# Absolute errors are counted by the upper bits of their float32 form: the exponent and seven bits
# of the fraction, so that a percentile is known to within 0.8 %.
_DROPPED_BITS: Final = 16
_BINS: Final = 1 << (31 - _DROPPED_BITS)


@dataclass(frozen=True)
class Place:
    """Where an error is the largest: `index` is the place in the vocabulary, labels or features."""

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

    `max_rel` is guarded (`RELATIVE_GUARD`); `cosine` and `kl` (nats, reference ‖ other) are the
    worst position's. `kl`, `top1` (share of positions with the same largest value) and `greedy`
    (share of generated tokens) are None where the values are no logits or nothing was generated.
    `margin`: the largest margin of all divergences, 0 where there is none.
    `not_finite`: positions with a value, on either side, that is no finite number; they are in no
    other figure.
    """

    positions: int
    not_finite: int
    max_abs: float
    p99_abs: float
    mean_abs: float
    max_rel: float
    cosine: float
    kl: float | None
    top1: float | None
    greedy: float | None
    margin: float
    worst: Place | None
    first_divergence: Divergence | None


class Comparison:
    """Accumulates the differences between expected and actual values.

    `scale`: the largest absolute value that is expected anywhere, for the relative error's guard.
    `logits`: whether a position holds logits, whose distribution and largest value mean something.
    """

    def __init__(self, *, scale: float, logits: bool) -> None:
        self._guard = max(RELATIVE_GUARD * scale, np.finfo(np.float32).tiny)
        self._logits = logits
        self._positions = self._compared = self._not_finite = self._values = 0
        self._sum_abs = 0.0
        self._max_abs = self._max_rel = self._max_kl = self._margin = 0.0
        self._min_cosine = 1.0
        self._agree = self._steps = self._steps_agree = 0
        self._histogram = np.zeros(_BINS, np.int64)
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
        rows = max(1, _BLOCK // max(1, expected.shape[1]))
        for start in range(0, len(expected), rows):
            block = slice(start, start + rows)
            self._add(
                np.asarray(expected[block], np.float64),
                np.asarray(actual[block], np.float64),
                case,
                first + start,
                first_step,
            )

    def figures(self) -> Figures:
        """The figures of all that was added."""
        seen = max(1, self._compared)
        return Figures(
            positions=self._positions,
            not_finite=self._not_finite,
            max_abs=self._max_abs,
            p99_abs=self._percentile(0.99),
            mean_abs=self._sum_abs / max(1, self._values),
            max_rel=self._max_rel,
            cosine=self._min_cosine,
            kl=self._max_kl if self._logits else None,
            top1=self._agree / seen if self._logits else None,
            greedy=self._steps_agree / self._steps if self._steps else None,
            margin=self._margin,
            worst=self._worst,
            first_divergence=self._first,
        )

    def _add(
        self,
        expected: NDArray[np.float64],
        actual: NDArray[np.float64],
        case: int,
        first: int,
        first_step: int | None,
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
        self._min_cosine = min(self._min_cosine, float(_cosine(expected, actual).min()))
        if self._logits:
            self._max_kl = max(self._max_kl, float(_divergence(expected, difference).max()))
            self._add_choices(expected, actual, case, numbers, first_step)

    def _add_errors(
        self,
        expected: NDArray[np.float64],
        actual: NDArray[np.float64],
        error: NDArray[np.float64],
        case: int,
        numbers: NDArray[np.int64],
    ) -> None:
        self._values += error.size
        self._sum_abs += float(error.sum())
        bins = error.astype(np.float32).view(np.int32) >> _DROPPED_BITS
        counts = np.bincount(bins.ravel())
        self._histogram[: len(counts)] += counts
        worst = int(error.argmax())
        largest = float(error.flat[worst])
        if self._worst is None or largest > self._max_abs:
            row, index = divmod(worst, error.shape[1])
            self._worst = Place(
                case,
                int(numbers[row]),
                index,
                float(expected[row, index]),
                float(actual[row, index]),
            )
            self._max_abs = largest
        relative = error / np.maximum(np.abs(expected), self._guard)
        self._max_rel = max(self._max_rel, float(relative.max()))

    def _add_choices(
        self,
        expected: NDArray[np.float64],
        actual: NDArray[np.float64],
        case: int,
        numbers: NDArray[np.int64],
        first_step: int | None,
    ) -> None:
        wanted, chosen = expected.argmax(axis=1), actual.argmax(axis=1)
        agree = wanted == chosen
        self._agree += int(agree.sum())
        if first_step is not None:
            generated = numbers >= first_step
            self._steps += int(generated.sum())
            self._steps_agree += int((agree & generated).sum())
        for row in np.flatnonzero(~agree):
            step = None if first_step is None else int(numbers[row]) - first_step
            margin = float(expected[row, wanted[row]] - expected[row, chosen[row]])
            self._margin = max(self._margin, margin)
            divergence = Divergence(
                case=case,
                position=int(numbers[row]),
                step=step if step is not None and step >= 0 else None,
                expected=int(wanted[row]),
                actual=int(chosen[row]),
                margin=margin,
            )
            if self._first is None or _order(divergence) < _order(self._first):
                self._first = divergence

    def _percentile(self, share: float) -> float:
        """The upper edge of the bin in which the percentile lies."""
        if not self._values:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self._histogram), share * self._values))
        if index == 0:  # zeros and what float32 cannot tell from them
            return 0.0
        edge = np.array([(index + 1) << _DROPPED_BITS], np.int32).view(np.float32)[0]
        return min(float(edge), self._max_abs)


def _order(divergence: Divergence) -> tuple[bool, int, int]:
    """Generated tokens before the prompt's, early ones before late ones."""
    step = divergence.step
    return (step is None, divergence.position if step is None else step, divergence.case)


def _cosine(expected: NDArray[np.float64], actual: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosine of each position's vectors; two zero vectors are one direction."""
    product = np.einsum("ij,ij->i", expected, actual)
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(actual, axis=1)
    zeros = (lengths == 0) & ~expected.any(axis=1) & ~actual.any(axis=1)
    cosine = np.divide(product, lengths, out=zeros.astype(np.float64), where=lengths > 0)
    clipped: NDArray[np.float64] = np.clip(cosine, -1.0, 1.0)
    return clipped


def _divergence(
    expected: NDArray[np.float64], difference: NDArray[np.float64]
) -> NDArray[np.float64]:
    """KL(p ‖ q) of each position, for q's logits = p's logits + difference.

    Σ p (log p − log q) = log Σ p exp(d) − Σ p d, with log Σ p exp(d) = log1p(Σ p expm1(d)): nothing
    is lost where d is small. d is shifted by its mean under p first, which changes nothing.
    """
    centred = expected - expected.max(axis=1, keepdims=True)
    log_p = centred - np.log(np.exp(centred).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    shifted = difference - (p * difference).sum(axis=1, keepdims=True)
    small = shifted.max(axis=1, keepdims=True) < 1.0
    excess = (p * np.expm1(np.where(small, shifted, 0.0))).sum(axis=1)
    near: NDArray[np.float64] = np.log1p(np.maximum(excess, 0.0))
    if small.all():
        return near
    # expm1 overflows for large d; there the usual log-sum-exp loses nothing that matters.
    q = log_p + shifted
    peak = q.max(axis=1)
    far = peak + np.log(np.exp(q - peak[:, None]).sum(axis=1))
    return np.where(small[:, 0], near, np.maximum(far, 0.0))
