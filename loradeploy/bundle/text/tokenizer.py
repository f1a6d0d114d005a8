"""Convert text to token ids and back with the files of a bundle or adapter, without transformers.

Trainers also write tokenizer files (tokenizer_files.py) beside an adapter. These replace the base's
files: prompts have the format that the adapter was trained with, and texts end with the tokens that
it was trained to end with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as FastTokenizer

from loradeploy.bundle.names import CONFIG_NAME, TOKEN_TYPE_IDS
from loradeploy.bundle.text.chat import ChatTemplate, Message
from loradeploy.bundle.text.settings import GenerationSettings, read_settings
from loradeploy.bundle.text.tokenizer_files import (
    ADDED_NAME,
    GENERATION_NAME,
    INPUT_NAMES,
    SETTINGS_NAME,
    SPECIAL_NAME,
    SPLIT_NAME,
    TOKENIZER_NAME,
    chat_template_of,
    max_length_of,
    positions_of_model,
    roles_without_token,
    special_tokens_of,
    token_ids,
)
from loradeploy.bundle.text.tokenizer_library import library_errors, open_tokenizer
from loradeploy.errors import (
    AdapterMismatchError,
    BundleError,
    UsageError,
    shortened,
    shown,
)
from loradeploy.files import optional_json

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
# Characters per token of the counted beginning of a long text; usual texts have 1 to 5.
_COUNTED: Final = 8
# A placeholder for an answer, to find what a template writes after answers.
_ANSWER: Final = "⟦answer⟧"


class Tokenizer:
    """The tokenizer of a bundle, or of any directory with a checkpoint's tokenizer files.

    With `base`, it is an adapter's: files in `directory` replace the base's, and the base's are
    used for missing ones. `lowercase`: whether texts are lowercased first.

    `special_tokens`: the special tokens by role (`bos_token`, …).
    `eos_ids`: the tokens that end a text. An adapter's are those of its generation_config.json, or
    else the base's; plus its tokenizer's end-of-text token and its chat template's end-of-turn
    token, if these differ from the base's.
    `pad_id`: the token that fills rows up. It has no effect if the model uses the attention mask.
    `positions`: the number of tokens that the model has positions for; `max_length`: the maximum
    number of tokens to use. None if no file states it.
    `truncation_side`: "right" or "left", the side on which texts that are too long are cut.
    `token_types`: whether the model takes the token types of pairs; None if no file states it.
    `settings`: the settings of generation.
    `template`: the source of the chat template, None if there is none.
    `own_words`: whether an adapter's vocabulary or rules differ from the base's.

    Raises:
        BundleError: a file is missing or invalid.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        base: Tokenizer | None = None,
        *,
        lowercase: bool = False,
    ) -> None:
        path = Path(directory)
        settings = optional_json(path / SETTINGS_NAME, error=BundleError)
        config = {} if base is not None else optional_json(path / CONFIG_NAME, error=BundleError)
        generation = optional_json(path / GENERATION_NAME, error=BundleError)
        self._directory = path
        self._base = base
        self._tokenizer = _words(path, base)
        named_tokens = optional_json(path / SPECIAL_NAME, error=BundleError) | settings
        inherited = {} if base is None else base.special_tokens
        if (path / TOKENIZER_NAME).exists():
            lacking = roles_without_token(named_tokens)
            inherited = {role: inherited[role] for role in inherited if role not in lacking}
        self.special_tokens: dict[str, str] = {**inherited, **special_tokens_of(named_tokens)}
        self._mark_special()
        self._split_special(settings.get(SPLIT_NAME))
        if base is not None and self._tokenizes_like(base):
            self._tokenizer = base._tokenizer
        self.own_words = base is not None and self._tokenizer is not base._tokenizer
        if lowercase:
            self._lowercase()
        own_template = chat_template_of(path, settings)
        self.template: str | None = own_template or (None if base is None else base.template)
        self._chat = (
            None if self.template is None else ChatTemplate(self.template, self.special_tokens)
        )
        named = token_ids(generation, "eos_token_id", path / GENERATION_NAME)
        if base is None:
            own = token_ids(config, "eos_token_id", path / CONFIG_NAME)
            eos = named or own or self._ids_of("eos_token")
            # Decoders with a classifier find the last token by the id in config.json: use it first.
            pads = token_ids(config, "pad_token_id", path / CONFIG_NAME)
            self._pads = (*pads, *self._ids_of("pad_token"), *eos, 0)
            self.pad_id: int = self._pads[0]
            self.positions = positions_of_model(config, path / CONFIG_NAME)
            self.max_length = max_length_of(self.positions, settings, path / SETTINGS_NAME)
        else:
            eos = named or tuple(base.eos_ids)
            if self._ids_of("eos_token") != base._ids_of("eos_token"):
                eos += self._ids_of("eos_token")
            if self.template != base.template:
                eos += self._end_of_turn()
            self._pads, self.pad_id = base._pads, base.pad_id
            self.positions, self.max_length = base.positions, base.max_length
        self.eos_ids: frozenset[int] = frozenset(eos)
        side = settings.get("truncation_side", None if base is None else base.truncation_side)
        self.truncation_side: str = "left" if side == "left" else "right"
        names = settings.get(INPUT_NAMES)
        self.token_types: bool | None = (
            TOKEN_TYPE_IDS in names
            if isinstance(names, list)
            else (None if base is None else base.token_types)
        )
        self.settings: GenerationSettings = (
            base.settings
            if base is not None and not generation
            else read_settings(generation, GENERATION_NAME)
        )

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The id of every word, including added ones."""
        words: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return words

    @cached_property
    def as_text(self) -> str:
        """The vocabulary and the rules in the format of tokenizer.json."""
        text: str = self._tokenizer.to_str()
        return text

    def encode(
        self, text: str, *, special_tokens: bool = True, max_length: int | None = None
    ) -> list[int]:
        """The tokens of `text`, by default with the model's special tokens around it.

        If there are more than `max_length`, the text is cut at the end, or at the beginning if
        tokenizer_config.json has `truncation_side` "left"; the special tokens are kept.

        Raises:
            UsageError: it is not a text. BundleError: the tokenizer fails on it.
        """
        with self.library(text) as tokenizer:
            encoding = tokenizer.encode(text, add_special_tokens=False)
            if max_length is not None:
                around = tokenizer.num_special_tokens_to_add(False) if special_tokens else 0
                encoding.truncate(max(max_length - around, 0), direction=self.truncation_side)
            encoding = tokenizer.post_process(encoding, add_special_tokens=special_tokens)
            ids: list[int] = encoding.ids
        return ids

    def exceeds(self, text: str, tokens: int) -> bool:
        """Whether `text` has more than `tokens` tokens, if its beginning is enough to tell.

        Counting the tokens of a text of megabytes takes many seconds. The beginning of a text that
        is much longer than usual texts of `tokens` tokens is counted; what follows can only change
        the last ones of these. False if it is not enough, or the text is not as long.
        """
        size = _COUNTED * tokens
        if not isinstance(text, str) or len(text) <= 2 * size:
            return False
        return len(self.encode(text[:size], special_tokens=False)) > tokens + tokens // 4

    @contextmanager
    def library(self, *texts: str) -> Iterator[FastTokenizer]:
        """The library's tokenizer, to use for `texts`. It must not be changed.

        Raises:
            UsageError: one of `texts` is not a text.
            BundleError: the tokenizer fails within the context.
        """
        for text in texts:
            if not isinstance(text, str):
                raise UsageError(f"a text is {shown(text)}: give a str")
            if not text.isascii() and _SURROGATE.search(text):
                raise UsageError(
                    f"the text {shortened(ascii(text), 60)} contains half a surrogate pair, which"
                    " is not a character: decode its source as UTF-8"
                )
        with library_errors(f"the tokenizer of {self._directory} fails"):
            yield self._tokenizer

    def encode_chat(
        self, messages: Sequence[Message], write: Callable[[str], str] | None = None
    ) -> list[int]:
        """The tokens of a conversation, up to the beginning of the assistant's answer.

        `write`: a function that is applied to the rendered text before it is tokenized.

        Raises:
            UsageError: as `render_chat`, or the template omits the texts of messages.
        """
        rendered = self.render_chat(messages)
        if self._chat is not None and self._chat.reads is None:
            raise UsageError(
                f"the chat template of {self._directory} omits a user's text: give"
                " prompts without a chat"
            )
        text = rendered if write is None else write(rendered)
        return self.encode(text, special_tokens=False)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """Render the chat template with `messages`, up to the beginning of the assistant's answer.

        Raises:
            UsageError: there is no chat template, or it refuses the messages.
        """
        if self._chat is None:
            raise UsageError(f"{self._directory} has no chat template: give plain prompts")
        return self._chat.render(messages)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens.

        Raises:
            BundleError: the rules of the tokenizer fail on them.
        """
        try:
            with library_errors(f"the tokenizer of {self._directory} fails"):
                text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        except BundleError:
            if any(self.word(token) is not None for token in ids):
                raise
            return ""  # the library fails on an empty text if it has to strip spaces
        return text

    def is_special(self, token: int) -> bool:
        """Whether `token` is a special token, which has no text."""
        added = self._tokenizer.get_added_tokens_decoder().get(token)
        return added is not None and added.special

    def word(self, token: int) -> str | None:
        """The string of `token` in the vocabulary; None if `decode` skips it."""
        word: str | None = self._tokenizer.id_to_token(token)
        return None if word in self.special_words else word

    @property
    def decoder(self) -> str | None:
        """The rules that join words to text, as in tokenizer.json; None if it has none."""
        decoder = self._tokenizer.decoder
        return None if decoder is None else decoder.__getstate__().decode()

    @cached_property
    def special_words(self) -> frozenset[str]:
        """The special tokens, which `decode` skips."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    def same_words(self, other: Tokenizer) -> bool:
        """Whether both give the same tokens for every text."""
        return self._tokenizer is other._tokenizer or self._tokenizes_like(other)

    def _tokenizes_like(self, other: Tokenizer) -> bool:
        split = self._tokenizer.encode_special_tokens
        same: bool = split == other._tokenizer.encode_special_tokens
        return same and self._tokenizer.to_str() == other.as_text

    def pad_within(self, vocabulary: int) -> None:
        """Pad rows with the first padding token that the graph's vocabulary has.

        Configs name a token beyond it if one was added for padding only.
        """
        self.pad_id = next(index for index in self._pads if index < max(vocabulary, 1))

    def check_words(self, vocabulary: int) -> None:
        """Check that the graph's vocabulary has all words of an adapter.

        Exceptions are words that are used for padding only, which are never fed, and words that the
        base's tokenizer has, too.

        Raises:
            AdapterMismatchError: a word has no row in the graph's embedding.
        """
        if not self.own_words or self._base is None:
            return
        known, pad = self._base.vocabulary, self.special_tokens.get("pad_token")
        missing = sorted(
            (index, word)
            for word, index in self.vocabulary.items()
            if index >= vocabulary and known.get(word) != index and word != pad
        )
        if missing:
            index, word = missing[0]
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise AdapterMismatchError(
                f"its tokenizer has {word!r} as token {index}{more}; the graph's vocabulary ends at"
                f" {vocabulary - 1}: it was trained on a base whose embeddings were resized, export"
                " that base"
            )

    def _mark_special(self) -> None:
        """Mark special tokens in the library that only the other files declare as special."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        known = {token.content for token in added if token.special}
        marks = [
            AddedToken(token, special=True, normalized=False)
            for token in self.special_tokens.values()
            # A token that is new to the vocabulary would have no embedding.
            if token not in known and self._tokenizer.token_to_id(token) is not None
        ]
        if marks:
            self._detach()
            self._tokenizer.add_special_tokens(marks)

    def _split_special(self, split: object) -> None:
        """Apply the setting that special tokens in texts are plain characters."""
        if split is not None and bool(split) != self._tokenizer.encode_special_tokens:
            self._detach()
            self._tokenizer.encode_special_tokens = bool(split)

    def _lowercase(self) -> None:
        before = self._tokenizer.normalizer
        parts = [normalizers.Lowercase(), *([] if before is None else [before])]
        self._detach()
        self._tokenizer.normalizer = normalizers.Sequence(parts)

    def _detach(self) -> None:
        """Copy the tokenizer before a change if it is the base's."""
        if self._base is not None and self._tokenizer is self._base._tokenizer:
            split = self._tokenizer.encode_special_tokens
            self._tokenizer = FastTokenizer.from_str(self._tokenizer.to_str())
            self._tokenizer.encode_special_tokens = split

    def _end_of_turn(self) -> tuple[int, ...]:
        """The added token that the chat template writes after an answer, if there is one."""
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _ANSWER},
        ]
        if self._chat is None:
            return ()
        try:
            text = self._chat.render(messages, add_generation_prompt=False)
        except UsageError:
            return ()  # it does not accept this conversation
        _, found, rest = text.rpartition(_ANSWER)
        added = self._tokenizer.get_added_tokens_decoder()
        if self._tokenizer.encode_special_tokens:  # special tokens are not recognized in texts
            behind = {t.content: i for i, t in added.items() if rest.lstrip().startswith(t.content)}
            return (behind[max(behind, key=len)],) if found and behind else ()
        ids = self.encode(rest.lstrip(), special_tokens=False) if found else []
        return (ids[0],) if ids and ids[0] in added else ()

    def _ids_of(self, role: str) -> tuple[int, ...]:
        token = self.special_tokens.get(role)
        index = None if token is None else self._tokenizer.token_to_id(token)
        return () if index is None else (index,)


def _words(path: Path, base: Tokenizer | None) -> FastTokenizer:
    """The library's tokenizer for `path`; the base's if an adapter has none."""
    file = path / TOKENIZER_NAME
    if base is None or file.exists():
        return open_tokenizer(file)
    _check_added(path, base)
    return base._tokenizer


def _check_added(path: Path, base: Tokenizer) -> None:
    """Raise BundleError if an adapter without a tokenizer.json adds words."""
    named = dict(optional_json(path / ADDED_NAME, error=BundleError))
    decoder = optional_json(path / SETTINGS_NAME, error=BundleError).get("added_tokens_decoder")
    for index, token in decoder.items() if isinstance(decoder, Mapping) else ():
        if isinstance(token, Mapping) and index.isascii() and index.isdigit() and len(index) < 10:
            named[str(token.get("content"))] = int(index)
    unknown = sorted(word for word, index in named.items() if base.vocabulary.get(word) != index)
    if unknown:
        more = f", and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise BundleError(
            f"{path} adds the word {unknown[0]!r} as token {named[unknown[0]]}{more}, which the"
            f" base's tokenizer lacks, and has no {TOKENIZER_NAME}: save its tokenizer there with"
            " transformers"
        )
