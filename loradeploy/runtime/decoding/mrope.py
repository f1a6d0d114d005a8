"""Positions in three dimensions of a prompt's tokens: time, row and column.

    text         t, t + 1, …                       the same in all three
    an image     (t, t + row, t + column)          of each of its rows × columns tokens, row by row
    behind it    t + max(rows, columns), …         which is less than its tokens: a shift

As transformers' `get_rope_index` counts them (Qwen2-VL, https://arxiv.org/abs/2409.12191, 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from loradeploy.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Grid = tuple[int, int]  # an image's rows and columns of tokens


def grid_positions(places: NDArray[np.bool_], grids: Sequence[Grid]) -> NDArray[np.int64]:
    """Positions int64 [3, tokens] where images of `grids` are read in `places` [tokens]."""
    steps = np.ones(len(places), np.int64)  # from one token's position to the next one's
    inside = np.zeros((3, len(places)), np.int64)  # from where an image begins
    for start, (rows, columns) in _placed(places, grids):
        own = slice(start, start + rows * columns)
        steps[own] = 0
        steps[own.stop - 1] = max(rows, columns)
        inside[1:, own] = np.indices((rows, columns)).reshape(2, -1)
    starts = np.concatenate([[0], steps.cumsum()[:-1]]) if len(steps) else steps
    positions: NDArray[np.int64] = starts + inside
    return positions


def shift_of(grids: Sequence[Grid]) -> int:
    """How far the position of a token behind images of `grids` is from how many are before it."""
    return sum(max(rows, columns) - rows * columns for rows, columns in grids)


def check_grids(places: NDArray[np.bool_], grids: Sequence[Grid] | None, what: str) -> None:
    """Raise UsageError unless each image of `grids` has its tokens one behind the other.

    `places` [tokens]: where a prompt, called `what`, has the token of an image.
    """
    if grids is None:
        raise UsageError(
            f"the embeddings of {what} have no `grids`, the rows and columns of each image, by"
            " which this model counts positions"
        )
    sizes, count = [rows * columns for rows, columns in grids], int(places.sum())
    if any(size < 1 for grid in grids for size in grid) or sum(sizes) != count:
        raise UsageError(
            f"{what} has {count} embeddings for images of {', '.join(map(_shown, grids)) or 'none'}"
        )
    for start, (rows, columns) in _placed(places, grids):
        if not places[start : start + rows * columns].all():
            raise UsageError(
                f"an image of {what} has other tokens between its {_shown((rows, columns))} tokens"
            )


def _shown(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"


def _placed(places: NDArray[np.bool_], grids: Sequence[Grid]) -> list[tuple[int, Grid]]:
    """Where each image begins."""
    tokens = np.flatnonzero(places)
    counts = [0, *np.cumsum([rows * columns for rows, columns in grids])[:-1]]
    return [(int(tokens[count]), grid) for count, grid in zip(counts, grids, strict=False)]
