"""Groups rows into batches: by length, by number of steps, and of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loradeploy.parity.phases.rows import Row

# The largest number of rows in a batch, and the largest size of one output of a batch.
MAX_ROWS: Final = 16
_MAX_OUTPUT: Final = 1 << 26  # values


def of_one_length(rows: Sequence[Row]) -> list[list[Row]]:
    """Group `rows` by the length of their prompts."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(len(row.prompt), []).append(row)
    return list(groups.values())


def batch_size(longest: int, width: int, most: int = MAX_ROWS) -> int:
    """Return the batch size for rows of `longest` tokens with `width` output values for each."""
    return min(most, max(2, min(MAX_ROWS, _MAX_OUTPUT // (longest * width))))


def batches(rows: Sequence[Row], *, most: int) -> Iterator[Sequence[Row]]:
    """Yield `rows` in batches, in order; the rows of a batch have equally many forced tokens."""
    for _, group in groupby(rows, lambda row: (row.edge, len(row.forced))):
        alike = list(group)
        longest = max(len(row.prompt) for row in alike)
        count = batch_size(longest, alike[0].expected.shape[-1], most)
        starts = list(range(0, len(alike), count))
        # A single last row joins the batch before: alone it would not test batching.
        if most > 1 and len(starts) > 1 and len(alike) - starts[-1] == 1:
            starts.pop()
        for start, stop in zip(starts, [*starts[1:], len(alike)], strict=True):
            yield alike[start:stop]


def evenly(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Yield `rows` in order, in the fewest batches of bounded size that have at least two rows."""
    longest = max(len(row.prompt) for row in rows)
    count = batch_size(longest, rows[0].expected.shape[-1])
    turns = max(1, min(-(-len(rows) // count), len(rows) // 2))
    edges = [len(rows) * turn // turns for turn in range(turns + 1)]
    for start, stop in pairwise(edges):
        yield rows[start:stop]
