"""Texts as the feeds of an encoder's graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    NO_PADDING,
    TOKEN_TYPE_IDS,
)
from loradeploy.errors import UsageError, shown
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters, check_count, each_row
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.texts import TextSide
from loradeploy.runtime.tokenizer import pad

if TYPE_CHECKING:
    from numpy.typing import NDArray


def encoded_batches(
    session: AdapterSession,
    texts: str | Sequence[str],
    adapters: Adapters,
    batch_size: int,
    encode: Callable[[str, TextSide], list[int]],
) -> Iterator[
    tuple[
        HeldAdapters,
        list[tuple[AdapterSpec | None, TextSide]],
        dict[str, NDArray[Any]],
        NDArray[np.int64],
    ]
]:
    """The texts in batches, in their order: adapters held for a batch, each row's, feeds, mask.

    A row's adapter comes with the side that its text was encoded with, which is of the same one as
    the factors that are held: where it was replaced meanwhile, the text is encoded again.

    `encode` makes tokens of a text as its adapter wants it. Texts are padded on the right. Where
    padding would change the answer (`padding` in the manifest), a batch is of one length.

    Raises:
        UsageError: no texts, not one adapter for each, or a batch size below 1.
    """
    given = [texts] if isinstance(texts, str) else texts
    if not isinstance(given, list | tuple | np.ndarray):
        raise UsageError(f"the texts are {shown(texts)}: give a text, or a list of them")
    if not len(given):
        raise UsageError("there are no texts")
    for number, text in enumerate(given, start=1):
        if not isinstance(text, str):
            raise UsageError(f"text {number} is {shown(text)}: give a str")
    check_count("batch_size", batch_size)
    names = each_row(adapters, len(given))
    inputs = {spec.name for spec in session.manifest.inputs}
    rows = [_encoded(session, text, name, encode) for text, name in zip(given, names, strict=True)]
    pad_id = session.texts.base.tokenizer.pad_id
    alike = session.manifest.padding == NO_PADDING
    waiting = deque(_parts(rows, batch_size, alike=alike))
    while waiting:
        part = waiting.popleft()
        ids, mask = pad([row.ids for row in part], pad_id, left=False)
        made: dict[str, NDArray[Any]] = {
            INPUT_IDS: ids,
            ATTENTION_MASK: mask,
            TOKEN_TYPE_IDS: np.zeros_like(ids),
        }
        feeds = {name: values for name, values in made.items() if name in inputs}
        with session.hold([row.adapter for row in part]) as held:
            moved = any(session.texts.have_moved(row.adapter, row.counts) for row in part)
            if not moved:
                yield held, [(row.adapter, row.side) for row in part], feeds, mask
        if moved:
            part = [_encoded(session, row.text, row.adapter, encode) for row in part]
            waiting.extendleft(reversed(list(_parts(part, batch_size, alike=alike))))


@dataclass(frozen=True)
class _Row:
    """A text as tokens of the side that its adapter had at its `counts` of changes."""

    text: str
    adapter: AdapterSpec | None
    counts: tuple[int, ...]
    side: TextSide
    ids: list[int]


def _encoded(
    session: AdapterSession,
    text: str,
    adapter: AdapterSpec | None,
    encode: Callable[[str, TextSide], list[int]],
) -> _Row:
    counts = session.texts.counts(adapter)
    side = session.texts.of(adapter)
    return _Row(text, adapter, counts, side, encode(text, side))


def _parts(rows: Sequence[_Row], size: int, *, alike: bool) -> Iterator[Sequence[_Row]]:
    """Batches of at most `size` rows in their order, those of one length where they are `alike`."""
    start = 0
    for stop in range(1, len(rows) + 1):
        ends = stop == len(rows) or stop - start == size
        if ends or (alike and len(rows[stop].ids) != len(rows[start].ids)):
            yield rows[start:stop]
            start = stop
