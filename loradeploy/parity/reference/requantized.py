"""The reference for a graph whose weights were dequantized, merged into and quantized again.

How the base was quantized before the merge is not in the graph any more: the merge in PyTorch,
rounded once, is another model: by the rounding that came first. What both roundings did, together,
is in the graph: with V its weight, W the base's and Δ the adapter's update

    E = V − (W + Δ)

and the reference is W + Δ + E, but only where E is rounding and nothing else:

    as small      no row of E is larger than two roundings in blocks of these bits leave
    as aimless    E has no part along Δ: 1 + ⟨E, Δ⟩ / ‖Δ‖² is the share of the adapter that is there

A weight that was not the base's fails the first, an adapter that is missing, doubled, or another
fails the second; the reference is then the merge, rounded as an export rounds, and shows it.
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

# A rounding is off by 1 / √12 of a step on average, two by √2 of that. Quantizers that look at
# activations (GPTQ) leave more than the nearest step would.
_ROOM: Final = 3.0
# The share of the adapter that may be missing or too much; rounding to few bits swallows some.
_SHARE: Final = 0.25
# Standard errors of a share that is estimated from numbers that were rounded.
_SURE: Final = 6.0
# Rows smaller than this share of the usual one are taken for as large.
_SMALL_ROW: Final = 0.1

Weights = Callable[[str], "NDArray[np.float32] | None"]


@dataclass
class _Along:
    """How much of E lies along Δ: sums over one weight, or over all."""

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
        """The share of the update that is there."""
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
    """The quantized weights with E where it is rounding alone, and why it is not of the others.

    `base` and `merged` give a module's weight [out, in] without and with the adapter.
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
        problems.insert(0, f"the quantized weights hold {total.share:.0%} of the adapter's update")
        found = dict(quantized)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return found, ((f"{problems[0]}{more}",) if problems else ())


def _problem(
    weight: QuantizedWeight,
    own: NDArray[np.float32],
    merged_weight: NDArray[np.float32],
    along: _Along,
) -> str | None:
    """Why E is more than rounding; adds to `along` in any case."""
    if weight.values.shape != merged_weight.shape:
        return "has another shape than the base's"
    rounding = weight.values.astype(np.float64) - merged_weight
    update = merged_weight.astype(np.float64) - own
    along.product = float((rounding * update).sum())
    along.update, along.rounding = float((update**2).sum()), float((rounding**2).sum())
    along.size = rounding.size
    # In float32 an update that is nothing but the order of a sum is none.
    if along.update <= (np.finfo(np.float32).eps ** 2) * float((own.astype(np.float64) ** 2).sum()):
        along.product = along.update = 0.0
    off = np.sqrt((rounding**2).sum(axis=1))
    most = _most(weight, merged_weight)
    if (off > most).any():
        row = int((off / most).argmax())
        times = off[row] / most[row]
        return f"is not the merged one: row {row} is off by {times:.3g} × what rounding may leave"
    if abs(along.share - 1) > _SHARE + _SURE * along.error:
        return f"contains {along.share:.0%} of the adapter's update"
    return None


def _most(weight: QuantizedWeight, merged_weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """‖E‖ of each row [out] that two roundings may leave."""
    out, into = merged_weight.shape
    blocks = np.pad(np.abs(merged_weight), ((0, 0), (0, -into % weight.block)))
    largest = blocks.reshape(out, -1, weight.block).max(axis=2).astype(np.float64)
    step = 2 * largest / (2**weight.bits - 1)
    row = np.sqrt(2 * (step**2).sum(axis=1) * min(weight.block, into) / 12)
    usual = np.sqrt((row**2).mean())
    most: NDArray[np.float64] = _ROOM * np.maximum(row, _SMALL_ROW * usual)
    return most
