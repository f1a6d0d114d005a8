"""What the figures need of an expected position, computed once for all that is compared with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.parity.figures.distances import lengths

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.floating[Any]]
    Indices = NDArray[np.int64]

# Choices are compared by the largest value, and by the five largest.
_TOP: Final = 5
# So many of a position's largest values are known, so that the five largest of values near them
# are among them.
_LEADERS: Final = 32
_STRIPES: Final = 64


@dataclass(frozen=True, eq=False)
class Expected:
    """Facts of positions [count, width].

    `length` [count]: of each as a vector. `log_sum` [count]: log Σ exp. `leaders` [count, up to
    32]: indices of the largest values, in ascending order. `top` [count, up to 5]: the largest of
    these, the largest first; `least` [count]: the smallest value of them. All but the first are of
    logits alone.
    """

    length: Values
    log_sum: Values
    leaders: Indices
    top: Indices
    least: Values

    @classmethod
    def of(cls, values: Values, *, logits: bool) -> Expected:
        """The facts of `values` [count, width]; of what is not finite they mean nothing."""
        if not logits or not values.size:
            none = np.zeros((len(values), 0))
            no_index = none.astype(np.int64)
            with np.errstate(over="ignore", invalid="ignore"):
                return cls(lengths(values), none, no_index, no_index, none)
        if not np.isfinite(values).all():
            values = np.nan_to_num(values)
        with np.errstate(over="ignore", invalid="ignore"):
            leading = _leading(values)
            rows = np.arange(len(values))[:, np.newaxis]
            led = values[rows, leading]
            most = led.max(axis=1, keepdims=True)
            summed = [np.exp(one - its).sum() for one, its in zip(values, most, strict=True)]
            log_sum = most[:, 0] + np.log(summed)
            top = largest_of(values, leading)
            return cls(lengths(values), log_sum, leading, top, led.min(axis=1))

    def __getitem__(self, part: slice | NDArray[np.bool_]) -> Expected:
        return Expected(
            self.length[part],
            self.log_sum[part],
            self.leaders[part],
            self.top[part],
            self.least[part],
        )


def largest_of(values: Values, among: Indices) -> Indices:
    """The indices of the five largest `values` [count, width] that are in `among` [count, some].

    `among` is in ascending order. The largest comes first, of equal ones the first index.
    """
    rows = np.arange(len(values))[:, np.newaxis]
    order = np.argsort(-values[rows, among], axis=1, kind="stable")[:, :_TOP]
    indices: Indices = among[rows, order]
    return indices


def leaders(actual: Values, furthest: Values, about: Expected) -> Indices:
    """The indices of the five largest `actual` values, as `largest_of` gives them.

    An actual value is at most `furthest` [count] from the expected one. So where the fifth largest
    of the known leaders is beyond what any other can reach, nothing else is looked at.
    """
    found = largest_of(actual, about.leaders)
    width = actual.shape[1]
    if width <= about.leaders.shape[1]:
        return found
    rows = np.arange(len(actual))[:, np.newaxis]
    fifth = actual[rows, found].min(axis=1)
    furthest_up = about.least + furthest
    reach = np.nextafter(furthest_up, np.asarray(np.inf, furthest_up.dtype))
    for row in np.flatnonzero(~(fifth > reach)):
        found[row] = _largest(actual[row], found.shape[1])
    return found


def _leading(values: Values) -> Indices:
    """The indices [count, up to 32] of the largest `values`, of equal ones the first, ascending."""
    count, width = values.shape
    if width <= _LEADERS:
        return np.tile(np.arange(width), (count, 1))
    if width // _STRIPES > _LEADERS:
        return np.sort([_largest(position, _LEADERS) for position in values])
    least = np.partition(values, -_LEADERS, axis=1)[:, -_LEADERS, np.newaxis]
    above, equal = values > least, values == least
    missing = _LEADERS - above.sum(axis=1, keepdims=True)
    chosen = above | (equal & (equal.cumsum(axis=1) <= missing))
    return np.nonzero(chosen)[1].reshape(count, _LEADERS)


def _largest(values: Values, count: int) -> Indices:
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
    indices: Indices = candidates[order]
    return indices
