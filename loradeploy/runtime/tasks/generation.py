"""Generate text with a decoder bundle: batched, cached, each row with its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.tasks import CAUSAL_LM, SEQ2SEQ_LM
from loradeploy.bundle.names import INPUT_IDS
from loradeploy.errors import UsageError, listed_names, shown
from loradeploy.given_numbers import checked_count
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters, check_flag, each_row
from loradeploy.runtime.decoding.caches.memory import check_memory
from loradeploy.runtime.decoding.caches.source import EncodedSource, Target
from loradeploy.runtime.decoding.choosing.logprobs import TokenLogprob
from loradeploy.runtime.decoding.choosing.options import GenerationOptions
from loradeploy.runtime.decoding.choosing.sequences import Finished, FinishReason
from loradeploy.runtime.decoding.graph import DecoderGraph, TokenEmbeds, check_embeds
from loradeploy.runtime.decoding.loop import DecodingBatch
from loradeploy.runtime.decoding.prompts.batches import batches
from loradeploy.runtime.decoding.prompts.calls import Call, Prompt, check_one_each, listed
from loradeploy.runtime.decoding.prompts.reading import PromptReader, ReadText
from loradeploy.runtime.decoding.prompts.requests import Request, read_request
from loradeploy.runtime.decoding.scoring import TextScore, scores_of
from loradeploy.runtime.memory import return_after, worked
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.session_argument import check_session
from loradeploy.runtime.tasks.streaming import TextPiece, TextStream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loradeploy.runtime.decoding.choosing.options import GenerationFlags
    from loradeploy.runtime.tasks.async_streaming import AsyncTextStream

OnText = Callable[[int, str], None]
OnResult = Callable[[int, "Generation"], None]


@dataclass(frozen=True)
class Generation:
    """A generated text.

    Args:
        text: the text before the stop string, if one ended it.
        token_ids: all tokens of the text, including those of a stop string, without an end token.
        finish_reason: "stop" if a token or a stop string ended it, "length" if `max_new_tokens` or
            the model's positions ran out, "cancelled" if it was cancelled.
        adapter: the adapter of the text.
        stop_reason: the token or the stop string that ended it, if any.
        prompt_tokens: number of tokens of the prompt.
        completion_tokens: number of generated tokens, including the token that ended it.
        choice: which of the prompt's `n` texts it is.
        logprobs: one for each of `token_ids`, if requested.
        score: for beam search, the sum of the tokens' log-probabilities divided by their number to
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

    `cache_budget`: limit in bytes for the cache and the prompts' logits of one batch; by default
    the available memory, if it is known (Linux, on the CPU).

    Raises:
        UsageError: the bundle is not a causal language model, its shapes are static, or its graph
            takes inputs other than tokens and a cache.
        BundleError: the bundle has no tokenizer.
    """

    def __init__(self, session: AdapterSession, *, cache_budget: int | None = None) -> None:
        check_session(session, type(self).__name__)
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
            cache_budget = checked_count("cache_budget", cache_budget)
        self.session = session
        self.tokenizer = session.texts.base.tokenizer
        self._graph = DecoderGraph.of(session, self.tokenizer.pad_id, source=True)
        self._budget = cache_budget
        self._reader = PromptReader(session, target=self._target)

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
        """Generate text for each prompt until an end token, a stop string or `max_new_tokens`.

        A prompt is a text, a list of token ids, or a conversation (a list of messages with `role`
        and `content`), to which the chat template is applied. With `chat`, a text is a user
        message. `adapters` is as in `AdapterSession.run`.

        `options` are the fields of `GenerationOptions`, by default greedy and 32 tokens;
        `per_prompt` has for each prompt the options that override these, and its `seed`. A prompt
        has `n` consecutive results; a row is the index of a result.

        Each row uses its adapter's tokenizer, chat template, end tokens and generation_config.json
        if the adapter has them, and the base's otherwise. A row is sampled if a `temperature` is
        given, with top_k, top_p and min_p of its generation_config.json unless they are given too.

        The result of a row depends only on its prompt, adapter, settings and seed, not on the rest
        of the batch. A single `seed` applies to every prompt. `batch_size` prompts are generated
        together, by default all. `on_text(row, piece)` is called when text becomes final, with beam
        search at its end; `on_result(row, result)` is called in the order of the rows, when a batch
        has ended. `embeds` has for each prompt the embeddings that replace a token, or None;
        `ImageTextGenerator` computes them from images.

        Raises:
            UsageError: no prompts, an empty prompt, one that fills the model's positions, a value
                out of range, settings that contradict each other, or a mask that allows no token,
                or fewer texts than `n` beams.
            RunError: the graph gave logits that are not finite.
            UnknownAdapterError: an adapter that was never loaded.
            BudgetError: a batch that needs more memory than is available.
        """
        call = Call.of(prompts, adapters, seed, chat, batch_size, per_prompt, options, embeds)
        return self._results(call, on_text, on_result)

    def _results(
        self, call: Call, on_text: OnText | None, on_result: OnResult | None
    ) -> list[Generation]:
        for name, function in (("on_text", on_text), ("on_result", on_result)):
            if function is not None and not callable(function):
                raise UsageError(f"`{name}` is {shown(function)}: give a function")
        results: dict[int, Generation] = {}
        reported = 0
        for piece in self._decode(call, set()):
            if piece is None:  # the end of a batch, whose rows may be later than the next one's
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
        """Like `generate`, piece by piece: `for piece in generator.stream(…)`.

        Raises:
            UsageError, UnknownAdapterError, BudgetError: as `generate`. Settings are checked
                immediately, prompts and adapters with the first piece.
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
        """Like `stream`, for asyncio: `async for piece in generator.astream(…)`.

        The graph runs in a separate thread. Cancelling the task or leaving the loop ends the rows
        before their next token.
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
        embeds: Sequence[TokenEmbeds | None] | None = None,
    ) -> list[TextScore]:
        """The log-probability of every token of each text, given the tokens before it.

        `texts` and `embeds` are as in `generate`; tokens that are replaced by embeddings have no
        probability. `logprobs`: this many most likely tokens are given for each position.

        Raises:
            UsageError: no texts, one of fewer than two tokens or of more than the model has
                positions, or a graph that only returns the logits of the last token.
            UnknownAdapterError, BudgetError, RunError: as `generate`.
        """
        if self._target is not None:
            raise UsageError(
                f"{self.session.path} is an encoder-decoder, whose texts have a source: score"
                " targets with AdapterSession.run"
            )
        check_flag("chat", chat)
        given = listed(texts, "texts")
        each = each_row(adapters, len(given))
        replaced = check_one_each(embeds, len(given), "texts")
        if batch_size is not None:
            batch_size = checked_count("batch_size", batch_size)
        GenerationOptions(logprobs=logprobs)

        def read(number: int) -> ReadText:
            what = f"text {number + 1}"
            text = self._reader.read(number, given[number], each[number], chat, what)
            if len(text.ids) < 2:
                raise UsageError(
                    f"{what} has {len(text.ids)} tokens, expected 2 or more: the first token"
                    " has no probability"
                )
            self._reader.check_length(len(text.ids), 0, what)
            check_embeds(self._graph, text.ids, replaced[number], what)
            return text

        results: dict[int, TextScore] = {}
        rows = [read(number) for number in range(len(given))]
        for together, held in batches(self.session, rows, batch_size or len(rows), read):
            lengths = [len(text.ids) for text in together]
            ones, none = [1] * len(together), [0] * len(together)
            check_memory(self.session, self._budget, lengths, ones, none)
            found = scores_of(
                self._graph.with_embeds([replaced[text.number] for text in together]),
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

    def _pieces(self, call: Call, cancelled: set[int]) -> Generator[TextPiece]:
        return (piece for piece in self._decode(call, cancelled) if piece is not None)

    def _decode(self, call: Call, cancelled: set[int]) -> Iterator[TextPiece | None]:
        """Generate batch by batch; yield each final piece of text, and None at the end of a batch.

        `cancelled`: rows to end; the caller may add rows at any time.
        """

        def read(number: int) -> Request:
            request = read_request(self._reader, call, number, self._target)
            check_embeds(self._graph, request.ids, call.embeds[number], f"prompt {number + 1}")
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
            began = worked()
            ended: set[int] = set()
            source = None
            if self._target is not None:
                texts = [one.ids for one in together]
                source = EncodedSource.of_tokens(self.session, held, texts, self.tokenizer.pad_id)
            graph = self._graph.with_embeds([call.embeds[one.number] for one in together])
            batch = DecodingBatch.of(graph, held, [one.sequences for one in together], source)
            for _ in batch.steps():
                for one in together:
                    yield from _new_pieces(one, ended)
                    for choice in range(call.options[one.number].n):
                        if one.first + choice in cancelled:
                            one.sequences.cancel(choice)
            del batch, source  # with the cache
            return_after(began)
            yield None


def _target_of(session: AdapterSession) -> Target | None:
    """The start token and limits of an encoder-decoder; None for a decoder.

    Raises:
        UsageError: a bundle for another task, or one that was exported without its cache.
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
    return Target.of(session.path)


def _new_pieces(request: Request, ended: set[int]) -> Iterator[TextPiece]:
    """Yield the new pieces of a prompt's texts; the last piece of a text has its result."""
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
    """The result of an ended text of a prompt."""
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
