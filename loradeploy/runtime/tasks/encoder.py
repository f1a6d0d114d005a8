"""Batches of texts as feeds of an encoder's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    NO_PADDING,
    TOKEN_TYPE_IDS,
)
from loradeploy.bundle.text.pairs import pair_tokens
from loradeploy.errors import RunError, UsageError, shown
from loradeploy.given_numbers import checked_count
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters, each_row, is_list
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.leased import leased_batches
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.text.padding import pad
from loradeploy.runtime.text.sides import TextSide

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Tokens(Protocol):
    """The tokens of a text or of a part of one: a row of a batch."""

    @property
    def ids(self) -> Sequence[int]:
        """The token ids."""

    @property
    def types(self) -> Sequence[int] | None:
        """The token types; None if all are 0."""


_Tokens = TypeVar("_Tokens", bound=Tokens)


@dataclass(frozen=True)
class PlainTokens:
    """Tokens without further information."""

    ids: Sequence[int]
    types: Sequence[int] | None = None


@dataclass(frozen=True)
class TextRow(Generic[_Tokens]):
    """A row of a batch: a text, or a part of it, as tokens of its adapter's tokenizer.

    `text`: the index of the text.
    """

    text: int
    adapter: AdapterSpec | None
    side: TextSide
    tokens: _Tokens


@dataclass(frozen=True)
class Batch(Generic[_Tokens]):
    """Rows, their leased adapters, feeds [rows, sequence] and mask [rows, sequence]."""

    held: HeldAdapters
    rows: Sequence[TextRow[_Tokens]]
    feeds: dict[str, NDArray[Any]]
    mask: NDArray[np.int64]


def encoded_batches(
    session: AdapterSession,
    texts: Sequence[Any],
    adapters: Adapters,
    batch_size: int,
    encode: Callable[[Any, TextSide], Sequence[_Tokens]],
) -> Iterator[Batch[_Tokens]]:
    """Yield the `texts` in batches, in their order.

    The text settings and the factors of a row are of the same version of its adapter: if the
    adapter was replaced in between, the text is encoded again.

    `encode`: encodes a text with its adapter's text settings to one row of a batch, or to no row,
    or to several for a text in parts, which share a batch. Rows are padded on the right. If padding
    would change results (`padding` in the manifest), all rows of a batch have one length. If the
    graph's length is fixed, all rows have it.

    Raises:
        UsageError: not one adapter for each text, a batch size below 1, or a text without tokens.
    """
    batch_size = checked_count("batch_size", batch_size)
    names = each_row(adapters, len(texts))
    inputs = {spec.name for spec in session.manifest.inputs}
    full = fixed_length(session)
    encoded = [
        _encoded(session, number, text, name, encode)
        for number, (text, name) in enumerate(zip(texts, names, strict=True))
    ]
    pad_id = session.texts.base.tokenizer.pad_id
    alike = session.manifest.padding == NO_PADDING

    def again(part: Sequence[_Encoded[_Tokens]]) -> Iterator[Sequence[_Encoded[_Tokens]]]:
        read = [_encoded(session, t.number, t.text, t.adapter, encode) for t in part]
        return _parts(read, batch_size, alike=alike)

    for part, held in leased_batches(
        session,
        _parts(encoded, batch_size, alike=alike),
        lambda part: [row.adapter for text in part for row in text.rows],
        again,
    ):
        rows = [row for text in part for row in text.rows]
        ids, mask = pad([row.tokens.ids for row in rows], pad_id, left=False, length=full)
        types = [row.tokens.types or [0] * len(row.tokens.ids) for row in rows]
        made: dict[str, NDArray[Any]] = {
            INPUT_IDS: ids,
            ATTENTION_MASK: mask,
            TOKEN_TYPE_IDS: pad(types, 0, left=False, length=full)[0],
        }
        feeds = {name: values for name, values in made.items() if name in inputs}
        yield Batch(held, rows, feeds, mask)


def fixed_length(session: AdapterSession) -> int | None:
    """The fixed number of tokens of every row of the graph, or None."""
    sizes = [spec.shape[1] for spec in session.manifest.inputs if spec.name == INPUT_IDS]
    return next((size for size in sizes if isinstance(size, int)), None)


Pair = tuple[str, str]


def given_texts(texts: str | Sequence[str]) -> Sequence[str]:
    """The texts as a sequence, from one text or several.

    Raises:
        UsageError: there are no texts, or an item is not a text.
    """
    given = given_texts_or_pairs(texts)
    for number, text in enumerate(given, start=1):
        if not isinstance(text, str):
            raise UsageError(
                f"text {number} is a pair {shown(text)}: sequence classifiers take pairs"
            )
    return [text for text in given if isinstance(text, str)]


def given_texts_or_pairs(texts: str | Sequence[str | Pair]) -> Sequence[str | Pair]:
    """The texts and pairs of texts as a sequence, from one text or several.

    Raises:
        UsageError: there are none, or an item is neither a text nor a pair of texts.
    """
    given = [texts] if isinstance(texts, str) else texts
    if not is_list(given):
        raise UsageError(f"the texts are {shown(texts)}: give a text, or a list of them")
    if not len(given):
        raise UsageError("there are no texts")
    found: list[str | Pair] = []
    for number, text in enumerate(given, start=1):
        if isinstance(text, list | tuple) and len(text) == 2:
            first, second = text
            if not (isinstance(first, str) and isinstance(second, str)):
                raise UsageError(f"text {number} is {shown(text)}: a pair is of two str")
            found.append((first, second))
        elif isinstance(text, str):
            found.append(text)
        else:
            raise UsageError(f"text {number} is {shown(text)}: give a str")
    return found


def takes_types(session: AdapterSession) -> bool:
    """Whether the graph takes token types."""
    return any(spec.name == TOKEN_TYPE_IDS for spec in session.manifest.inputs)


def chosen_prompt(prompts: Mapping[str, str], default: str | None, name: str | None) -> str:
    """The text of the prompt `name`, by default of that named `default`; empty without both.

    Raises:
        UsageError: no prompt has this name.
    """
    if name is None:
        return "" if default is None else prompts[default]
    if not isinstance(name, str) or name not in prompts:
        known = ", ".join(prompts) or "none"
        raise UsageError(f"no prompt is named {shown(name)}; there are: {known}")
    return prompts[name]


def encode_texts_or_pairs(
    session: AdapterSession,
) -> Callable[[str | Pair, TextSide], Sequence[Tokens]]:
    """Return a function that encodes a text or a pair to one row, truncated to the maximum."""
    typed = takes_types(session)

    def encode(text: str | Pair, side: TextSide) -> Sequence[Tokens]:
        tokenizer, longest = side.tokenizer, side.tokenizer.max_length
        if isinstance(text, str):
            return [PlainTokens(tokenizer.encode(text, max_length=longest))]
        return [pair_tokens(tokenizer, *text, max_length=longest, typed=typed)]

    return encode


def check_answer(values: NDArray[Any], row: TextRow[Any]) -> None:
    """Raise RunError unless the graph's outputs `values` for `row` are finite."""
    if not np.isfinite(values).all():
        raise RunError(
            f"text {row.text + 1}: the graph gave numbers that are not finite: run `loradeploy"
            " parity` on the bundle and the adapter"
        )


@dataclass(frozen=True)
class _Encoded(Generic[_Tokens]):
    """A text encoded to rows. `counts`: `TextSides.counts` when it was encoded."""

    number: int
    text: Any
    adapter: AdapterSpec | None
    counts: tuple[int, ...]
    rows: Sequence[TextRow[_Tokens]]


def _encoded(
    session: AdapterSession,
    number: int,
    text: Any,
    adapter: AdapterSpec | None,
    encode: Callable[[Any, TextSide], Sequence[_Tokens]],
) -> _Encoded[_Tokens]:
    counts = session.texts.counts(adapter)
    side = session.texts.of(adapter)
    rows = [TextRow(number, adapter, side, tokens) for tokens in encode(text, side)]
    if any(not row.tokens.ids for row in rows):
        raise UsageError(f"text {number + 1} ({shown(text)}) has no tokens")
    return _Encoded(number, text, adapter, counts, rows)


def _parts(
    texts: Sequence[_Encoded[_Tokens]], size: int, *, alike: bool
) -> Iterator[Sequence[_Encoded[_Tokens]]]:
    """Batches of texts in their order, of at most `size` rows, unless a single text has more.

    `alike`: whether all rows of a batch must have one length.
    """
    part: list[_Encoded[_Tokens]] = []
    for text in texts:
        rows = sum(len(one.rows) for one in part)
        lengths = {len(row.tokens.ids) for one in (*part, text) for row in one.rows}
        if part and (rows + len(text.rows) > size or (alike and len(lengths) > 1)):
            yield part
            part = []
        part.append(text)
    if part:
        yield part
