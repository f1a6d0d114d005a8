"""Three-dimensional positions (M-RoPE) of a prompt's tokens: time, row and column.

    text         t, t + 1, …                       equal in all three dimensions
    an image     (t, t + row, t + column)          for its rows × columns tokens, row by row
    after it     t + max(rows, columns), …         fewer positions than its tokens: a shift

Same as transformers' `get_rope_index` (Qwen2-VL, https://arxiv.org/abs/2409.12191, 2.1).
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
    """Positions int64 [3, tokens], with images of `grids` at `places` bool [tokens]."""
    steps = np.ones(len(places), np.int64)  # to the next token's position
    inside = np.zeros((3, len(places)), np.int64)  # relative to the image's first token
    for start, (rows, columns) in _placed(places, grids):
        own = slice(start, start + rows * columns)
        steps[own] = 0
        steps[own.stop - 1] = max(rows, columns)
        inside[1:, own] = np.indices((rows, columns)).reshape(2, -1)
    starts = np.concatenate([[0], steps.cumsum()[:-1]]) if len(steps) else steps
    positions: NDArray[np.int64] = starts + inside
    return positions


def shift_of(grids: Sequence[Grid]) -> int:
    """The position of a token after images of `grids`, minus the number of tokens before it."""
    return sum(max(rows, columns) - rows * columns for rows, columns in grids)


def check_grids(places: NDArray[np.bool_], grids: Sequence[Grid] | None, what: str) -> None:
    """Raise UsageError unless the tokens of each image of `grids` are consecutive.

    `places` bool [tokens]: where a prompt has the token of an image. `what`: the prompt's name in
    messages.
    """
    if grids is None:
        raise UsageError(
            f"the embeddings of {what} have no `grids`, the rows and columns of each image,"
            " which this model needs to compute positions"
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
    """The first token and the grid of each image."""
    tokens = np.flatnonzero(places)
    counts = [0, *np.cumsum([rows * columns for rows, columns in grids])[:-1]]
    return [(int(tokens[count]), grid) for count, grid in zip(counts, grids, strict=False)]
