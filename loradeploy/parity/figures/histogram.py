"""Largest, mean, percentiles and distribution of numbers, accumulated over parts."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.floating[Any]]

# Absolute errors are counted by the upper bits of their float32 form: the exponent and seven bits
# of the fraction, so that a percentile is known to within 0.8 %.
_DROPPED_BITS: Final = 16
_UPPER: Final = slice(int(sys.byteorder == "little"), None, 2)  # the upper halves of float32
_BINS: Final = 1 << (31 - _DROPPED_BITS)
_LARGEST: Final = 0x7F7FFFFF  # float32's largest number, above which bins have no edge
# Half decades of a distribution: all errors below 1e-12 count as that.
_SMALLEST_HALF: Final = -24
_ZERO: Final = _SMALLEST_HALF - 1  # the values without any error


class Histogram:
    """Accumulates the largest, the mean and percentiles of non-negative numbers."""

    def __init__(self) -> None:
        self.largest = self._sum = 0.0
        self._count = 0
        self._histogram = np.zeros(_BINS, np.int64)
        self._bins = np.zeros(0, np.intp)  # used again, since new memory has to be cleared

    def add(self, values: Values, largest: float) -> None:
        """Add `values` [positions, width]; `largest` is the largest of them."""
        self.largest = max(self.largest, largest)
        with np.errstate(over="ignore"):
            # Pairwise in the values' own dtype within a position, in float64 across positions.
            total = float(values.sum(axis=-1).sum(dtype=np.float64))
            if not math.isfinite(total):
                total = float(values.sum(dtype=np.float64))
            self._sum += total
            narrow = np.ravel(values).astype(np.float32, copy=False)
        self._count += values.size
        if values.size > self._bins.size:
            self._bins = np.empty(values.size, np.intp)
        # bincount takes twice as long if it has to cast its input.
        bins = self._bins[: values.size]
        bins[:] = narrow.view(np.uint16)[_UPPER]
        counts = np.bincount(bins)
        self._histogram[: len(counts)] += counts

    @property
    def mean(self) -> float:
        return self._sum / max(1, self._count)

    def percentile(self, share: float) -> float:
        """Return the upper edge of the bin that contains the percentile."""
        if not self._count:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self._histogram), share * self._count))
        if index == 0:  # zeros, and numbers that float32 rounds to zero
            return 0.0
        return min(float(_upper_edges(np.array([index]))[0]), self.largest)

    def distribution(self) -> tuple[tuple[float, int], ...]:
        """Return the upper edges and counts in half decades (see `Figures.distribution`)."""
        bins = np.flatnonzero(self._histogram)
        halves = np.ceil(2 * np.log10(_upper_edges(bins))).astype(int)
        halves = np.where(bins == 0, _ZERO, np.maximum(halves, _SMALLEST_HALF))
        found, part = np.unique(halves, return_inverse=True)
        counts = np.zeros(len(found), np.int64)
        np.add.at(counts, part, self._histogram[bins])
        return tuple(
            (0.0 if half == _ZERO else float(f"{10 ** (half / 2):.3g}"), int(count))
            for half, count in zip(found.tolist(), counts, strict=True)
        )


def _upper_edges(bins: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the largest number in each bin."""
    codes = np.minimum((bins + 1) << _DROPPED_BITS, _LARGEST).astype(np.int32)
    edges: NDArray[np.float64] = codes.view(np.float32).astype(np.float64)
    return edges
