"""Tokenize texts with character positions; long texts are split into overlapping parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loradeploy.errors import UsageError, shown

if TYPE_CHECKING:
    from loradeploy.bundle.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextPart:
    """The tokens of a text or of a part of it. All fields have the same length.

    `words`: the tokens as strings of the vocabulary. `spans`: the beginning and end of each in the
    text, in characters. `special`: whether each is a special token, which is not part of the text.
    """

    ids: Sequence[int]
    types: Sequence[int]
    words: Sequence[str]
    spans: Sequence[tuple[int, int]]
    special: Sequence[bool]


def text_parts(
    tokenizer: Tokenizer, text: str, *, max_length: int | None, stride: int | None
) -> list[TextPart]:
    """The tokens of `text` with special tokens around them: one part, or none without tokens.

    A text of more than `max_length` tokens is split into parts. Each begins `stride` tokens before
    the end of the previous one.

    Raises:
        UsageError: it is longer and `stride` is not given, or `stride` leaves no room for new
            tokens.
    """
    with tokenizer.library(text) as library:
        encoding = library.encode(text, add_special_tokens=False)
        count = len(encoding)
        if max_length is not None:
            room = max_length - library.num_special_tokens_to_add(False)
            if count > room and stride is None:
                raise UsageError(
                    f"the text {shown(text)} has {count} tokens, and the model takes {room}: give"
                    " `stride`, which cuts it into parts that overlap by that many tokens"
                )
            if stride is not None and not 0 <= stride < room:
                raise UsageError(f"`stride` is {stride}: give 0 to {room - 1} tokens")
            encoding.truncate(max(room, 0), stride=stride or 0)
        whole = library.post_process(encoding, add_special_tokens=True)
    return [_part(part) for part in (whole, *whole.overflowing) if len(part)]


def _part(encoding: Any) -> TextPart:
    return TextPart(
        ids=encoding.ids,
        types=encoding.type_ids,
        words=encoding.tokens,
        spans=encoding.offsets,
        special=[bool(mark) for mark in encoding.special_tokens_mask],
    )


def is_subword_by_prefix(tokenizer: Tokenizer, part: TextPart, index: int) -> bool | None:
    """Whether a token continues the word before it; None if the vocabulary does not mark this.

    Vocabularies such as BERT's mark it with a prefix (##), which makes the token longer than its
    text.
    """
    with tokenizer.library() as library:
        if not getattr(library.model, "continuing_subword_prefix", None):
            return None
    start, end = part.spans[index]
    return len(part.words[index]) != end - start


def joined(tokenizer: Tokenizer, words: Sequence[str]) -> str:
    """The text of `words`, tokens as strings of the vocabulary."""
    with tokenizer.library() as library:
        if library.decoder is None:
            return " ".join(words)
        text: str = library.decoder.decode(list(words))
    return text
