"""Rows in which a decoder of images and text reads embeddings in the places of some tokens.

Which places, and what is read there, is drawn from a row's tokens, as large as the model's own
embeddings. What the reference gives for it is computed by PyTorch's own `inputs_embeds`. A decoder
that counts positions in three dimensions is fed random ones, as PyTorch's own `position_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.names import INPUTS_EMBEDS, INPUTS_EMBEDS_MASK, MROPE_POSITION_IDS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

# How many rows are shown with embeddings.
FED_ROWS: Final = 6


@dataclass(frozen=True, eq=False)
class Fed:
    """What a row reads: `values` [tokens, hidden] where `places` [tokens] is true.

    `expected`: what the reference gives then, [tokens, width].
    `blocks`: whether the places of an image attend to each other where the model has it so.
    `positions` [3, tokens]: where it counts them in three dimensions.
    """

    values: Floats
    places: NDArray[np.bool_]
    expected: Floats
    blocks: bool = True
    positions: NDArray[np.int64] | None = None

    def shifted(self) -> Fed:
        """The same with each place one token further."""
        return replace(self, values=np.roll(self.values, 1, 0), places=np.roll(self.places, 1))

    def exchanged(self) -> Fed:
        """The same places with each other's embeddings."""
        values = self.values.copy()
        values[self.places] = np.roll(values[self.places], 1, 0)
        return replace(self, values=values)

    def causal(self) -> Fed:
        """The same with each place attending to what is before it alone."""
        return replace(self, blocks=False)

    def flat(self) -> Fed:
        """The same with the positions of a text."""
        assert self.positions is not None
        text = np.arange(self.positions.shape[1], dtype=np.int64)
        return replace(self, positions=np.broadcast_to(text, self.positions.shape))

    def turned(self) -> Fed:
        """The same with rows and columns exchanged."""
        assert self.positions is not None
        return replace(self, positions=self.positions[[0, 2, 1]])


def drawn(tokens: Sequence[int], hidden: int, size: float, *, mrope: bool = False) -> Fed:
    """Places and embeddings of `size` for a row of `tokens`, of numbers that float16 holds too.

    `mrope`: with positions in three dimensions.
    """
    random = np.random.default_rng(list(tokens))
    places = random.random(len(tokens)) < 0.5
    places[len(tokens) // 2] = True
    values = random.standard_normal((len(tokens), hidden)) * size * places[:, np.newaxis]
    positions = random.integers(0, len(tokens), (3, len(tokens))) if mrope else None
    numbers = values.astype(np.float16).astype(np.float32)
    return Fed(numbers, places, np.zeros((0, 0), np.float32), positions=positions)


def embeds_feeds(fed: Sequence[Fed], mask: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
    """The feeds of a batch; `mask` [rows, tokens] has as many tokens of each row as it is fed."""
    places = np.zeros(mask.shape, np.bool_)
    values = np.zeros((*mask.shape, fed[0].values.shape[-1]), np.float32)
    for row, own in enumerate(fed):
        real = mask[row] == 1
        places[row, real], values[row, real] = own.places, own.values
    feeds: dict[str, NDArray[np.generic]] = {INPUTS_EMBEDS: values, INPUTS_EMBEDS_MASK: places}
    if fed[0].positions is not None:
        positions = np.zeros((3, *mask.shape), np.int64)
        for row, own in enumerate(fed):
            positions[:, row, mask[row] == 1] = own.positions
        feeds[MROPE_POSITION_IDS] = positions
    return feeds
