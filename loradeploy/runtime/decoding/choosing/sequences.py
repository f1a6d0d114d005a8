"""The sequences of one prompt in a batch, as a decoding loop sees them.

A prompt's sequences start as one row, the prompt, and become as many rows as needed: samples are
independent, beams are dropped and duplicated. After each step they return the rows to continue,
each with its next token. The loop moves the cache accordingly, and knows nothing else of them.
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
    """A row of the next step: the row of the last step that it continues, among its prompt's rows,
    and its next token.
    """

    parent: int
    token: int


@dataclass(frozen=True)
class Finished:
    """An ended sequence.

    `ids`: without the end token. `stop_reason`: the end token, or the stop string. `score`: of a
    beam.
    """

    ids: tuple[int, ...]
    text: str
    reason: FinishReason
    stop_reason: int | str | None
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None


class Sequences(Protocol):
    """The sequences of one prompt. `limit`: maximum number of new tokens of each."""

    prompt: list[int]
    limit: int

    def advance(self, logits: NDArray[Any]) -> list[Row]:
        """Choose tokens by logits [rows, vocabulary]; return the rows to continue."""

    def tokens(self) -> list[Sequence[int]]:
        """The generated tokens of each running row."""

    def made(self, choice: int) -> tuple[Sequence[int], Sequence[TokenLogprob] | None]:
        """The final tokens of a sequence so far, and their log-probabilities if requested."""

    def pieces(self) -> list[tuple[int, str]]:
        """New final text since the last call, as pairs of a sequence's number and a piece."""

    def cancel(self, choice: int) -> None:
        """End a sequence at the next step."""

    def ended(self) -> list[int]:
        """The numbers of the sequences that have ended."""

    def result(self, choice: int) -> Finished:
        """The result of an ended sequence."""
