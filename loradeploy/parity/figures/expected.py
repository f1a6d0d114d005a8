"""Facts of expected values that the metrics need, computed once for all backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.parity.figures.distances import lengths

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.floating[Any]]
    Indices = NDArray[np.int64]

# Agreement is measured by the largest value, and by this many of the largest.
_TOP: Final = 5
# Number of largest expected values that are kept at each position: enough that the five largest
# actual values are usually among them.
_LEADERS: Final = 32
_STRIPES: Final = 64


@dataclass(frozen=True, eq=False)
class Expected:
    """Facts of expected values [count, width].

    `length` [count]: Euclidean norm of each position. `log_sum` [count]: log Σ exp. `leaders`
    [count, up to 32]: indices of the largest values, in ascending order. `top` [count, up to 5]:
    indices of the five largest values, the largest first. `least` [count]: the smallest value at
    `leaders`. All but `length` are empty if the values are not logits.
    """

    length: Values
    log_sum: Values
    leaders: Indices
    top: Indices
    least: Values

    @classmethod
    def of(cls, values: Values, *, logits: bool) -> Expected:
        """Compute the facts of `values` [count, width]; undefined where values are not finite."""
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
    """Return the indices of the five largest `values` [count, width] among `among` [count, some].

    `among`: indices in ascending order. The largest value comes first; of equal values, the one
    with the lowest index.
    """
    rows = np.arange(len(values))[:, np.newaxis]
    order = np.argsort(-values[rows, among], axis=1, kind="stable")[:, :_TOP]
    indices: Indices = among[rows, order]
    return indices


def leaders(actual: Values, furthest: Values, about: Expected) -> Indices:
    """Return the indices of the five largest `actual` values, in the order of `largest_of`.

    An actual value is at most `furthest` [count] from the expected one. If the fifth largest value
    among the expected leaders is above what any other can reach, no other value is looked at.
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
    """Return the indices [count, up to 32] of the largest `values`, in ascending order.

    Of equal values, those with the lowest indices are chosen.
    """
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
    """Return the indices of the `count` largest values; of equal values, the lowest indices.

    The maxima of many parts give a lower bound, which leaves few candidates in a vocabulary.
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
