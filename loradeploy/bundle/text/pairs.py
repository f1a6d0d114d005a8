"""Tokenize pairs of texts, truncated and joined as in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loradeploy.errors import BundleError, UsageError

if TYPE_CHECKING:
    from loradeploy.bundle.text.tokenizer import Tokenizer

_SECOND: Final = 1  # the number of a pair's second text in the library's `sequence_ids`


@dataclass(frozen=True)
class PairTokens:
    """A pair of texts in one row, special tokens included.

    `ids`: the token ids. `types`: their token types, None if all are 0.
    """

    ids: Sequence[int]
    types: Sequence[int] | None


def pair_tokens(
    tokenizer: Tokenizer, text: str, pair: str, *, max_length: int | None, typed: bool = True
) -> PairTokens:
    """`text` and `pair` as one row. If it exceeds `max_length`, the longer text is cut first.

    Equals transformers' `tokenizer(text, pair, truncation="longest_first")`. `typed`: whether the
    model takes token types.

    Raises:
        UsageError: one of them is not a text, or the special tokens fill `max_length`.
        BundleError: the tokenizer fails on them, or does not declare whether it has token types.
    """
    if typed and tokenizer.token_types is None:
        raise BundleError(
            "tokenizer_config.json has no `model_input_names`, so whether a pair has token types is"
            " unknown: export again"
        )
    with tokenizer.library(text, pair) as library:
        whole = library.encode(text, pair)
        cut = whole
        if max_length is not None and len(whole) > max_length:
            around = library.num_special_tokens_to_add(True)
            if around >= max_length:
                raise UsageError(
                    f"a pair has {around} special tokens, and the model takes {max_length} tokens"
                )
            first, second = (
                library.encode(part, add_special_tokens=False) for part in (text, pair)
            )
            lengths = _longest_first(len(first), len(second), max_length - around)
            for part, length in zip((first, second), lengths, strict=True):
                part.truncate(length, direction=tokenizer.truncation_side)
            cut = library.post_process(first, second)
    if not typed or not tokenizer.token_types:
        return PairTokens(cut.ids, None)
    types = cut.type_ids
    if cut is not whole:
        # If the tokenizer has no rules for pairs, post_process loses the types of the second text.
        marks = zip(whole.type_ids, whole.sequence_ids, strict=True)
        second_type = next((type_ for type_, number in marks if number == _SECOND), 0)
        types = [
            second_type if number == _SECOND else type_
            for type_, number in zip(types, cut.sequence_ids, strict=True)
        ]
    return PairTokens(cut.ids, types)


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """The numbers of tokens to keep of both texts, as the library's longest_first for `room`."""
    shorter, longer = sorted((first, second))
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room // 2 + room % 2
    return (longer, shorter) if first > second else (shorter, longer)
