"""Beam search as in transformers: the same candidates, penalties and stopping rule."""

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
from loradeploy.runtime.decoding.choosing.stopping import Stops, first_stop

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class _Beam:
    """A partial or ended text with the sum of its tokens' log-probabilities.

    `row`: the row of the last step that it continues. An ended beam has a `reason`, and its `score`
    is divided by its length to the power of the length penalty; `length` includes the end token.
    """

    ids: tuple[int, ...]
    score: float
    row: int = 0
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    length: int = 0


class BeamSearch:
    """The `n` best of `num_beams` beams of one prompt.

    The candidates of a step are the best (1 + ends) · num_beams continuations, at least twice as
    many as beams. The num_beams best that have not ended continue; those that ended are kept if
    they are among the num_beams best. `early_stopping`: True ends the search when num_beams beams
    have ended; False, when the best running beam would be worse at its current length than the
    worst ended one; "never", when it would be at the maximum length (with a length_penalty above
    0).
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
        stops: Stops,
    ) -> None:
        self.prompt = prompt
        self._num_beams = num_beams
        self._n = n
        self.limit = limit
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._process = processors
        self._tokenizer = tokenizer
        self._stops = stops
        self._running = [_Beam((), 0.0)]
        self._ended: list[_Beam] = []
        self._improvable = True
        self._cancelled = False
        self._returned = False

    def advance(self, logits: NDArray[Any]) -> list[Row]:
        """Continue the running beams by logits [rows, vocabulary]; return the rows to continue."""
        check_logits(logits, self._process.what)
        if self._cancelled:
            self._keep([self._end(beam, "cancelled", None) for beam in self._running])
            # A mask may have allowed fewer beams so far, but every text must have a result.
            missing = self._n - len(self._ended)
            self._ended += [_Beam((), -np.inf, reason="cancelled")] * missing
            self._running = []
            return []
        candidates = [self._ended_if_complete(beam) for beam in self._candidates(logits)]
        length = len(self._running[0].ids) + 1  # includes the end token, which is not in `ids`
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
        # Ordered by row: if no beam is duplicated, the cache does not change.
        self._running = sorted(going, key=lambda beam: beam.row)
        return [Row(beam.row, beam.ids[-1]) for beam in self._running]

    @property
    def _full(self) -> bool:
        return len(self._ended) == self._num_beams

    def _candidates(self, logits: NDArray[Any]) -> list[_Beam]:
        """The best continuations, in descending order."""
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

    def _ended_if_complete(self, beam: _Beam) -> _Beam:
        """Return `beam`, ended if its last token ends it."""
        token = beam.ids[-1]
        if token in self._process.ends:
            return self._end(beam, "stop", token)
        if token in self._stops.tokens:
            return self._end(beam, "stop", self._stops.tokens[token])
        if self._stops.texts:
            found = first_stop(self._tokenizer.decode(beam.ids), self._stops.texts)
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
        """Whether the best running beam may become better than the worst ended one."""
        if not going:
            return False
        if not self._full:
            return True
        longest = self._early_stopping == "never" and self._length_penalty > 0
        at = self.limit if longest else length
        best: float = going[0].score / at**self._length_penalty
        return best > self._ended[-1].score

    def tokens(self) -> list[Sequence[int]]:
        """The generated tokens of each running beam."""
        return [beam.ids for beam in self._running]

    def made(self, choice: int) -> tuple[Sequence[int], Sequence[TokenLogprob] | None]:
        """The tokens of an ended text; empty before, because none is final."""
        return (() if self._running else self._ended[choice].ids), None

    def pieces(self) -> list[tuple[int, str]]:
        """The complete texts, once, when all have ended: before, none is final."""
        if self._running or self._returned:
            return []
        self._returned = True
        texts = [(rank, self.result(rank).text) for rank in self.ended()]
        return [(rank, text) for rank, text in texts if text]

    def cancel(self, choice: int) -> None:
        """End the search at the next step, with all its texts."""
        self._cancelled = True

    def ended(self) -> list[int]:
        """The ranks of the best texts, when the search has ended."""
        return [] if self._running else list(range(self._n))

    def result(self, choice: int) -> Finished:
        """The ended text of a rank."""
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
