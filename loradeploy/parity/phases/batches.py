"""Rows in batches: of one length, of so many steps, of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loradeploy.parity.phases.rows import Row

# Rows of one batch, and the size of one output that a batch may have.
MAX_ROWS: Final = 16
_MAX_OUTPUT: Final = 1 << 26  # values


def of_one_length(rows: Sequence[Row]) -> list[list[Row]]:
    """`rows` by the length of their prompts."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(len(row.prompt), []).append(row)
    return list(groups.values())


def batch_size(longest: int, width: int, most: int = MAX_ROWS) -> int:
    """How many rows of `longest` tokens with `width` values for each make one batch."""
    return min(most, max(2, min(MAX_ROWS, _MAX_OUTPUT // (longest * width))))


def batches(rows: Sequence[Row], *, most: int) -> Iterator[Sequence[Row]]:
    """`rows` in their order; those of one batch are followed for as many steps."""
    for _, group in groupby(rows, lambda row: (row.edge, len(row.forced))):
        alike = list(group)
        longest = max(len(row.prompt) for row in alike)
        count = batch_size(longest, alike[0].expected.shape[-1], most)
        starts = list(range(0, len(alike), count))
        # No batch of one row at the end: it would be no batch.
        if most > 1 and len(starts) > 1 and len(alike) - starts[-1] == 1:
            starts.pop()
        for start, stop in zip(starts, [*starts[1:], len(alike)], strict=True):
            yield alike[start:stop]


def evenly(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """`rows` in their order, in as few batches of bounded size as can be, none of them of one."""
    longest = max(len(row.prompt) for row in rows)
    count = batch_size(longest, rows[0].expected.shape[-1])
    turns = max(1, min(-(-len(rows) // count), len(rows) // 2))
    edges = [len(rows) * turn // turns for turn in range(turns + 1)]
    for start, stop in pairwise(edges):
        yield rows[start:stop]
