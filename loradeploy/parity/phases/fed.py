"""Rows in which an image-text decoder is fed embeddings in place of some tokens.

The places and the embeddings are random, seeded by the row's tokens, and of the magnitude of the
model's embeddings. The reference feeds them to PyTorch as `inputs_embeds`. A decoder with
three-dimensional positions (M-RoPE) is fed random ones, which PyTorch gets as `position_ids`.
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

# Number of rows that are fed with embeddings.
FED_ROWS: Final = 6


@dataclass(frozen=True, eq=False)
class Fed:
    """The embeddings of a row: `values` [tokens, hidden], used where `places` [tokens] is true.

    `expected`: the reference's outputs for them, [tokens, width].
    `blocks`: whether the positions of an image attend to each other, if the model does that.
    `positions`: [3, tokens], if the decoder has three-dimensional positions.
    """

    values: Floats
    places: NDArray[np.bool_]
    expected: Floats
    blocks: bool = True
    positions: NDArray[np.int64] | None = None

    def shifted(self) -> Fed:
        """Return a copy with each place one token further."""
        return replace(self, values=np.roll(self.values, 1, 0), places=np.roll(self.places, 1))

    def exchanged(self) -> Fed:
        """Return a copy in which the places have each other's embeddings."""
        values = self.values.copy()
        values[self.places] = np.roll(values[self.places], 1, 0)
        return replace(self, values=values)

    def causal(self) -> Fed:
        """Return a copy with causal attention in images too."""
        return replace(self, blocks=False)

    def flat(self) -> Fed:
        """Return a copy with the positions of plain text."""
        assert self.positions is not None
        text = np.arange(self.positions.shape[1], dtype=np.int64)
        return replace(self, positions=np.broadcast_to(text, self.positions.shape))

    def turned(self) -> Fed:
        """Return a copy with the positions' rows and columns exchanged."""
        assert self.positions is not None
        return replace(self, positions=self.positions[[0, 2, 1]])


def drawn(tokens: Sequence[int], hidden: int, size: float, *, mrope: bool) -> Fed:
    """Return random places and embeddings for a row of `tokens`.

    The embeddings have the standard deviation `size`, and are exact in float16. `mrope`: add
    three-dimensional positions.
    """
    random = np.random.default_rng(list(tokens))
    places = random.random(len(tokens)) < 0.5
    places[len(tokens) // 2] = True
    values = random.standard_normal((len(tokens), hidden)) * size * places[:, np.newaxis]
    positions = random.integers(0, len(tokens), (3, len(tokens))) if mrope else None
    numbers = values.astype(np.float16).astype(np.float32)
    return Fed(numbers, places, np.zeros((0, 0), np.float32), positions=positions)


def embeds_feeds(fed: Sequence[Fed], mask: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
    """Return the feeds of a batch; `mask` [rows, tokens] is 1 at the tokens of each row."""
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
