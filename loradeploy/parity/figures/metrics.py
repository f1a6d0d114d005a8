"""Error metrics of two arrays, accumulated over parts.

Everything is computed in the wider of the two dtypes, at least float32, by formulas without
cancellation; sums are accumulated in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.parity.figures.distances import (
    cosine_distances,
    divergence_bounds,
    divergences,
    symmetric_divergence,
)
from loradeploy.parity.figures.expected import Expected, leaders
from loradeploy.parity.figures.histogram import Histogram

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.floating[Any]]

# The denominator of relative errors is at least this share of the largest expected value: relative
# to an expected value near zero, any rounding error would be arbitrarily large.
RELATIVE_GUARD: Final = 0.01

# Positions are compared in blocks that fit into the processor's cache.
_BLOCK: Final = 1 << 16


@dataclass(frozen=True)
class Place:
    """The place of the largest error. `index`: that of the token, label or feature."""

    case: int
    position: int
    index: int
    expected: float
    actual: float


@dataclass(frozen=True)
class Divergence:
    """A position at which another index has the largest value than expected.

    `expected`, `actual`: the two indices. `margin`: the difference of their values in the
    reference. `step`: number of tokens generated before; None within the prompt.
    """

    case: int
    position: int
    step: int | None
    expected: int
    actual: int
    margin: float


@dataclass(frozen=True)
class Figures:
    """The error metrics of a comparison.

    Relative errors are guarded (`RELATIVE_GUARD`); `max_ulp` is the largest of them in units in
    the last place of float32. `cosine_distance` (1 − cosine), `kl` (nats, reference ‖ actual) and
    `js` (Jensen–Shannon, at the position of the largest `kl`) are those of the worst position.
    `top1` is the share of positions with the same index of the largest value, `top5` the share of
    the five largest that both sides have, `greedy` the share of equal generated tokens. Metrics of
    logits are None if the values are not logits, `greedy` if nothing was generated.
    `margin`: the largest margin of all divergences, 0 if there is none.
    `not_finite`: number of positions with NaN or infinite values on either side; they are excluded
    from all other metrics.
    `distribution`: histogram of absolute errors in half decades, as (upper edge, count). Edges
    begin at 1e-12 and are accurate to 1 %; edge 0 counts the values without any error. Empty bins
    are left out.
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


@dataclass(frozen=True, eq=False)
class _Block:
    """Positions of a case that are compared: arrays [positions, width].

    `error`: the absolute `difference`, and `furthest` [positions] its largest value at each.
    `numbers` [positions]: their indices in the case. `about`, `first_step`: see `Comparison.add`.
    """

    expected: Values
    actual: Values
    difference: Values
    error: Values
    furthest: Values
    about: Expected
    numbers: NDArray[np.int64]
    case: int
    first_step: int | None

    @classmethod
    def of(
        cls,
        expected: Values,
        actual: Values,
        about: Expected,
        numbers: NDArray[np.int64],
        case: int,
        first_step: int | None,
    ) -> _Block:
        """The block of these positions, of which there is at least one."""
        with np.errstate(invalid="ignore", over="ignore"):
            difference = actual - expected
        error = np.abs(difference)
        furthest = error.max(axis=1)
        return cls(expected, actual, difference, error, furthest, about, numbers, case, first_step)

    def at(self, rows: NDArray[np.bool_]) -> _Block:
        """The positions in `rows`."""
        return replace(
            self,
            expected=self.expected[rows],
            actual=self.actual[rows],
            difference=self.difference[rows],
            error=self.error[rows],
            furthest=self.furthest[rows],
            about=self.about[rows],
            numbers=self.numbers[rows],
        )


class Comparison:
    """Accumulates the differences between expected and actual values.

    `scale`: the largest absolute expected value, for the guard of relative errors.
    `logits`: whether the values are logits, which also have a distribution and a largest index.
    """

    def __init__(self, *, scale: float, logits: bool) -> None:
        self._guard = max(RELATIVE_GUARD * scale, float(np.finfo(np.float32).tiny))
        self._logits = logits
        self._positions = self._compared = self._not_finite = 0
        self._absolute, self._relative = Histogram(), Histogram()
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
        about: Expected | None = None,
    ) -> None:
        """Add consecutive positions of a case, both arrays [positions, width].

        `first`: index of the first of these positions in the case. `first_step`: index of the
        position whose values choose the first generated token. `about`: precomputed facts of the
        expected positions, if they are compared more than once.

        Raises:
            ValueError: the shapes differ.
        """
        if expected.shape != actual.shape:
            raise ValueError(f"{list(actual.shape)} where {list(expected.shape)} is expected")
        self._positions += len(expected)
        if not expected.size:
            return
        kind = np.result_type(expected, actual, np.float32)
        rows = max(1, _BLOCK // expected.shape[1])
        for start in range(0, len(expected), rows):
            block = slice(start, start + rows)
            values = np.asarray(expected[block], kind)
            known = Expected.of(values, logits=self._logits) if about is None else about[block]
            numbers = np.arange(first + start, first + start + len(values))
            self._add(
                _Block.of(values, np.asarray(actual[block], kind), known, numbers, case, first_step)
            )

    def figures(self) -> Figures:
        """Return the figures of everything that was added."""
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

    def _add(self, block: _Block) -> None:
        if not np.isfinite(block.furthest).all():
            both = np.isfinite(block.expected) & np.isfinite(block.actual)
            finite: NDArray[np.bool_] = np.asarray(both.all(axis=1), bool)
            self._not_finite += int((~finite).sum())
            if not finite.any():
                return
            block = block.at(finite)
        self._compared += len(block.expected)
        self._add_errors(block)
        distance = cosine_distances(
            block.expected, block.actual, block.difference, block.about.length
        )
        self._max_distance = max(self._max_distance, float(distance.max()))
        if self._logits:
            self._add_divergence(block)
            self._add_choices(block)

    def _add_errors(self, block: _Block) -> None:
        expected, error, furthest = block.expected, block.error, block.furthest
        row = int(furthest.argmax())
        if self._worst is None or float(furthest[row]) > self._absolute.largest:
            index = int(error[row].argmax())
            self._worst = Place(
                block.case,
                int(block.numbers[row]),
                index,
                float(expected[row, index]),
                float(block.actual[row, index]),
            )
        self._absolute.add(error, float(furthest[row]))
        base = np.abs(expected)
        np.maximum(base, self._guard, out=base)
        relative = np.divide(error, base, out=base)
        largest = float(relative.max())
        if largest > self._relative.largest:
            worst = int(relative.argmax())
            near = max(abs(float(expected.flat[worst])), self._guard)
            unit = float(np.spacing(np.float32(near)))
            self._max_ulp = max(self._max_ulp, float(error.flat[worst]) / unit)
        self._relative.add(relative, largest)

    def _add_divergence(self, block: _Block) -> None:
        expected, difference = block.expected, block.difference
        bounds = divergence_bounds(expected, difference, block.furthest, block.about.log_sum)
        # For small differences a bound is close to the divergence itself, so computing the row with
        # the largest bound first rules out nearly all others.
        for rows in (np.argmax(bounds, keepdims=True), slice(None)):
            rows = np.arange(len(bounds))[rows]
            rows = rows[bounds[rows] > self._max_kl]
            if len(rows):
                kl = divergences(expected[rows], difference[rows])
                worst = int(kl.argmax())
                if float(kl[worst]) > self._max_kl:
                    self._max_kl = float(kl[worst])
                    row = rows[worst]
                    self._max_js = symmetric_divergence(expected[row], difference[row])

    def _add_choices(self, block: _Block) -> None:
        expected, numbers, first_step = block.expected, block.numbers, block.first_step
        expected_five = block.about.top  # [positions, up to 5]
        actual_five = leaders(block.actual, block.furthest, block.about)
        expected_top, actual_top = expected_five[:, 0], actual_five[:, 0]
        agree = expected_top == actual_top
        self._agree += int(agree.sum())
        both = (expected_five[:, :, np.newaxis] == actual_five[:, np.newaxis, :]).sum()
        self._shared += int(both) / expected_five.shape[1]
        if first_step is not None:
            generated = numbers >= first_step
            self._steps += int(generated.sum())
            self._steps_agree += int((agree & generated).sum())
        for row in np.flatnonzero(~agree):
            step = None if first_step is None else int(numbers[row]) - first_step
            margin = float(expected[row, expected_top[row]] - expected[row, actual_top[row]])
            self._margin = max(self._margin, margin)
            divergence = Divergence(
                case=block.case,
                position=int(numbers[row]),
                step=step if step is not None and step >= 0 else None,
                expected=int(expected_top[row]),
                actual=int(actual_top[row]),
                margin=margin,
            )
            if self._first is None or _order(divergence) < _order(self._first):
                self._first = divergence


def _order(divergence: Divergence) -> tuple[bool, int, int]:
    """Sort key: generated tokens before the prompt's, early ones before late ones."""
    step = divergence.step
    return (step is None, divergence.position if step is None else step, divergence.case)
