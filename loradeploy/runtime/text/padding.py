"""Pad token ids to a batch, and compute positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def pad(
    sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool, length: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and attention mask, both int64 [batch, longest], padded on one side.

    With `length`, no row may be longer, and all are padded to it.
    """
    longest = max(len(sequence) for sequence in sequences) if length is None else length
    ids = np.full((len(sequences), longest), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        columns = slice(longest - len(sequence), None) if left else slice(0, len(sequence))
        ids[row, columns] = sequence
        mask[row, columns] = 1
    return ids, mask


def positions_of(mask: NDArray[np.int64], new: int) -> NDArray[np.int64]:
    """Position of each new token in its row, int64 [batch, new], by the mask [batch, all tokens].

    Padding on the left is not counted; the first real token is at 0.
    """
    positions: NDArray[np.int64] = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -new:]
    return positions
