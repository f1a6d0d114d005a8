"""What a decoding loop goes on with: the sequences of one prompt, in rows of the batch.

A prompt's sequences begin as one row, the prompt, and become as many as they need: samples go
their own ways, beams are dropped and doubled. After each step they say which rows go on, and with
which token; the loop moves the cache accordingly and knows nothing else of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.decoding.choosing.logprobs import TokenLogprob

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Row:
    """A row that goes on: the row of the last step (counted in its prompt's) that it follows, and
    the token that it is fed."""

    parent: int
    token: int


@dataclass(frozen=True)
class Finished:
    """A sequence that has ended.

    `ids`: without the token that ended it. `stop_reason`: that token, or the stop string. `score`:
    of a beam.
    """

    ids: tuple[int, ...]
    text: str
    reason: FinishReason
    stop_reason: int | str | None
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None


class Sequences(Protocol):
    """The sequences of one prompt. `limit`: the most tokens that each of them gets."""

    prompt: list[int]
    limit: int

    def advance(self, logits: NDArray[Any]) -> list[Row]:
        """The rows that go on, by the logits [rows, vocabulary] of those that there are."""

    def tokens(self) -> list[Sequence[int]]:
        """What was generated in each row that goes on."""

    def made(self, choice: int) -> tuple[Sequence[int], Sequence[TokenLogprob] | None]:
        """The final tokens of a sequence so far, and their log-probabilities if asked for."""

    def pieces(self) -> list[tuple[int, str]]:
        """The text that became final since the last call, with the number of its sequence."""

    def cancel(self, choice: int) -> None:
        """Have a sequence end with the next step."""

    def ended(self) -> list[int]:
        """The numbers of the sequences that have ended."""

    def result(self, choice: int) -> Finished:
        """A sequence that has ended."""
