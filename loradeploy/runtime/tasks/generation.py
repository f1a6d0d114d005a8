"""Text from a decoder bundle: batched, cached, each row with its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.tasks import CAUSAL_LM, SEQ2SEQ_LM
from loradeploy.bundle.names import INPUT_IDS
from loradeploy.errors import UsageError, listed_names
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters, check_count, each_row
from loradeploy.runtime.decoding.asking.batches import batches
from loradeploy.runtime.decoding.asking.calls import Call, Prompt, listed
from loradeploy.runtime.decoding.asking.reading import PromptReader, ReadText
from loradeploy.runtime.decoding.asking.requests import Request, read_request
from loradeploy.runtime.decoding.caches.memory import check_memory
from loradeploy.runtime.decoding.caches.source import EncodedSource, Target
from loradeploy.runtime.decoding.choosing.logprobs import TokenLogprob
from loradeploy.runtime.decoding.choosing.options import GenerationOptions
from loradeploy.runtime.decoding.choosing.sequences import Finished, FinishReason
from loradeploy.runtime.decoding.graph import DecoderGraph, TokenEmbeds, check_embeds
from loradeploy.runtime.decoding.loop import DecodingBatch
from loradeploy.runtime.decoding.scoring import TextScore, scores_of
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.streaming import TextPiece, TextStream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loradeploy.runtime.decoding.choosing.options import GenerationFlags
    from loradeploy.runtime.tasks.async_streaming import AsyncTextStream

OnText = Callable[[int, str], None]
OnResult = Callable[[int, "Generation"], None]


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    Args:
        text: ends before the stop string that ended it.
        token_ids: all tokens of the text, those of a stop string included; without the token that
            ended it.
        finish_reason: "stop" where a token or a stop string ended it, "length" where
            `max_new_tokens` or the model's positions ran out, "cancelled" where somebody ended it.
        adapter: whose text it is.
        stop_reason: the token, or the stop string, where it was one.
        prompt_tokens: how many were read.
        completion_tokens: how many were generated, the token that ended it included.
        choice: which of the prompt's `n` texts it is.
        logprobs: one for each of `token_ids`, where they were asked for.
        score: of beam search, the sum of the tokens' log-probabilities divided by their number to
            the power of `length_penalty`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    adapter: AdapterSpec | None
    prompt_tokens: int
    completion_tokens: int = 0
    stop_reason: int | str | None = None
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None


class TextGenerator:
    """Generates text with a session on a decoder bundle.

    `cache_budget`: the bytes that the cache and the prompts' logits of one batch may take; by
    default what the machine has available, where it says so (Linux, on the CPU).

    Raises:
        UsageError: the bundle is no causal language model, its shapes are fixed, or its graph takes
            something besides tokens and a cache.
        BundleError: the bundle holds no tokenizer.
    """

    def __init__(self, session: AdapterSession, *, cache_budget: int | None = None) -> None:
        manifest = session.manifest
        self._target = _target_of(session)
        sizes = next((spec.shape for spec in manifest.inputs if spec.name == INPUT_IDS), None)
        if sizes is None:
            names = listed_names((spec.name for spec in manifest.inputs), 4)
            raise UsageError(
                f"{session.path} takes {names}, not {INPUT_IDS}: run it with AdapterSession.run"
            )
        if any(isinstance(size, int) for size in sizes):
            shape = ", ".join(map(str, sizes))
            raise UsageError(
                f"the graph of {session.path} only takes {INPUT_IDS} [{shape}]: run it with"
                " AdapterSession.run, or export it with a batch and a sequence of any size"
            )
        if cache_budget is not None:
            check_count("cache_budget", cache_budget)
        self.session = session
        self.tokenizer = session.texts.base.tokenizer
        self._graph = DecoderGraph.of(session, self.tokenizer.pad_id, source=True)
        self._budget = cache_budget
        self._reader = PromptReader(session)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        adapters: Adapters = None,
        *,
        seed: int | Sequence[int] = 0,
        chat: bool = False,
        batch_size: int | None = None,
        per_prompt: Sequence[Mapping[str, Any] | None] | None = None,
        on_text: OnText | None = None,
        on_result: OnResult | None = None,
        embeds: Sequence[TokenEmbeds | None] | None = None,
        **options: Unpack[GenerationFlags],
    ) -> list[Generation]:
        """Continue each prompt until a token or a text that ends it, or for `max_new_tokens`.

        A prompt is a text, a conversation (a list of messages with `role` and `content`), which
        goes through the chat template, or a list of token ids; with `chat` a text is a user's
        message. `adapters` is as in `AdapterSession.run`.

        `options` are the fields of `GenerationOptions`, by default greedy and 32 tokens;
        `per_prompt` has for each prompt those that it has in place of them, and its `seed`. A
        prompt has `n` results, one behind the other; a row is the number of one.

        The tokenizer, the chat template, the tokens that end a text and the settings of
        generation_config.json are each row's adapter's, where it brings its own, else the base's. A
        row is sampled where a `temperature` is given, by its generation_config.json's top_k, top_p
        and min_p unless these are given too.

        What a row becomes depends on its prompt, its adapter, its settings and its seed alone, not
        on the batch: a single `seed` is every prompt's. `batch_size` prompts are generated
        together, by default all. `on_text(row, piece)` is called as text appears, with beam search
        once it has ended; `on_result(row, result)` in the order of the rows, when a batch has
        ended. `embeds` has for each prompt the embeddings that are read in the places of a token,
        or None; `ImageTextGenerator` makes them of images.

        Raises:
            UsageError: no prompts, an empty one, one that fills the model's positions, a value out
                of its range, settings that contradict each other, or a mask that allows no token,
                or fewer texts than `n` beams.
            RunError: the graph gave logits that are not finite.
            UnknownAdapterError: an adapter that was never loaded.
            BudgetError: a batch that takes more memory than there is.
        """
        call = Call.of(prompts, adapters, seed, chat, batch_size, per_prompt, options, embeds)
        results: dict[int, Generation] = {}
        reported = 0
        for piece in self._decode(call, set()):
            if piece is None:  # a batch has ended; one may hold later rows than the next one
                while on_result is not None and reported in results:
                    on_result(reported, results[reported])
                    reported += 1
                continue
            if on_text is not None and piece.text:
                on_text(piece.row, piece.text)
            if piece.result is not None:
                results[piece.row] = piece.result
        return [results[row] for row in sorted(results)]

    def stream(
        self,
        prompts: str | Sequence[Prompt],
        adapters: Adapters = None,
        *,
        seed: int | Sequence[int] = 0,
        chat: bool = False,
        batch_size: int | None = None,
        per_prompt: Sequence[Mapping[str, Any] | None] | None = None,
        **options: Unpack[GenerationFlags],
    ) -> TextStream:
        """As `generate`, piece by piece: `for piece in generator.stream(…)`.

        Raises:
            UsageError, UnknownAdapterError, BudgetError: as `generate`. Settings are checked at
                once; prompts and adapters with the first piece.
        """
        call = Call.of(prompts, adapters, seed, chat, batch_size, per_prompt, options)
        return TextStream(lambda cancelled: self._pieces(call, cancelled))

    def astream(
        self,
        prompts: str | Sequence[Prompt],
        adapters: Adapters = None,
        *,
        seed: int | Sequence[int] = 0,
        chat: bool = False,
        batch_size: int | None = None,
        per_prompt: Sequence[Mapping[str, Any] | None] | None = None,
        **options: Unpack[GenerationFlags],
    ) -> AsyncTextStream:
        """As `stream`, for asyncio: `async for piece in generator.astream(…)`.

        The graph runs in a thread of its own. A task that is cancelled, and a loop that is left,
        end the rows before their next token.
        """
        from loradeploy.runtime.tasks.async_streaming import AsyncTextStream

        call = Call.of(prompts, adapters, seed, chat, batch_size, per_prompt, options)
        return AsyncTextStream(lambda cancelled: self._pieces(call, cancelled))

    def score(
        self,
        texts: str | Sequence[Prompt],
        adapters: Adapters = None,
        *,
        chat: bool = False,
        batch_size: int | None = None,
        logprobs: int = 0,
    ) -> list[TextScore]:
        """How likely each text is: the log-probability of every token behind those before it.

        `texts` are as the prompts of `generate`. `logprobs`: this many most likely tokens are
        given for each position.

        Raises:
            UsageError: no texts, one of fewer than two tokens or of more than the model has
                positions, or a graph that gives the last token's logits alone.
            UnknownAdapterError, BudgetError, RunError: as `generate`.
        """
        if self._target is not None:
            raise UsageError(
                f"{self.session.path} is an encoder-decoder, whose texts have a source: score"
                " targets with AdapterSession.run"
            )
        given = listed(texts, "texts")
        each = each_row(adapters, len(given))
        if batch_size is not None:
            check_count("batch_size", batch_size)
        GenerationOptions(logprobs=logprobs)

        def read(number: int) -> ReadText:
            what = f"text {number + 1}"
            text = self._reader.read(number, given[number], each[number], chat, what)
            if len(text.ids) < 2:
                raise UsageError(
                    f"{what} has {len(text.ids)} tokens, expected 2 or more: the first one has"
                    " nothing before it that it could follow"
                )
            self._reader.check_length(len(text.ids), 0, what)
            return text

        results: dict[int, TextScore] = {}
        rows = [read(number) for number in range(len(given))]
        for together, held in batches(self.session, rows, batch_size or len(rows), read):
            lengths = [len(text.ids) for text in together]
            ones, none = [1] * len(together), [0] * len(together)
            check_memory(self.session, self._budget, lengths, ones, none)
            found = scores_of(
                self._graph,
                held,
                [text.ids for text in together],
                [text.adapter for text in together],
                [text.side.tokenizer for text in together],
                [text.number for text in together],
                logprobs,
            )
            for text, score in zip(together, found, strict=True):
                results[text.number] = score
        return [results[number] for number in range(len(rows))]

    def _pieces(self, call: Call, cancelled: set[int]) -> Iterator[TextPiece]:
        return (piece for piece in self._decode(call, cancelled) if piece is not None)

    def _decode(self, call: Call, cancelled: set[int]) -> Iterator[TextPiece | None]:
        """Generate batch by batch: each piece of text once it is final; None ends a batch.

        `cancelled`: texts that are to end, to which the caller may add at any time.
        """

        def read(number: int) -> Request:
            request = read_request(self._reader, call, number, self._target)
            check_embeds(self._graph, request.ids, call.embeds[number], number)
            return request

        requests = [read(number) for number in range(len(call.prompts))]
        for together, held in batches(self.session, requests, call.batch_size, read):
            options = [call.options[one.number] for one in together]
            check_memory(
                self.session,
                self._budget,
                [len(one.ids) for one in together],
                [max(own.n, own.num_beams) for own in options],
                [one.limit for one in together],
            )
            ended: set[int] = set()
            source = None
            if self._target is not None:
                texts = [one.ids for one in together]
                source = EncodedSource.of_tokens(self.session, held, texts, self.tokenizer.pad_id)
            graph = self._graph.with_embeds([call.embeds[one.number] for one in together])
            batch = DecodingBatch.of(graph, held, [one.sequences for one in together], source)
            for _ in batch.steps():
                for one in together:
                    yield from _news(one, ended)
                    for choice in range(call.options[one.number].n):
                        if one.first + choice in cancelled:
                            one.sequences.cancel(choice)
            yield None


def _target_of(session: AdapterSession) -> Target | None:
    """What an encoder-decoder's decoder begins with; None of a decoder.

    Raises:
        UsageError: a bundle of another task, or of one that was exported without its cache.
    """
    manifest = session.manifest
    if manifest.task == CAUSAL_LM:
        return None
    if manifest.task != SEQ2SEQ_LM:
        raise UsageError(f"{session.path} is a {manifest.task} bundle: it generates no text")
    if manifest.encoder is None:
        raise UsageError(f"{session.path} has no cache: export it again to generate with it")
    if INPUT_IDS not in manifest.encoder.inputs:
        raise UsageError(
            f"{session.path} takes {manifest.encoder.inputs[0]}, no text: use SpeechRecognizer"
        )
    return Target.of(session)


def _news(request: Request, ended: set[int]) -> Iterator[TextPiece]:
    """What a step made of a prompt's texts; a text's last piece has its result."""
    texts = dict.fromkeys(request.sequences.ended(), "")
    for choice, text in request.sequences.pieces():
        texts[choice] = texts.get(choice, "") + text
    for choice, text in sorted(texts.items()):
        row = request.first + choice
        if row in ended:
            continue
        result = None
        if choice in request.sequences.ended():
            ended.add(row)
            result = generation_of(request, choice)
        yield TextPiece(row, text, result)


def generation_of(request: Request, choice: int) -> Generation:
    """What became of a text of a prompt, which has ended."""
    found: Finished = request.sequences.result(choice)
    return Generation(
        text=found.text,
        token_ids=found.ids,
        finish_reason=found.reason,
        adapter=request.adapter,
        prompt_tokens=len(request.ids),
        completion_tokens=found.completion_tokens,
        stop_reason=found.stop_reason,
        choice=choice,
        logprobs=found.logprobs,
        score=found.score,
    )
