"""Text to tokens and back, from the files in a bundle, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from loradeploy.errors import BundleError, UsageError
from loradeploy.files import read_json

if TYPE_CHECKING:
    from jinja2 import Template
    from numpy.typing import NDArray

Message = Mapping[str, Any]
_TEMPLATE_BYTES: Final = 1 << 20


class Tokenizer:
    """A bundle's tokenizer, its special tokens, and its chat template.

    `eos_ids`: the tokens that end a text. `max_length`: the model's positions, None if not known.

    Raises:
        BundleError: the bundle holds no readable tokenizer.
    """

    def __init__(self, bundle: Path) -> None:
        file = bundle / "tokenizer.json"
        if not file.is_file():
            raise BundleError(f"{bundle} holds no tokenizer.json: text cannot be read or written")
        try:
            self._tokenizer = FastTokenizer.from_file(str(file))
        except Exception as problem:  # tokenizers raises bare Exceptions
            raise BundleError(f"{file} is no valid tokenizer: {problem}") from None
        # Lengths are this project's business; a setting in the file would cut or pad in silence.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bundle = bundle
        self._settings = _optional(bundle / "tokenizer_config.json")
        config = _optional(bundle / "config.json")
        generation = _optional(bundle / "generation_config.json")
        eos = generation.get("eos_token_id", config.get("eos_token_id"))
        self.eos_ids: frozenset[int] = frozenset(
            [eos] if isinstance(eos, int) else eos or self._ids_of("eos_token")
        )
        pad = [generation.get("pad_token_id"), config.get("pad_token_id")]
        known = (*pad, *self._ids_of("pad_token"), *sorted(self.eos_ids), 0)
        self.pad_id: int = next(i for i in known if isinstance(i, int))
        positions = config.get("max_position_embeddings", config.get("n_positions"))
        self.max_length: int | None = positions if isinstance(positions, int) else None

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """The tokens of `text`, with those that the tokenizer puts around it unless told not to."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where the assistant is to speak."""
        return self.encode(self.render_chat(messages), special_tokens=False)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The bundle's chat template on `messages`, rendered as transformers renders it.

        Raises:
            UsageError: the bundle has no chat template, or it refuses the messages.
        """
        from jinja2 import TemplateError

        if self._template is None:
            raise UsageError(f"{self._bundle} has no chat template: give plain prompts")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                **{name: self._token(name) for name in names if self._token(name) is not None},
            )
        except TemplateError as problem:
            raise UsageError(f"the chat template refuses the messages: {problem}") from None

    @cached_property
    def _template(self) -> Template | None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        file = self._bundle / "chat_template.jinja"
        if file.is_file() and file.stat().st_size <= _TEMPLATE_BYTES:
            source: Any = file.read_text(encoding="utf-8")
        else:
            source = self._settings.get("chat_template")
        if not isinstance(source, str):
            return None

        def refuse(message: str) -> None:
            raise TemplateError(message)

        def to_json(value: Any, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=False, **options)

        # A template is a program from whoever made the model: it runs in a sandbox.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(source)
        except TemplateError as problem:
            raise BundleError(f"{self._bundle}: the chat template is broken: {problem}") from None

    def _token(self, name: str) -> str | None:
        token = self._settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        return content if isinstance(content, str) else None

    def _ids_of(self, name: str) -> list[int]:
        token = self._token(name)
        identity = None if token is None else self._tokenizer.token_to_id(token)
        return [] if identity is None else [identity]


def pad(
    sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and attention mask, both int64 [batch, longest], padded on one side."""
    longest = max(len(sequence) for sequence in sequences)
    ids = np.full((len(sequences), longest), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if left else slice(0, len(sequence))
        ids[row, place] = sequence
        mask[row, place] = 1
    return ids, mask


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file, error=BundleError) if file.is_file() else {}
