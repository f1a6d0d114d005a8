"""Prompts as their adapters read them, and which of them may share a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from loradeploy.bundle.names import NO_PADDING
from loradeploy.errors import UsageError, shown
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.decoding.beams import BeamSearch
from loradeploy.runtime.decoding.calls import LISTS, Call, Prompt
from loradeploy.runtime.decoding.memory import check_memory
from loradeploy.runtime.decoding.options import GenerationOptions
from loradeploy.runtime.decoding.processors import Processors
from loradeploy.runtime.decoding.samples import Samples
from loradeploy.runtime.decoding.sampling import Sampling
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.texts import TextSide

if TYPE_CHECKING:
    from loradeploy.bundle.text.chat import Message

_T = TypeVar("_T", bound="ReadText")


@dataclass(frozen=True, eq=False)
class ReadText:
    """A text as its adapter reads it. `counts`: of the adapter's changes when it was read."""

    number: int
    ids: list[int]
    adapter: AdapterSpec | None
    side: TextSide
    counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Request(ReadText):
    """A prompt, and what becomes of it. `first`: the number of its first text among all."""

    first: int
    limit: int
    sequences: Samples | BeamSearch


class PromptReader:
    """Reads prompts and texts for a session, and puts them into batches.

    `budget`: the bytes that a batch may take; None is what the machine has.
    """

    def __init__(self, session: AdapterSession, budget: int | None) -> None:
        self._session = session
        self._budget = budget
        self._positions = session.texts.base.tokenizer.max_length

    def request(self, call: Call, number: int) -> Request:
        """A prompt of `call` as its adapter reads it now."""
        options, what = call.options[number], f"prompt {number + 1}"
        text = self.read(number, call.prompts[number], call.adapters[number], call.chat, what)
        if not text.ids:
            raise UsageError(f"{what} is empty")
        limit = self.check_length(len(text.ids), options.max_new_tokens, what)
        return Request(
            **vars(text),
            first=call.firsts[number],
            limit=limit,
            sequences=_sequences(text, options, call.seeds[number], limit, what),
        )

    def read(
        self, number: int, prompt: Prompt, adapter: AdapterSpec | None, chat: bool, what: str
    ) -> ReadText:
        """A prompt or a text, which messages call `what`."""
        counts = self._session.texts.counts(adapter)
        side = self._session.texts.of(adapter)
        return ReadText(number, self._encode(side, prompt, chat, what), adapter, side, counts)

    def check_length(self, tokens: int, new: int, what: str) -> int:
        """How many of `new` tokens there are positions for; one at least, where any is needed."""
        positions = self._positions
        if positions is None:
            return new
        if tokens + min(new, 1) > positions:
            room = f", {positions - 1} of them for a prompt" if new else ""
            raise UsageError(
                f"{what} has {tokens} tokens, the model has {positions} positions{room}: shorten it"
            )
        return min(new, positions - tokens)

    def _encode(self, side: TextSide, prompt: Prompt, chat: bool, what: str) -> list[int]:
        """The tokens of a prompt, which messages call `what`."""
        if isinstance(prompt, str):
            if not prompt:
                return []
            if chat:
                prompt = [{"role": "user", "content": prompt}]
        elif not isinstance(prompt, LISTS):
            raise UsageError(
                f"{what} is {shown(prompt)}: give a text, a list of messages, or of token ids"
            )
        if isinstance(prompt, str):
            ids = side.tokenizer.encode(prompt)
        elif all(isinstance(t, int | np.integer) and not isinstance(t, bool) for t in prompt):
            ids = [int(token) for token in cast("Sequence[int]", prompt)]
        else:
            side.check_chat()
            ids = side.tokenizer.encode_chat(cast("Sequence[Message]", prompt))
        if ids:
            self._session.limits.check_tokens((min(ids), max(ids)), what)
        return ids

    def batches(
        self, texts: Sequence[_T], size: int, again: Callable[[int], _T]
    ) -> Iterator[tuple[list[_T], HeldAdapters]]:
        """Texts that may share a run, with their adapters; `again` reads one whose adapter was
        replaced between its texts and its factors."""
        for start in range(0, len(texts), size):
            waiting = self._together(texts[start : start + size])
            while waiting:
                together, *waiting = waiting
                with self._session.hold([text.adapter for text in together]) as held:
                    moved = any(
                        self._session.texts.have_moved(text.adapter, text.counts)
                        for text in together
                    )
                    if not moved:
                        yield together, held
                if moved:
                    read = [again(text.number) for text in together]
                    waiting = [*self._together(read), *waiting]

    def _together(self, texts: Sequence[_T]) -> list[list[_T]]:
        """The texts that may share a run: those of one length, where padding changes answers."""
        if self._session.manifest.padding != NO_PADDING:
            return [list(texts)]
        by_length: dict[int, list[_T]] = {}
        for text in texts:
            by_length.setdefault(len(text.ids), []).append(text)
        return list(by_length.values())

    def check_memory(self, tokens: list[int], rows: list[int], new: list[int]) -> None:
        vocabulary = self._session.limits.vocabulary
        on_host = self._session.providers[:1] == ("CPUExecutionProvider",)
        if on_host or self._budget is not None:
            check_memory(self._session.manifest, vocabulary, tokens, rows, new, self._budget)


def _sequences(
    text: ReadText, options: GenerationOptions, seed: int, limit: int, what: str
) -> Samples | BeamSearch:
    """What `options` make of a prompt, with the settings of its own generation_config.json."""
    side = text.side
    own, tokenizer = side.settings, side.tokenizer
    processors = Processors.of(options, own, tokenizer, side.ends, what)
    stops = own.stop_strings if options.stop is None else options.stops
    if options.num_beams > 1:
        return BeamSearch(
            text.ids,
            num_beams=options.num_beams,
            n=options.n,
            limit=limit,
            length_penalty=1.0 if options.length_penalty is None else options.length_penalty,
            early_stopping=options.early_stopping or False,
            processors=processors,
            tokenizer=tokenizer,
            stops=stops,
        )
    return Samples(
        text.ids,
        n=options.n,
        limit=limit,
        seed=seed,
        sampling=Sampling.of(options.temperature, options.top_k, options.top_p, options.min_p, own),
        processors=processors,
        tokenizer=tokenizer,
        stops=stops,
        logprobs=options.logprobs,
    )
