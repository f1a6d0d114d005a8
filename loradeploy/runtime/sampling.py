"""How the next token is chosen from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loradeploy.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """Greedy at `temperature` 0; else sampled from the `top_k` tokens and the `top_p` mass.

    `top_k` 0 and `top_p` 1 keep all tokens.

    Raises:
        UsageError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}: give 0 (greedy) or more")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}: give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}: give more than 0 and at most 1")

    def choose(self, logits: NDArray[np.floating], random: np.random.Generator) -> int:
        """The next token, by logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        weights = np.exp(scaled[order] - scaled[order[0]])
        weights /= weights.sum()
        if self.top_p < 1:
            # The smallest set of tokens whose mass reaches top_p; the first always stays.
            kept = int(np.searchsorted(np.cumsum(weights), self.top_p)) + 1
            order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
        return int(order[np.searchsorted(np.cumsum(weights), random.random(), side="right")])
