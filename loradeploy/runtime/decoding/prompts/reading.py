"""Encode prompts and texts with their adapters' tokenizers, and check the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from loradeploy.errors import UsageError, shown
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import is_list
from loradeploy.runtime.decoding.caches.source import Target
from loradeploy.runtime.decoding.prompts.calls import Prompt
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.text.sides import TextSide

if TYPE_CHECKING:
    from loradeploy.bundle.text.chat import Message

# Parts of a message whose contents are not text, by the names that chat templates use for them.
_IMAGES: Final = ("image", "image_url", "input_image")
_OTHER_MEDIA: Final = ("video", "video_url", "audio", "audio_url", "input_audio")


@dataclass(frozen=True, eq=False)
class ReadText:
    """A text as tokens of its adapter. `counts`: `TextSides.counts` when it was encoded."""

    number: int
    ids: list[int]
    adapter: AdapterSpec | None
    side: TextSide
    counts: tuple[int, ...]


class PromptReader:
    """Encodes prompts and texts for a session.

    `write`: changes a text, or the text of a chat, before it is tokenized. `images`: whether the
    images of a chat are given separately. Otherwise they are refused: the chat template writes a
    token for each, and the model would answer without the image. `target`: of an encoder-decoder,
    whose prompts are limited by the encoder's positions.
    """

    def __init__(
        self,
        session: AdapterSession,
        write: Callable[[str], str] | None = None,
        *,
        images: bool = False,
        target: Target | None = None,
    ) -> None:
        self._session = session
        self._write = write
        self._refused = _OTHER_MEDIA if images else (*_IMAGES, *_OTHER_MEDIA)
        own = session.texts.base.tokenizer.max_length
        self._positions = own if target is None else target.sources

    def read(
        self, number: int, prompt: Prompt, adapter: AdapterSpec | None, chat: bool, what: str
    ) -> ReadText:
        """Encode a prompt or a text, called `what` in messages."""
        counts = self._session.texts.counts(adapter)
        side = self._session.texts.of(adapter)
        return ReadText(number, self._encode(side, prompt, chat, what), adapter, side, counts)

    def check_length(self, tokens: int, new: int, what: str) -> int:
        """The number of `new` tokens that there are positions for; at least 1 if `new` is not 0."""
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
        """The tokens of a prompt, called `what` in messages."""
        if isinstance(prompt, str):
            if not prompt:
                return []
            if chat:
                prompt = [{"role": "user", "content": prompt}]
        elif not is_list(prompt) or (isinstance(prompt, np.ndarray) and prompt.ndim > 1):
            raise UsageError(
                f"{what} is {shown(prompt)}: give a text, a list of messages, or of token ids"
            )
        written = partial(self._written, side, what)
        if isinstance(prompt, str):
            ids = side.tokenizer.encode(written(prompt))
        elif all(isinstance(t, int | np.integer) and not isinstance(t, bool) for t in prompt):
            ids = [int(token) for token in cast("Sequence[int]", prompt)]
        else:
            side.check_chat()
            self._check_media(prompt, what)
            ids = side.tokenizer.encode_chat(cast("Sequence[Message]", prompt), written)
        if ids:
            self._session.limits.check_tokens((min(ids), max(ids)), what)
        return ids

    def _written(self, side: TextSide, what: str, text: str) -> str:
        """The text to tokenize for `text`.

        Raises:
            UsageError: it has far too many tokens, which would take long to count.
        """
        text = text if self._write is None else self._write(text)
        most = self._positions
        if most is not None and side.tokenizer.exceeds(text, most):
            raise UsageError(
                f"{what} has {len(text):,} characters, which are more tokens than the {most}"
                " positions of the model: shorten it"
            )
        return text

    def _check_media(self, messages: Sequence[Any], what: str) -> None:
        """Raise UsageError if a message of a chat has a part that is not supported."""
        for message in messages:
            content = message.get("content") if isinstance(message, Mapping) else None
            for part in content if isinstance(content, list | tuple) else ():
                if not isinstance(part, Mapping):
                    continue
                known = [part.get("type"), *(name for name in part if part[name] is not None)]
                found = next((name for name in self._refused if name in known), None)
                if found is None:
                    continue
                if found in _IMAGES:
                    raise UsageError(
                        f"a message of {what} has an image ({found}), which is not read here: use"
                        " ImageTextGenerator for the images of a vision-language model"
                    )
                raise UsageError(f"a message of {what} has a part of type {found}: not supported")
