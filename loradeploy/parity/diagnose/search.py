"""Finds the first module whose output diverges from PyTorch's, on one row of tokens.

Values inside both sides are compared a few at a time: first the blocks and the modules outside of
them, then those between the last that agrees and the first that does not. The error that rounding
may cause in a value is measured on the same tokens: PyTorch's modules are perturbed by the unit
roundoff of the precision (`torch_probe.rounded`), or their activations are rounded as in quantized
products (rounding.py), and the change of each value is its rounding error at this depth. An error
divided by this rounding error is called its excess. A module diverges if

    excess > limit                                   more than observed rounding (`ROUNDINGS`)
    excess > GROWTH · largest excess of its inputs   the error is not inherited
    a value computed from it exceeds the limit too   the error has consequences

The first two distinguish a jump from accumulated rounding. The last excludes values of the graph
that were matched to a module by mistake.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.parity.report.results import Heatmap, Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.parity.diagnose.torch_probe import Site

    Array = NDArray[np.float32]

GROWTH: Final = 4.0
# The largest size of one side's values that are in memory at a time.
HELD: Final = 1 << 26  # bytes
_OFFENDERS: Final = 5
_LAYER: Final = re.compile(r"(?:.*?\.)??(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Rounding:
    """The unit roundoff of a precision, and the largest excess that may be rounding.

    `limit` is at least twice `seen`, the largest excess observed in correct models: in 423 values
    inside SmolLM2-135M on rows of 10 to 25 tokens, with and without an adapter, and in three tiny
    models.
    """

    unit: float
    limit: float
    seen: float


ROUNDINGS: Final[Mapping[str, Rounding]] = {
    # Long sums in another order. On a single token an excess of 10 was observed: few values are a
    # poor measure of rounding.
    "fp32": Rounding(2.0**-24, limit=12.0, seen=4.0),
    "fp16": Rounding(2.0**-11, limit=6.0, seen=1.8),
    "bf16": Rounding(2.0**-8, limit=6.0, seen=1.8),  # not measured: as fp16
    # Quantized products compute in float32; PyTorch rounds activations as they do.
    "int8": Rounding(2.0**-24, limit=6.0, seen=1.9),
    "int4": Rounding(2.0**-24, limit=6.0, seen=2.6),
}


@dataclass(frozen=True, eq=False)
class Point:
    """A value that both sides have; see `report.Step`."""

    site: Site
    module: str
    node: str
    op: str

    @property
    def layer(self) -> int | None:
        """The number of its block; None outside of all blocks."""
        found = _block(self.module)
        return None if found is None else int(found.rpartition(".")[2])

    @property
    def block(self) -> str | None:
        """The block whose output it is, or its module outside of all blocks; these come first."""
        given = self.site.given_by
        blocks = [name for name in given if _block(name) == name]
        if blocks:
            return blocks[-1]
        within = any(_block(name) is not None for name in given or self.site.taken_by)
        return None if within else self.module


# Returns the values at the numbered points, in the sites' shapes; None if the size differs.
Values = Callable[[Sequence[int]], Sequence["Array | None"]]


@dataclass(frozen=True, eq=False)
class Sides:
    """The compared sides: `points` in order of execution, and the values of each side there.

    `disturbed`: the reference's values with several random perturbations of the size of `rounding`.
    `upstream`: for each point, a bit set of the points it is computed from; None if unknown, and
    each point is taken to be computed from the previous one.
    """

    points: Sequence[Point]
    reference: Values
    disturbed: Sequence[Values]
    backend: Values
    rounding: Rounding
    upstream: Sequence[int] | None


@dataclass(frozen=True, eq=False)
class Found:
    """The result of `search`; see `report.Localization`.

    `lost`: modules that turned out to have no counterpart. `largest`: the largest excess.
    """

    steps: tuple[Step, ...]
    first: Step | None
    before: Step | None
    offenders: tuple[Step, ...]
    heatmap: Heatmap | None
    lost: tuple[str, ...]
    largest: float


@dataclass(frozen=True, eq=False)
class _Seen:
    """An examined point. `shares`: the relative error of each position; empty without positions."""

    step: Step
    shares: tuple[float, ...]
    excess: float


def search(sides: Sides, *, tokens: int) -> Found:
    """Find the first point that diverges. `tokens`: the length of the row."""
    search = _Search(sides, tokens)
    coarse = [n for n, point in enumerate(sides.points) if point.block is not None]
    search.at(coarse)
    first = search.first()
    if first is not None:
        agreeing = (n for n in coarse if n < first and n in search.seen)
        search.at(range(max(agreeing, default=-1) + 1, first))
        closer = search.first()
        first = first if closer is None else closer
    elif not coarse or max(coarse) < len(sides.points) - 1:
        search.at(range(max(coarse, default=-1) + 1, len(sides.points)))
        first = search.first()
    return search.found(first)


@dataclass(frozen=True, eq=False)
class Differences:
    """The largest `error` at each position, the `scale` of its values, and `share`: their ratio."""

    error: Array
    scale: Array
    share: Array


def measure(expected: Array, actual: Array, *, positions: bool) -> Differences:
    """Measure the error of values [1, positions, …]; the arrays returned are [positions].

    If `positions` is false, all values count as one position. A position that is all zeros has the
    scale of the whole tensor.
    """
    rows = expected.shape[1] if positions else 1
    one, other = expected.reshape(rows, -1), actual.reshape(rows, -1)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(one.astype(np.float64) - other).max(axis=1)
        scale = np.abs(one).max(axis=1).astype(np.float64)
        whole = float(np.nanmax(scale, initial=0.0)) or 1.0
        scale = np.where(scale == 0, whole, scale)
        return Differences(error, scale, error / scale)


def groups(sizes: Iterable[tuple[int, int]], limit: int) -> Iterator[list[int]]:
    """Group numbers so that the sizes of a group sum to at most `limit`; a larger one is alone."""
    group: list[int] = []
    total = 0
    for number, size in sizes:
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(number)
        total += size
    if group:
        yield group


class _Search:
    """The search, with the points that were examined so far, by number."""

    def __init__(self, sides: Sides, tokens: int) -> None:
        self._sides = sides
        self._tokens = tokens
        self._limit = sides.rounding.limit
        self._lost: set[int] = set()
        self.seen: dict[int, _Seen] = {}

    def at(self, numbers: Iterable[int]) -> None:
        """Examine those of the points that were not examined yet, a group at a time."""
        points = self._sides.points
        new = (n for n in numbers if n not in self.seen and n not in self._lost)
        sizes = ((n, 4 * math.prod(points[n].site.shape)) for n in new)
        for group in groups(sizes, HELD):
            expected = self._sides.reference(group)
            rounding = [self._sides.rounding.unit] * len(group)
            for draw in self._sides.disturbed:
                moved = self._shares(group, expected, draw(group))
                rounding = [max(pair) for pair in zip(rounding, moved, strict=True)]
            actual = self._sides.backend(group)
            for number, one, other, by in zip(group, expected, actual, rounding, strict=True):
                if one is None or other is None:
                    self._lost.add(number)
                else:
                    self.seen[number] = self._compare(points[number], one, other, by)

    def first(self) -> int | None:
        """Return the first examined point that diverges."""
        return next((n for n in sorted(self.seen) if self._diverges(n)), None)

    def found(self, first: int | None) -> Found:
        """Return the result, with `first` as the first point that diverges."""
        seen = dict(sorted(self.seen.items()))
        agreeing = [
            n for n, each in seen.items() if each.excess <= self._limit and n < (first or 0)
        ]
        strays = [n for n in seen if self._is_stray(n)]
        for n in strays:
            self._lost.add(n)
            del seen[n]
        growth = {n: self._growth(n) for n, each in seen.items() if each.excess > self._limit}
        least = 1.0 if first is None else GROWTH
        worst = sorted((n for n in growth if growth[n] > least), key=lambda n: (-growth[n], n))
        return Found(
            steps=tuple(each.step for each in seen.values()),
            first=None if first is None else seen[first].step,
            before=seen[agreeing[-1]].step if agreeing else None,
            offenders=tuple(seen[n].step for n in worst[:_OFFENDERS]),
            heatmap=self._heatmap(seen),
            lost=tuple(self._sides.points[n].module for n in sorted(self._lost)),
            largest=max((each.excess for each in seen.values()), default=0.0),
        )

    def _shares(
        self, group: Sequence[int], expected: Sequence[Array | None], moved: Sequence[Array | None]
    ) -> list[float]:
        """Return the largest relative change of each point; 0 if it is unknown."""
        return [
            0.0
            if one is None or other is None
            else float(np.nanmax(self._measure(self._sides.points[n], one, other).share, initial=0))
            for n, one, other in zip(group, expected, moved, strict=True)
        ]

    def _measure(self, point: Point, one: Array, other: Array) -> Differences:
        return measure(one, other, positions=self._has_positions(point))

    def _has_positions(self, point: Point) -> bool:
        shape = point.site.shape
        return len(shape) > 2 and shape[1] == self._tokens

    def _compare(self, point: Point, expected: Array, actual: Array, rounding: float) -> _Seen:
        found = self._measure(point, expected, actual)
        # argmax treats NaN as the largest value.
        worst = int(np.argmax(found.share))
        share = float(found.share[worst])
        step = Step(
            module=point.module,
            layer=point.layer,
            node=point.node,
            op=point.op,
            error=float(found.error[worst]),
            scale=float(found.scale[worst]),
            share=share,
        )
        excess = share / rounding if math.isfinite(share) else math.inf
        finite = np.where(np.isfinite(found.share), found.share, np.nan)
        return _Seen(step, tuple(finite.tolist()) if self._has_positions(point) else (), excess)

    def _diverges(self, number: int) -> bool:
        leaps = self.seen[number].excess > self._limit and self._growth(number) > GROWTH
        return leaps and not self._is_stray(number)

    def _is_stray(self, number: int) -> bool:
        """Whether the point exceeds the limit but nothing that is computed from it does."""
        if self._sides.upstream is None or self.seen[number].excess <= self._limit:
            return False
        after = [n for n in self.seen if number in self._inputs(n)]
        return bool(after) and all(self.seen[n].excess <= self._limit for n in after)

    def _growth(self, number: int) -> float:
        """Return the ratio of the point's excess to its inputs' largest (taken as 1 at least)."""
        before = max((self.seen[n].excess for n in self._inputs(number)), default=1.0)
        if math.isinf(before):
            return 1.0
        return self.seen[number].excess / max(before, 1.0)

    def _inputs(self, number: int) -> list[int]:
        """Return the nearest examined points that the point `number` is computed from."""
        if self._sides.upstream is None:
            return sorted(n for n in self.seen if n < number)[-1:]
        upstream = self._sides.upstream
        above = [n for n in self.seen if upstream[number] >> n & 1]
        covered = 0
        for n in above:
            covered |= upstream[n]
        return [n for n in above if not covered >> n & 1]

    def _heatmap(self, seen: Mapping[int, _Seen]) -> Heatmap | None:
        rows = {
            block: each.shares
            for n, each in seen.items()
            if (block := self._sides.points[n].block) is not None and each.shares
        }
        if not rows:
            return None
        return Heatmap(tuple(rows), tuple(range(self._tokens)), tuple(rows.values()))


def _block(module: str) -> str | None:
    """Return the block that contains or is `module`: its path up to the first number."""
    found = _LAYER.match(module)
    return None if found is None else found[0]
