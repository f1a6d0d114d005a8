"""Sampling: choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loradeploy.bundle.text.settings import GenerationSettings
from loradeploy.errors import UsageError, shown
from loradeploy.given_numbers import checked_count, checked_number

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """Greedy at `temperature` 0; otherwise samples from the `top_k` tokens and the `top_p` mass.

    Tokens with a probability below `min_p` times the highest one are excluded. `top_k` 0, `top_p` 1
    and `min_p` 0 keep all tokens.

    Raises:
        UsageError: a value out of range, or one that would have no effect.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (
            ("temperature", self.temperature),
            ("top_p", self.top_p),
            ("min_p", self.min_p),
        ):
            if checked_number(value) is None:
                raise UsageError(f"{name} is {shown(value)}: give a number")
        checked_count("top_k", self.top_k, 0)
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}: give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}: give more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p is {self.min_p}: give 0 (all tokens) to 1")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            raise UsageError(
                "top_k, top_p and min_p have no effect at temperature 0: give a temperature"
            )

    @classmethod
    def of(
        cls,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        own: GenerationSettings,
    ) -> Sampling:
        """The given settings; when sampling, missing ones are those of `own`."""
        if temperature > 0:
            top_k = own.top_k if top_k is None else top_k
            top_p = own.top_p if top_p is None else top_p
            min_p = own.min_p if min_p is None else min_p
        return cls(temperature, top_k or 0, 1.0 if top_p is None else top_p, min_p or 0.0)

    def choose(self, logits: NDArray[np.floating], random: np.random.Generator) -> int:
        """Choose the next token by logits [vocabulary], with at most one number of `random`.

        The cumulative weights are in token order, not sorted: logits that differ by rounding (in
        another batch, on another device) then give the same token for nearly every random number.
        """
        if self.temperature == 0:
            return int(logits.argmax())
        weights = np.exp((logits.astype(np.float64) - logits.max()) / self.temperature)
        if 0 < self.top_k < weights.size:
            weights[weights < np.partition(weights, -self.top_k)[-self.top_k]] = 0
        if self.top_p < 1:
            # The smallest set of tokens whose mass reaches top_p; the first always stays.
            order = np.argsort(-weights, kind="stable")
            mass = np.cumsum(weights[order])
            weights[order[np.searchsorted(mass, self.top_p * mass[-1]) + 1 :]] = 0
        if self.min_p:
            weights[weights < self.min_p] = 0  # the highest weight is 1
        mass = np.cumsum(weights)
        return int(np.searchsorted(mass, random.random() * mass[-1], side="right"))
