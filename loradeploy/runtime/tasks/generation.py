"""Text from a decoder bundle: batched, cached, each row with its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import numpy as np
import onnxruntime

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LEFT,
    NO_PADDING,
    PAST,
    POSITION_IDS,
    TOKEN_TYPE_IDS,
)
from loradeploy.bundle.outputs import output_of
from loradeploy.bundle.text.chat import Message
from loradeploy.errors import UsageError, shown
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters, check_count, each_row
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.sampling import Sampling, adjusted
from loradeploy.runtime.texts import TextSide
from loradeploy.runtime.tokenizer import PieceDecoder, pad, positions_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A text, a conversation, or tokens.
Prompt = str | Sequence[Message] | Sequence[int]
_LISTS: Final = (list, tuple, np.ndarray)
_FED: Final = (INPUT_IDS, ATTENTION_MASK, POSITION_IDS, TOKEN_TYPE_IDS)
OnText = Callable[[int, str], None]
OnResult = Callable[[int, "Generation"], None]


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    `token_ids` are without the token that ended them; `finish_reason` is "stop" where there was
    one, "length" where `max_new_tokens` or the model's positions ran out.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    adapter: AdapterSpec | None
    prompt_tokens: int


@dataclass
class _Row:
    """One row of the batch while it is generated."""

    number: int
    prompt: list[int]
    adapter: AdapterSpec | None
    limit: int
    random: np.random.Generator
    side: TextSide
    sampling: Sampling
    pieces: PieceDecoder
    counts: tuple[int, ...] = ()  # of its adapter's changes, when its side was read
    ids: list[int] = field(default_factory=list)
    stopped: bool = False

    @property
    def ended(self) -> bool:
        return self.stopped or len(self.ids) >= self.limit


class TextGenerator:
    """Generates text with a session on a decoder bundle.

    Raises:
        UsageError: the bundle is no causal language model, its shapes are fixed, or its graph takes
            something besides tokens and a cache.
        BundleError: the bundle holds no tokenizer.
    """

    def __init__(self, session: AdapterSession) -> None:
        manifest = session.manifest
        if manifest.task != CAUSAL_LM:
            raise UsageError(f"{session.path} is a {manifest.task} bundle: it generates no text")
        sizes = next(spec.shape for spec in manifest.inputs if spec.name == INPUT_IDS)
        if any(isinstance(size, int) for size in sizes):
            raise UsageError(
                f"{session.path} was exported with `fixed` sizes: run it with AdapterSession.run,"
                " or export it without"
            )
        self.session = session
        self.tokenizer = session.texts.base.tokenizer
        self._inputs = {spec.name: spec for spec in manifest.inputs}
        other = [n for n in self._inputs if n not in _FED and not n.startswith(PAST)]
        if other:
            raise UsageError(
                f"{session.path} takes {other[0]}, which text generation does not make: run it with"
                " AdapterSession.run"
            )
        self._scores = output_of(manifest)
        self._cached = any(name.startswith(PAST) for name in self._inputs)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        adapters: Adapters = None,
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 0,
        chat: bool = False,
        batch_size: int | None = None,
        on_text: OnText | None = None,
        on_result: OnResult | None = None,
    ) -> list[Generation]:
        """Continue each prompt until a token that ends it, or for `max_new_tokens`.

        A prompt is a text, a conversation (a list of messages with `role` and `content`), which
        goes through the chat template, or a list of token ids; with `chat` a text is a user's
        message. `adapters` is as in `AdapterSession.run`.

        The tokenizer, the chat template, the tokens that end a text and the settings of
        generation_config.json that hold without sampling (such as repetition_penalty) are each
        row's adapter's, where it brings its own, else the base's. A row is sampled where a
        `temperature` is given, by its generation_config.json's top_k and top_p unless these are
        given too.

        What a row becomes depends on its prompt, its adapter and its seed alone, not on the batch:
        a single `seed` is every row's. `batch_size` prompts are generated together, by default all.
        `on_text(row, piece)` is called as text appears, `on_result(row, result)` row by row when a
        batch has ended.

        Raises:
            UsageError: no prompts, an empty one, one that fills the model's positions, or a value
                out of its range.
            UnknownAdapterError: an adapter that was never loaded.
        """
        Sampling(temperature, top_k or 0, 1.0 if top_p is None else top_p)  # checked at once
        check_count("max_new_tokens", max_new_tokens)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        given: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(given, _LISTS):
            raise UsageError(f"the prompts are {shown(prompts)}: give a text, or a list")
        if not len(given):
            raise UsageError("there are no prompts")
        seeds: list[Any] = list(seed) if isinstance(seed, _LISTS) else [seed] * len(given)
        if len(seeds) != len(given):
            raise UsageError(f"{len(seeds)} seeds for {len(given)} prompts: give one for each")
        for own in seeds:
            if not isinstance(own, int | np.integer) or isinstance(own, bool) or own < 0:
                raise UsageError(f"a seed is {shown(own)}: give a whole number of 0 or more")

        def made(number: int) -> _Row:
            adapter = each[number]
            counts = self.session.texts.counts(adapter)
            side = self.session.texts.of(adapter)
            sampling = Sampling.of(temperature, top_k, top_p, side.settings)
            row = self._row(
                number, given[number], adapter, seeds[number], max_new_tokens, chat, side, sampling
            )
            return replace(row, counts=counts)

        each = each_row(adapters, len(given))
        rows = [made(number) for number in range(len(given))]
        results: list[Generation] = []
        size = batch_size or len(rows)
        for start in range(0, len(rows), size):
            waiting = self._together(rows[start : start + size])
            while waiting:
                together, *waiting = waiting
                with self.session.hold([row.adapter for row in together]) as held:
                    moved = any(self._has_moved(row) for row in together)
                    for row, piece in () if moved else self._decode(together, held):
                        if on_text is not None:
                            on_text(row.number, piece)
                if moved:  # their adapters were replaced between the texts and the factors
                    for row in together:
                        rows[row.number] = made(row.number)
                    again = self._together([rows[row.number] for row in together])
                    waiting = [*again, *waiting]
            for row in rows[start : start + size]:
                results.append(self._generation(row))
                if on_result is not None:
                    on_result(row.number, results[-1])
        return results

    def _has_moved(self, row: _Row) -> bool:
        return self.session.texts.have_moved(row.adapter, row.counts)

    def _row(
        self,
        number: int,
        prompt: Prompt,
        adapter: AdapterSpec | None,
        seed: int,
        max_new_tokens: int,
        chat: bool,
        side: TextSide,
        sampling: Sampling,
    ) -> _Row:
        ids = self._encode(side, prompt, chat, f"prompt {number + 1}")
        positions = self.tokenizer.max_length
        if not ids:
            raise UsageError(f"prompt {number + 1} is empty")
        if positions is not None and len(ids) >= positions:
            raise UsageError(
                f"prompt {number + 1} has {len(ids)} tokens, the model has {positions} positions:"
                " shorten it"
            )
        return _Row(
            number=number,
            prompt=ids,
            adapter=adapter,
            limit=min(max_new_tokens, positions - len(ids)) if positions else max_new_tokens,
            random=np.random.default_rng(seed),
            side=side,
            sampling=sampling,
            pieces=PieceDecoder(side.tokenizer),
        )

    def _encode(self, side: TextSide, prompt: Prompt, chat: bool, what: str) -> list[int]:
        """The tokens of a prompt, which messages call `what`."""
        if isinstance(prompt, str):
            if not prompt:
                return []
            if chat:
                prompt = [{"role": "user", "content": prompt}]
        elif not isinstance(prompt, _LISTS):
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
            self.session.limits.check_tokens((min(ids), max(ids)), what)
        return ids

    def _together(self, batch: Sequence[_Row]) -> list[list[_Row]]:
        """The rows that may share a run: those of one length, where padding changes answers."""
        if self.session.manifest.padding != NO_PADDING:
            return [list(batch)]
        by_length: dict[int, list[_Row]] = {}
        for row in batch:
            by_length.setdefault(len(row.prompt), []).append(row)
        return list(by_length.values())

    def _decode(self, rows: Sequence[_Row], held: HeldAdapters) -> Iterator[tuple[_Row, str]]:
        """Generate `rows` together, and tell each piece of text once it is complete."""
        left = self.session.manifest.padding == LEFT
        ids, mask = pad([row.prompt for row in rows], self.tokenizer.pad_id, left=left)
        ends = np.full(len(rows), -1) if left else mask.sum(axis=1) - 1
        cache = self.session.empty_cache(len(rows))
        while True:
            cache.make_room(mask.shape[1])
            logits, *present = held.run_with_ort_values(
                (self._scores, *cache.outputs),
                {**self._feeds(ids, mask), **cache.inputs},
                buffers=cache.buffers,
            )
            cache.keep(present)
            scores_of = logits.numpy()  # [batch, sequence, vocabulary]
            if scores_of.ndim == 2:
                scores_of = scores_of[:, np.newaxis]
            if scores_of.shape[1] == 1:  # a graph may give the last position alone
                ends = np.zeros_like(ends)
            last = scores_of[np.arange(len(rows)), ends]  # [batch, vocabulary]
            ends = np.full(len(rows), -1)
            for row, scores in zip(rows, last, strict=True):
                if not row.ended and (piece := self._advance(row, scores)):
                    yield row, piece
            if all(row.ended for row in rows):
                return
            if not self._cached:
                ids, mask, ends = self._whole(rows)
                continue
            # A row that has ended goes on as padding, which takes no position.
            ids = np.array([[self._next(row)] for row in rows], np.int64)
            going = np.array([[not row.ended] for row in rows], np.int64)
            mask = np.concatenate([mask, going], axis=1)

    def _whole(
        self, rows: Sequence[_Row]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """All tokens again, for a graph without a cache: ids, mask, and where each row ends."""
        left = self.session.manifest.padding == LEFT
        ids, mask = pad([row.prompt + row.ids for row in rows], self.tokenizer.pad_id, left=left)
        return ids, mask, np.full(len(rows), -1) if left else mask.sum(axis=1) - 1

    def _advance(self, row: _Row, scores: NDArray[Any]) -> str:
        """Choose the next token of `row`, and return the text that it completes."""
        side = row.side
        scores = adjusted(scores, side.settings, row.prompt, row.ids, side.ends)
        token = row.sampling.choose(scores, row.random)
        if token in side.ends:
            row.stopped = True
            return row.pieces.close()
        row.ids.append(token)
        piece = row.pieces.push(token)
        return piece + row.pieces.close() if row.ended else piece

    def _generation(self, row: _Row) -> Generation:
        return Generation(
            text=row.side.tokenizer.decode(row.ids),
            token_ids=tuple(row.ids),
            finish_reason="stop" if row.stopped else "length",
            adapter=row.adapter,
            prompt_tokens=len(row.prompt),
        )

    def _next(self, row: _Row) -> int:
        return self.tokenizer.pad_id if row.ended else row.ids[-1]

    def _feeds(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> dict[str, NDArray[Any] | onnxruntime.OrtValue]:
        made: dict[str, Callable[[], NDArray[Any]]] = {
            INPUT_IDS: lambda: ids,
            ATTENTION_MASK: lambda: mask,
            POSITION_IDS: lambda: positions_of(mask, ids.shape[1]),
            TOKEN_TYPE_IDS: lambda: np.zeros_like(ids),
        }
        return {name: make() for name, make in made.items() if name in self._inputs}
