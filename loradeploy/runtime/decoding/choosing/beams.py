"""Beam search, as transformers defines it: the same candidates, penalties and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import UsageError
from loradeploy.runtime.decoding.choosing.logprobs import TokenLogprob, check_logits, log_softmax
from loradeploy.runtime.decoding.choosing.processors import Processors
from loradeploy.runtime.decoding.choosing.sequences import Finished, FinishReason, Row
from loradeploy.runtime.decoding.choosing.stopping import first_stop

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class _Beam:
    """A beginning of a text with the sum of its tokens' log-probabilities.

    `row`: the row of the last step that it goes on from. An ended one has a `reason`, and its
    `score` is divided by its length to the power of the length penalty; `length` counts the token
    that ended it.
    """

    ids: tuple[int, ...]
    score: float
    row: int = 0
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    length: int = 0


class BeamSearch:
    """The `n` best of `num_beams` beams of one prompt.

    A step's candidates are the best (1 + ends) · num_beams continuations, at least twice as many as
    beams; of these the num_beams best that have not ended go on, and those that ended are kept
    where they are among the num_beams best. `early_stopping`: True ends the search once there are
    num_beams ended ones; False once the best running beam would be worse at its length than the
    worst ended one; "never" once it would be at the largest length (with a length_penalty above 0).
    """

    def __init__(
        self,
        prompt: list[int],
        *,
        num_beams: int,
        n: int,
        limit: int,
        length_penalty: float,
        early_stopping: bool | Literal["never"],
        processors: Processors,
        tokenizer: Tokenizer,
        stops: Sequence[str],
    ) -> None:
        self.prompt = prompt
        self._num_beams = num_beams
        self._n = n
        self.limit = limit
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._process = processors
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._running = [_Beam((), 0.0)]
        self._ended: list[_Beam] = []
        self._improvable = True
        self._cancelled = False
        self._told = False

    def advance(self, logits: NDArray[Any]) -> list[Row]:
        """The beams that go on, by the logits [rows, vocabulary] of those that there are."""
        check_logits(logits, self._process.what)
        if self._cancelled:
            self._keep([self._end(beam, "cancelled", None) for beam in self._running])
            # A mask may have allowed fewer beginnings so far; every text of a prompt has an end.
            missing = self._n - len(self._ended)
            self._ended += [_Beam((), -np.inf, reason="cancelled")] * missing
            self._running = []
            return []
        candidates = [self._judged(beam) for beam in self._candidates(logits)]
        length = len(self._running[0].ids) + 1  # the token that ends a beam is none of its ids
        best = candidates[: self._num_beams]
        if self._improvable and not (self._full and self._early_stopping is True):
            self._keep([beam for beam in best if beam.reason is not None])
        going = [beam for beam in candidates if beam.reason is None][: self._num_beams]
        self._improvable = self._improvable and self._can_improve(going, length)
        if not self._improvable or (self._full and self._early_stopping is True):
            going = []
        if not going and len(self._ended) < self._n:
            raise UsageError(
                f"{self._process.what}: n is {self._n} texts, of which its"
                f" {'mask allows' if self._process.allowed_tokens else 'settings allow'}"
                f" {len(self._ended)}: give a smaller n"
            )
        # In the order of their rows: where no beam is doubled the cache stays as it is.
        self._running = sorted(going, key=lambda beam: beam.row)
        return [Row(beam.row, beam.ids[-1]) for beam in self._running]

    @property
    def _full(self) -> bool:
        return len(self._ended) == self._num_beams

    def _candidates(self, logits: NDArray[Any]) -> list[_Beam]:
        """The best continuations, the best first."""
        scores = np.stack(
            [
                self._process(log_softmax(values), self.prompt, beam.ids) + beam.score
                for values, beam in zip(logits, self._running, strict=True)
            ]
        )
        flat = scores.ravel()
        most = min(max(2, 1 + len(self._process.ends)) * self._num_beams, flat.size)
        best = np.argpartition(-flat, most - 1)[:most]
        best = best[np.argsort(-flat[best], kind="stable")]
        found = []
        for index in best[flat[best] > -np.inf]:
            row, token = divmod(int(index), scores.shape[1])
            ids = (*self._running[row].ids, token)
            found.append(_Beam(ids, float(flat[index]), row))
        return found

    def _judged(self, beam: _Beam) -> _Beam:
        """`beam`, ended where its last token ends it."""
        token = beam.ids[-1]
        if token in self._process.ends:
            return self._end(beam, "stop", token)
        if self._stops:
            found = first_stop(self._tokenizer.decode(beam.ids), self._stops)
            if found is not None:
                return self._end(beam, "stop", found[1])
        return self._end(beam, "length", None) if len(beam.ids) >= self.limit else beam

    def _end(self, beam: _Beam, reason: FinishReason, stop_reason: int | str | None) -> _Beam:
        length = len(beam.ids)
        score = beam.score / max(length, 1) ** self._length_penalty
        ids = beam.ids[:-1] if isinstance(stop_reason, int) else beam.ids
        return _Beam(ids, score, beam.row, reason, stop_reason, length)

    def _keep(self, ended: list[_Beam]) -> None:
        ranked = sorted([*self._ended, *ended], key=lambda beam: -beam.score)
        self._ended = ranked[: self._num_beams]

    def _can_improve(self, going: list[_Beam], length: int) -> bool:
        """Whether the best of the running beams may become better than the worst ended one."""
        if not going:
            return False
        if not self._full:
            return True
        longest = self._early_stopping == "never" and self._length_penalty > 0
        at = self.limit if longest else length
        best: float = going[0].score / at**self._length_penalty
        return best > self._ended[-1].score

    def tokens(self) -> list[Sequence[int]]:
        """What was generated in each beam that goes on."""
        return [beam.ids for beam in self._running]

    def made(self, choice: int) -> tuple[Sequence[int], Sequence[TokenLogprob] | None]:
        """The tokens of a text that has ended; before that none is final."""
        return (() if self._running else self._ended[choice].ids), None

    def pieces(self) -> list[tuple[int, str]]:
        """The texts, whole, once all have ended: before that none is final."""
        if self._running or self._told:
            return []
        self._told = True
        texts = [(rank, self.result(rank).text) for rank in self.ended()]
        return [(rank, text) for rank, text in texts if text]

    def cancel(self, choice: int) -> None:
        """Have the search end where it is, with the next step: its texts end together."""
        self._cancelled = True

    def ended(self) -> list[int]:
        """The ranks of the best texts, once the search has ended."""
        return [] if self._running else list(range(self._n))

    def result(self, choice: int) -> Finished:
        """The text of a rank."""
        beam = self._ended[choice]
        assert beam.reason is not None
        text = self._tokenizer.decode(beam.ids)
        if isinstance(beam.stop_reason, str):
            found = first_stop(text, (beam.stop_reason,))
            text = text if found is None else text[: found[0]]
        return Finished(
            ids=beam.ids,
            text=text,
            reason=beam.reason,
            stop_reason=beam.stop_reason,
            completion_tokens=beam.length,
            score=beam.score,
        )
