"""Text from a decoder bundle: batched, cached, each row with its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnxruntime

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    CAUSAL_LM,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
)
from loradeploy.errors import UsageError
from loradeploy.runtime.sampling import Sampling
from loradeploy.runtime.session import Adapters, AdapterSession
from loradeploy.runtime.tokenizer import Message, Tokenizer, pad

if TYPE_CHECKING:
    from numpy.typing import NDArray

Prompt = str | Sequence[Message]
OnText = Callable[[int, str], None]
_UNFINISHED = "\ufffd"  # what a decoder gives for the first bytes of a character


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    `token_ids` are without the token that ended them; `finish_reason` is "stop" where there was
    one, "length" where the limit was reached.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    adapter: str | None
    prompt_tokens: int


@dataclass
class _Row:
    """One row of the batch while it is generated."""

    random: np.random.Generator
    ids: list[int] = field(default_factory=list)
    stopped: bool = False
    shown: int = 0


class TextGenerator:
    """Generates text with a session on a decoder bundle.

    Raises:
        UsageError: the bundle is no causal language model.
        BundleError: the bundle holds no tokenizer.
    """

    def __init__(self, session: AdapterSession) -> None:
        manifest = session.manifest
        if manifest.task != CAUSAL_LM:
            raise UsageError(f"{session.path} is a {manifest.task} bundle: it generates no text")
        self.session = session
        self.tokenizer = Tokenizer(session.path)
        self._inputs = {spec.name: spec for spec in manifest.inputs}
        self._past = [name for name in self._inputs if name.startswith("past_key_values.")]
        self._present = [name.replace("past_key_values.", "present.", 1) for name in self._past]

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapters: Adapters = None,
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        chat: bool = False,
        on_text: OnText | None = None,
    ) -> list[Generation]:
        """Continue each prompt until a token that ends it, or for `max_new_tokens`.

        A prompt is a text, or a conversation (a list of messages with `role` and `content`), which
        goes through the bundle's chat template; with `chat` a text is a user's message. `adapters`
        is as in `AdapterSession.run`. What a row becomes depends on its prompt, its adapter and its
        seed alone: a single `seed` is every row's. `on_text(row, piece)` is called as text appears.

        Raises:
            UsageError: no prompts, an empty one, one longer than the model's positions, or a value
                out of its range.
        """
        sampling = Sampling(temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
        sequences = [self._encode(row, prompt, chat) for row, prompt in enumerate(prompts)]
        if not sequences:
            raise UsageError("there are no prompts")
        seeds = [seed] * len(sequences) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(sequences):
            raise UsageError(f"{len(seeds)} seeds for {len(sequences)} prompts: give one for each")
        rows = [_Row(np.random.default_rng(value)) for value in seeds]
        limit = self._limit(max(map(len, sequences)), max_new_tokens)
        self._decode(sequences, rows, adapters, limit, sampling, on_text)
        names = (
            [adapters] * len(rows) if adapters is None or isinstance(adapters, str) else adapters
        )
        return [
            Generation(
                text=self.tokenizer.decode(row.ids),
                token_ids=tuple(row.ids),
                finish_reason="stop" if row.stopped else "length",
                adapter=name,
                prompt_tokens=len(sequence),
            )
            for row, name, sequence in zip(rows, names, sequences, strict=True)
        ]

    def _encode(self, number: int, prompt: Prompt, chat: bool) -> list[int]:
        if isinstance(prompt, str):
            if chat:
                ids = self.tokenizer.encode_chat([{"role": "user", "content": prompt}])
            else:
                ids = self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.encode_chat(prompt)
        if not ids:
            raise UsageError(f"prompt {number + 1} is empty")
        return ids

    def _limit(self, longest: int, max_new_tokens: int) -> int:
        """How many tokens may be generated before the model runs out of positions."""
        positions = self.tokenizer.max_length
        if positions is None:
            return max_new_tokens
        if longest >= positions:
            raise UsageError(
                f"a prompt has {longest} tokens, the model has {positions} positions: shorten it"
            )
        return min(max_new_tokens, positions - longest)

    def _decode(
        self,
        sequences: Sequence[Sequence[int]],
        rows: Sequence[_Row],
        adapters: Adapters,
        limit: int,
        sampling: Sampling,
        on_text: OnText | None,
    ) -> None:
        ids, mask = pad(sequences, self.tokenizer.pad_id, left=True)
        cache = self._empty_cache(len(sequences))
        outputs = [LOGITS, *self._present]
        for _ in range(limit):
            logits, *present = self.session.run_with_ort_values(
                outputs, {**self._feeds(ids, mask), **cache}, adapters
            )
            cache = dict(zip(self._past, present, strict=True))
            ids = self._choose(logits.numpy()[:, -1], rows, sampling)
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
            if on_text is not None:
                self._show(rows, on_text)
            if all(row.stopped for row in rows):
                break
        if on_text is not None:
            self._show(rows, on_text, last=True)

    def _feeds(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> dict[str, NDArray[Any] | onnxruntime.OrtValue]:
        feeds: dict[str, NDArray[Any] | onnxruntime.OrtValue] = {
            INPUT_IDS: ids,
            ATTENTION_MASK: mask,
        }
        if POSITION_IDS in self._inputs:
            # Padding on the left has no position of its own; the first real token is at 0.
            positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
            feeds[POSITION_IDS] = positions[:, -ids.shape[1] :]
        return feeds

    def _empty_cache(self, batch: int) -> Mapping[str, onnxruntime.OrtValue]:
        cache = {}
        for name in self._past:
            spec = self._inputs[name]
            _, heads, _, head_dim = spec.shape  # [batch, kv_heads, past, head_dim]
            empty = np.zeros((batch, int(heads), 0, int(head_dim)), spec.dtype)
            cache[name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
        return cache

    def _choose(
        self, logits: NDArray[Any], rows: Sequence[_Row], sampling: Sampling
    ) -> NDArray[np.int64]:
        """Each row's next token, int64 [batch, 1]; a row that has stopped goes on with padding."""
        chosen = np.full((len(rows), 1), self.tokenizer.pad_id, np.int64)
        for number, row in enumerate(rows):
            if row.stopped:
                continue
            token = sampling.choose(logits[number], row.random)
            row.stopped = token in self.tokenizer.eos_ids
            if not row.stopped:
                row.ids.append(token)
                chosen[number] = token
        return chosen

    def _show(self, rows: Sequence[_Row], on_text: OnText, *, last: bool = False) -> None:
        for number, row in enumerate(rows):
            text = self.tokenizer.decode(row.ids)
            if text.endswith(_UNFINISHED) and not last:
                continue
            if len(text) > row.shown:
                on_text(number, text[row.shown :])
                row.shown = len(text)
