"""The rows that the phases feed, and what they see of them."""

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
    """One prompt with one adapter, and what the reference gives for it.

    `forced`: the tokens that the reference generated. `expected`: [positions, width]; positions
    are those of the prompt and of the forced tokens but the last, or one of a classifier.
    `edge`: it is of an extreme length, and shares batches with its like alone.
    `outputs`: how many of the graph's outputs are its adapter's, the first ones; None of all. The
    others are constants so large that they would hide what the adapter does.
    `target`: how many tokens of an encoder-decoder's target are decoded one by one on its cache.
    `about`: what is known of `expected`, which every backend is compared with.
    `fed`: embeddings in the places of some tokens of the prompt, of a decoder that takes them.
    `encoded`: the keys and values of the source, [source, width], of an encoder-decoder.
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
        """All that is fed, in one row."""
        return self.prompt + self.forced[:-1]

    def reading(self, fed: Fed) -> Row:
        """The prompt alone with `fed` in its tokens' places, and what the reference gives then."""
        return replace(self, forced=(), expected=fed.expected, about=None, fed=fed)

    @property
    def first_step(self) -> int | None:
        """The position that chooses the first generated token."""
        return len(self.prompt) - 1 if self.forced else None

    def due(self, phase: str) -> int:
        """How many positions the phase shows of this row."""
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
    """Consecutive positions of a row as a backend sees them: `values` [positions, width].

    `before`: what the backend gave the first time, where it is that and not the reference that the
    values are compared with.
    """

    phase: str
    row: Row
    first: int
    values: NDArray[Any]
    before: NDArray[Any] | None = None

    @property
    def expected(self) -> NDArray[Any]:
        """What the values should be, of the same shape."""
        if self.before is not None:
            return self.before
        return self.row.expected[self.first : self.first + len(self.values)]

    @property
    def about(self) -> Expected | None:
        """What is known of the expected values."""
        known = None if self.before is not None else self.row.about
        return None if known is None else known[self.first : self.first + len(self.values)]
