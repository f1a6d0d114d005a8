"""The rows that the phases feed, and the observed outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loradeploy.parity.names import DECODE, EMBEDDED, ENCODER, PADDED_BATCH, PERMUTED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loradeploy.parity.figures.expected import Expected
    from loradeploy.parity.phases.fed import Fed


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt with one adapter, and the reference's outputs for it.

    `forced`: the tokens that the reference generated. `expected`: [positions, width], with a
    position for each token of the prompt and each forced token but the last; a classifier has one
    position. `edge`: whether the row is of an extreme length; such rows share no batch with others.
    `outputs`: how many of the graph's outputs, the first ones, are the adapter's; None: all. The
    rest are constants so large that they would hide the adapter's effect.
    `target`: number of target tokens that an encoder-decoder decodes one by one, with its cache.
    `about`: precomputed facts of `expected`, reused for every backend.
    `fed`: embeddings in place of some tokens of the prompt, for a decoder that takes embeddings.
    `encoded`: the source's keys and values of an encoder-decoder, [source, width].
    """

    case: int
    adapter: str | None
    prompt: tuple[int, ...]
    forced: tuple[int, ...]
    expected: NDArray[np.float32]
    edge: bool = False
    outputs: int | None = None
    target: int = 0
    about: Expected | None = None
    fed: Fed | None = None
    encoded: NDArray[np.float32] | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that are fed: the prompt and the forced tokens but the last."""
        return self.prompt + self.forced[:-1]

    def reading(self, fed: Fed) -> Row:
        """Return the row with the prompt alone, fed the embeddings `fed`."""
        return replace(self, forced=(), expected=fed.expected, about=None, fed=fed)

    @property
    def first_step(self) -> int | None:
        """The position whose logits choose the first generated token; None if there is none."""
        return len(self.prompt) - 1 if self.forced else None

    def due(self, phase: str) -> int:
        """Return how many positions of this row the phase observes."""
        if phase == EMBEDDED:
            return 0 if self.fed is None else len(self.prompt)
        if phase == ENCODER:
            return 0 if self.encoded is None else len(self.encoded)
        if phase == DECODE and self.target:
            return self.target
        if phase == DECODE:
            return max(0, len(self.forced) - 1)
        batched = phase in (PADDED_BATCH, PERMUTED) and self.forced
        return len(self.prompt) if batched else len(self.expected)


@dataclass(frozen=True, eq=False)
class Observation:
    """A backend's outputs at consecutive positions of a row: `values` [positions, width].

    `before`: the backend's outputs of its first run, if the values are to be compared with these
    and not with the reference.
    """

    phase: str
    row: Row
    first: int
    values: NDArray[Any]
    before: NDArray[Any] | None = None

    @property
    def expected(self) -> NDArray[Any]:
        """The expected values, of the same shape."""
        if self.before is not None:
            return self.before
        return self.row.expected[self.first : self.first + len(self.values)]

    @property
    def about(self) -> Expected | None:
        """The precomputed facts of the expected values, if there are any."""
        known = None if self.before is not None else self.row.about
        return None if known is None else known[self.first : self.first + len(self.values)]
