"""The reference for a graph whose weights were dequantized, merged into and quantized again.

The graph no longer shows how the base was quantized before the merge, so a merge in PyTorch that is
rounded once differs from it by the first rounding. The error of both roundings together can be read
from the graph: with V its weight, W the base's and Δ the adapter's update, it is

    E = V − (W + Δ)

The reference is W + Δ + E, but only if E is nothing but rounding error:

    small         no row of E is larger than two roundings in blocks of these bits can cause
    undirected    E has no component along Δ: the share of the adapter in V, 1 + ⟨E, Δ⟩ / ‖Δ‖², is 1

A weight that is not the base's fails the first test; an adapter that is missing, doubled or another
one fails the second. The reference is then the merge, rounded as an export rounds it, so that the
difference shows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.parity.reference.quantized import QuantizedWeight

# One rounding has an RMS error of 1 / √12 of a step, two of √2 times that. Quantizers that consider
# activations (GPTQ) have larger errors than rounding to the nearest step.
_ROOM: Final = 3.0
# By how much the share of the adapter may differ from 1: rounding to few bits loses some of it.
_SHARE: Final = 0.25
# Number of standard errors allowed for the share, which is estimated from rounded numbers.
_SURE: Final = 6.0
# Rows smaller than this share of the RMS row size are treated as if they had that size.
_SMALL_ROW: Final = 0.1

Weights = Callable[[str], "NDArray[np.float32] | None"]


@dataclass
class _Along:
    """The component of E along Δ, as sums over one weight or over all weights."""

    product: float = 0.0
    update: float = 0.0
    rounding: float = 0.0
    size: int = 0

    def add(self, other: _Along) -> None:
        self.product += other.product
        self.update += other.update
        self.rounding += other.rounding
        self.size += other.size

    @property
    def share(self) -> float:
        """The share of the update that the weights contain."""
        return 1 + self.product / self.update if self.update else 1.0

    @property
    def error(self) -> float:
        """The standard error of the share."""
        if not self.update:
            return 0.0
        rest = max(0.0, self.rounding - self.product**2 / self.update)
        return math.sqrt(rest / self.size / self.update)


def with_roundings(
    quantized: Mapping[str, QuantizedWeight], base: Weights, merged: Weights
) -> tuple[dict[str, QuantizedWeight], tuple[str, ...]]:
    """Return the quantized weights, with E where it is only rounding, and the problems of others.

    `base` and `merged` return a module's weight [out, in] without and with the adapter.
    """
    found: dict[str, QuantizedWeight] = {}
    total, problems = _Along(), []
    for name, weight in quantized.items():
        own, merged_weight = base(name), merged(name)
        found[name] = weight
        if own is None or merged_weight is None:
            continue
        along = _Along()
        problem = _problem(weight, own, merged_weight, along)
        total.add(along)
        if problem is None:
            found[name] = dataclasses.replace(weight, rounding=weight.values - merged_weight)
        else:
            problems.append(f"the quantized weight of {name} {problem}")
    if abs(total.share - 1) > _SHARE or _SURE * total.error > 2 * _SHARE:
        problems.insert(
            0, f"the quantized weights contain {total.share:.0%} of the adapter's update"
        )
        found = dict(quantized)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return found, ((f"{problems[0]}{more}",) if problems else ())


def _problem(
    weight: QuantizedWeight,
    own: NDArray[np.float32],
    merged_weight: NDArray[np.float32],
    along: _Along,
) -> str | None:
    """Return why E is more than rounding, or None; fills in `along` in any case."""
    if weight.values.shape != merged_weight.shape:
        return "has another shape than the base's"
    rounding = weight.values.astype(np.float64) - merged_weight
    update = merged_weight.astype(np.float64) - own
    along.product = float((rounding * update).sum())
    along.update, along.rounding = float((update**2).sum()), float((rounding**2).sum())
    along.size = rounding.size
    # An update within float32's rounding error counts as zero.
    if along.update <= (np.finfo(np.float32).eps ** 2) * float((own.astype(np.float64) ** 2).sum()):
        along.product = along.update = 0.0
    off = np.sqrt((rounding**2).sum(axis=1))
    most = _most(weight, merged_weight)
    if (off > most).any():
        row = int((off / most).argmax())
        times = off[row] / most[row]
        return f"is not the merged one: the error of row {row} is {times:.3g} × that of rounding"
    if abs(along.share - 1) > _SHARE + _SURE * along.error:
        return f"contains {along.share:.0%} of the adapter's update"
    return None


def _most(weight: QuantizedWeight, merged_weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the largest ‖E‖ of each row [out] that two roundings can cause."""
    out, into = merged_weight.shape
    blocks = np.pad(np.abs(merged_weight), ((0, 0), (0, -into % weight.block)))
    largest = blocks.reshape(out, -1, weight.block).max(axis=2).astype(np.float64)
    step = 2 * largest / (2**weight.bits - 1)
    row = np.sqrt(2 * (step**2).sum(axis=1) * min(weight.block, into) / 12)
    usual = np.sqrt((row**2).mean())
    most: NDArray[np.float64] = _ROOM * np.maximum(row, _SMALL_ROW * usual)
    return most
