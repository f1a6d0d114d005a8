"""Independent texts of one prompt: greedy, or `n` samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.runtime.decoding.choosing.logprobs import TokenLogprob, check_logits, token_logprob
from loradeploy.runtime.decoding.choosing.processors import Processors
from loradeploy.runtime.decoding.choosing.sampling import Sampling
from loradeploy.runtime.decoding.choosing.sequences import Finished, FinishReason, Row
from loradeploy.runtime.decoding.choosing.stopping import Stops, Transcript

if TYPE_CHECKING:
    from numpy.typing import NDArray


class _Sample:
    """One text that is being generated."""

    def __init__(self, random: np.random.Generator, transcript: Transcript) -> None:
        self.random = random
        self.transcript = transcript
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    def end(self, reason: FinishReason, stop_reason: int | str | None = None) -> str:
        self.reason, self.stop_reason = reason, stop_reason
        return self.transcript.close()


class Samples:
    """`n` texts of one prompt, each with its own random numbers.

    The first uses those of `seed` alone, so that it is the same as with n = 1.
    """

    def __init__(
        self,
        prompt: list[int],
        *,
        n: int,
        limit: int,
        seed: int,
        sampling: Sampling,
        processors: Processors,
        tokenizer: Tokenizer,
        stops: Stops,
        logprobs: int | None,
    ) -> None:
        self.prompt = prompt
        self.limit = limit
        self._sampling = sampling
        self._process = processors
        self._tokenizer = tokenizer
        self._top = logprobs
        self._stop_tokens = stops.tokens
        self._samples = [
            _Sample(
                np.random.default_rng([seed, number] if number else seed),
                Transcript(tokenizer, stops.texts),
            )
            for number in range(n)
        ]
        self._active: list[int] | None = None  # the sample of each row; None before the first step
        self._pieces: list[tuple[int, str]] = []

    def advance(self, logits: NDArray[Any]) -> list[Row]:
        """Choose each text's next token by logits [rows, vocabulary]; return rows to continue."""
        check_logits(logits, self._process.what)
        first = self._active is None
        rows = []
        active: list[int] = []
        for row, number in enumerate(range(len(self._samples)) if first else self._active or ()):
            parent = 0 if first else row
            sample = self._samples[number]
            if sample.reason is None:
                piece = self._choose(sample, logits[parent])
                if piece:
                    self._pieces.append((number, piece))
            if sample.reason is None:
                active.append(number)
                rows.append(Row(parent, sample.ids[-1]))
        self._active = active
        return rows

    def _choose(self, sample: _Sample, logits: NDArray[Any]) -> str:
        """Choose the next token of `sample`, and return the text that it completes."""
        scores = self._process(logits, self.prompt, sample.ids)
        token = self._sampling.choose(scores, sample.random)
        if token in self._process.ends:
            return sample.end("stop", token)
        sample.ids.append(token)
        if self._top is not None:
            sample.logprobs.append(token_logprob(logits, token, self._top, self._tokenizer))
        piece = sample.transcript.push(token)
        if token in self._stop_tokens:
            return piece + sample.end("stop", self._stop_tokens[token])
        if sample.transcript.stopped_by is not None:
            return piece + sample.end("stop", sample.transcript.stopped_by)
        return piece + sample.end("length") if len(sample.ids) >= self.limit else piece

    def tokens(self) -> list[Sequence[int]]:
        """The generated tokens of each running row."""
        return [self._samples[number].ids for number in self._active or ()]

    def made(self, choice: int) -> tuple[Sequence[int], Sequence[TokenLogprob] | None]:
        """The tokens of a text so far, with their log-probabilities if requested."""
        sample = self._samples[choice]
        return sample.ids, None if self._top is None else sample.logprobs

    def pieces(self) -> list[tuple[int, str]]:
        """New final text since the last call, as pairs of a sample's number and a piece."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def cancel(self, choice: int) -> None:
        """End a text as it is; its row is dropped at the next step."""
        sample = self._samples[choice]
        if sample.reason is None and (piece := sample.end("cancelled")):
            self._pieces.append((choice, piece))

    def ended(self) -> list[int]:
        """The numbers of the texts that have ended."""
        return [n for n, sample in enumerate(self._samples) if sample.reason is not None]

    def result(self, choice: int) -> Finished:
        """A text that has ended."""
        sample = self._samples[choice]
        assert sample.reason is not None
        stopped = sample.transcript.stopped_by is not None
        ended = isinstance(sample.stop_reason, int)
        return Finished(
            ids=tuple(sample.ids),
            text=sample.transcript.text if stopped else self._tokenizer.decode(sample.ids),
            reason=sample.reason,
            stop_reason=sample.stop_reason,
            completion_tokens=len(sample.ids) + ended,
            logprobs=None if self._top is None else tuple(sample.logprobs),
        )
