"""Text to token ids and back, without transformers: the tokenizer files of a bundle.

tokenizer.json             the `tokenizers` library's own file: the vocabulary and the rules
tokenizer_config.json      the special tokens by role, the padding side, perhaps a chat template
special_tokens_map.json    the special tokens, in older checkpoints
chat_template.jinja        the chat template, in newer ones
generation_config.json     which tokens end a text (config.json, where it is silent)
config.json                how many positions the model has
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from loradeploy.errors import BundleError, UsageError
from loradeploy.files import read_json
from loradeploy.runtime.chat import ChatTemplate, Message, template_source

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROLES: Final = tuple(
    f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
# Names that configs give to the number of positions.
_POSITIONS: Final = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
# transformers writes 10³⁰ where a tokenizer has no limit of its own.
_NO_LIMIT: Final = 10**9


class Tokenizer:
    """The tokenizer of a bundle, or of any directory with a checkpoint's tokenizer files.

    `special_tokens`: the special tokens by role (`bos_token`, …).
    `eos_ids`: the tokens that end a text.
    `pad_id`: fills rows up; which token it is does not matter where the attention mask is heeded.
    `max_length`: how many tokens the model takes, None where nothing says.

    Raises:
        BundleError: a file is missing or broken.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        place = Path(directory)
        settings = _optional(place / "tokenizer_config.json")
        config = _optional(place / "config.json")
        generation = _optional(place / "generation_config.json")
        self._place = place
        self._tokenizer = _open(place / "tokenizer.json")
        self.special_tokens = _special_tokens(
            _optional(place / "special_tokens_map.json") | settings
        )
        self._mark_special()
        self._chat = _chat_template(place, settings, self.special_tokens)
        eos = (
            _ids(generation.get("eos_token_id"))
            or _ids(config.get("eos_token_id"))
            or self._ids_of("eos_token")
        )
        self.eos_ids: frozenset[int] = frozenset(eos)
        # A classifier on a decoder finds the last token by config.json's id, so that one is first.
        self.pad_id: int = (
            *_ids(config.get("pad_token_id")),
            *self._ids_of("pad_token"),
            *eos,
            0,
        )[0]
        self.max_length = _max_length(config, settings)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return self._chat is not None

    def encode(
        self, text: str, *, special_tokens: bool = True, max_length: int | None = None
    ) -> list[int]:
        """The tokens of `text`, with those that the model wants around it unless told not to.

        Of a text that is longer than `max_length` the end is cut; the special tokens stay.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if max_length is not None:
            around = self._tokenizer.num_special_tokens_to_add(False) if special_tokens else 0
            encoding.truncate(max(max_length - around, 0))
        encoding = self._tokenizer.post_process(encoding, add_special_tokens=special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where the assistant is to speak."""
        return self.encode(self.render_chat(messages), special_tokens=False)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The chat template on `messages`, up to where the assistant is to speak.

        Raises:
            UsageError: there is no chat template, or it refuses the messages.
        """
        if self._chat is None:
            raise UsageError(f"{self._place} has no chat template: give plain prompts")
        return self._chat.render(messages)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _mark_special(self) -> None:
        """Let the library know the special tokens that only the other files call so."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        known = {token.content for token in added if token.special}
        self._tokenizer.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token in self.special_tokens.values()
                # A token that is new to the vocabulary would have no embedding.
                if token not in known and self._tokenizer.token_to_id(token) is not None
            ]
        )

    def _ids_of(self, role: str) -> tuple[int, ...]:
        token = self.special_tokens.get(role)
        index = None if token is None else self._tokenizer.token_to_id(token)
        return () if index is None else (index,)


class PieceDecoder:
    """Text from tokens that arrive one by one; the pieces together are the whole text.

    What a token adds can depend on the one before (a leading space) and may be half a character.
    So the last tokens are decoded twice, without and with the new one, and the difference is held
    back while it ends in the replacement character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # decoding begins at this token
        self._told = 0  # the text of the tokens before this one was given out

    def push(self, token: int) -> str:
        """The text that is complete with `token`, perhaps none."""
        self._ids.append(token)
        return self._advance(hold=True)

    def close(self) -> str:
        """The text that was held back."""
        return self._advance(hold=False)

    def _advance(self, *, hold: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._told])
        now = self._tokenizer.decode(self._ids[self._start :])
        if len(now) <= len(before) or (hold and now.endswith("\ufffd")):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return now[len(before) :]


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


def positions_of(mask: NDArray[np.int64], new: int) -> NDArray[np.int64]:
    """Each new token's place in its row, int64 [batch, new], by the mask [batch, all tokens].

    Padding on the left has no position of its own; the first real token is at 0.
    """
    positions: NDArray[np.int64] = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -new:]
    return positions


def _open(file: Path) -> FastTokenizer:
    if not file.is_file():
        raise BundleError(f"{file} does not exist: without it text cannot be read or written")
    try:
        tokenizer = FastTokenizer.from_file(os.fspath(file))
    except Exception as problem:  # tokenizers raises bare Exceptions
        raise BundleError(f"{file} is no valid tokenizer: {problem}") from None
    # Lengths are this project's business; a setting in the file would cut or pad in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file, error=BundleError) if file.is_file() else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by role; files hold each as a text or as an object with its content."""
    tokens = {}
    for role in _ROLES:
        value = settings.get(role)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            tokens[role] = text
    return tokens


def _chat_template(
    place: Path, settings: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    file = place / "chat_template.jinja"
    if file.is_file():
        source: str | None = file.read_text(encoding="utf-8")
    else:
        source = template_source(settings.get("chat_template"))
    return None if source is None else ChatTemplate(source, special_tokens)


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def _max_length(config: Mapping[str, Any], settings: Mapping[str, Any]) -> int | None:
    limits = [config[name] for name in _POSITIONS if isinstance(config.get(name), int)][:1]
    own = settings.get("model_max_length")
    if isinstance(own, int | float) and own < _NO_LIMIT:
        limits.append(int(own))
    return min(limits, default=None)
