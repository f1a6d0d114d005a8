"""Tokens of a batch and text that comes piece by piece; the tokenizer itself is the bundle's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from loradeploy.bundle.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PieceDecoder", "Tokenizer", "pad", "positions_of"]


class PieceDecoder:
    """Text from tokens that arrive one by one; the pieces together are the whole text.

    What a token adds can depend on the one before (a leading space) and may be half a character.
    So the last tokens are decoded twice, without and with the new one, and the difference is held
    back while it ends in the replacement character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # decoding begins at this token
        self._told = 0  # the text of the tokens before this one was given out

    def push(self, token: int) -> str:
        """The text that is complete with `token`, perhaps none."""
        self._ids.append(token)
        return self._advance(hold=True)

    def close(self) -> str:
        """The text that was held back."""
        return self._advance(hold=False)

    def _advance(self, *, hold: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._told])
        now = self._tokenizer.decode(self._ids[self._start :])
        if len(now) <= len(before) or (hold and now.endswith("\ufffd")):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return now[len(before) :]


def pad(
    sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and attention mask, both int64 [batch, longest], padded on one side."""
    longest = max(len(sequence) for sequence in sequences)
    ids = np.full((len(sequences), longest), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if left else slice(0, len(sequence))
        ids[row, place] = sequence
        mask[row, place] = 1
    return ids, mask


def positions_of(mask: NDArray[np.int64], new: int) -> NDArray[np.int64]:
    """Each new token's place in its row, int64 [batch, new], by the mask [batch, all tokens].

    Padding on the left has no position of its own; the first real token is at 0.
    """
    positions: NDArray[np.int64] = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -new:]
    return positions
