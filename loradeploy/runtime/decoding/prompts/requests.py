"""A prompt of a call: its tokens, and the sequences that its settings generate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loradeploy.errors import UsageError
from loradeploy.runtime.decoding.caches.source import Target
from loradeploy.runtime.decoding.choosing.beams import BeamSearch
from loradeploy.runtime.decoding.choosing.options import GenerationOptions
from loradeploy.runtime.decoding.choosing.processors import Processors
from loradeploy.runtime.decoding.choosing.samples import Samples
from loradeploy.runtime.decoding.choosing.sampling import Sampling
from loradeploy.runtime.decoding.choosing.stopping import Stops
from loradeploy.runtime.decoding.prompts.calls import Call
from loradeploy.runtime.decoding.prompts.reading import PromptReader, ReadText
from loradeploy.runtime.text.sides import TextSide

if TYPE_CHECKING:
    from loradeploy.runtime.decoding.choosing.processors import LogitsRule


@dataclass(frozen=True, eq=False)
class Request(ReadText):
    """A prompt and its sequences. `first`: the index of its first text among the results."""

    first: int
    limit: int
    sequences: Samples | BeamSearch


def read_request(
    reader: PromptReader,
    call: Call,
    number: int,
    target: Target | None = None,
    *,
    room: int | None = None,
) -> Request:
    """Encode a prompt of `call` with its adapter; with `target`, it is the encoder's source.

    `room`: the positions of a row, if its new tokens may be fewer than requested.

    Raises:
        UsageError: it is empty or fills the model's positions, or settings that do not fit it.
    """
    options, what = call.options[number], f"prompt {number + 1}"
    text = reader.read(number, call.prompts[number], call.adapters[number], call.chat, what)
    if not text.ids:
        raise UsageError(f"{what} is empty")
    if target is None:
        begin = text.ids
        limit = reader.check_length(len(begin), options.max_new_tokens, what)
        limit = limit if room is None else max(1, min(limit, room - len(begin)))
    else:
        target.check_source(len(text.ids), what)
        begin = target.begin(text.side.settings, what)
        limit = target.room(len(begin), options.max_new_tokens)
    return Request(
        **vars(text),
        first=call.firsts[number],
        limit=limit,
        sequences=sequences_of(begin, text.side, options, call.seeds[number], limit, what),
    )


def sequences_of(
    prompt: list[int],
    side: TextSide,
    options: GenerationOptions,
    seed: int,
    limit: int,
    what: str,
    rule: LogitsRule | None = None,
) -> Samples | BeamSearch:
    """The sequences of a prompt, by `options` and the settings in generation_config.json."""
    own, tokenizer = side.settings, side.tokenizer
    processors = Processors.of(options, own, tokenizer, side.ends, what, limit, rule)
    texts = own.stop_strings if options.stop is None else options.stops
    stops = Stops.of(texts, tokenizer, what)
    if options.num_beams > 1:
        penalty, early = options.length_penalty, options.early_stopping
        return BeamSearch(
            prompt,
            num_beams=options.num_beams,
            n=options.n,
            limit=limit,
            length_penalty=own.length_penalty if penalty is None else penalty,
            early_stopping=own.early_stopping if early is None else early,
            processors=processors,
            tokenizer=tokenizer,
            stops=stops,
        )
    return Samples(
        prompt,
        n=options.n,
        limit=limit,
        seed=seed,
        sampling=Sampling.of(options.temperature, options.top_k, options.top_p, options.min_p, own),
        processors=processors,
        tokenizer=tokenizer,
        stops=stops,
        logprobs=options.logprobs,
    )
