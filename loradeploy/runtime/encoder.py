"""Texts as the feeds of an encoder's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    NO_PADDING,
    TOKEN_TYPE_IDS,
)
from loradeploy.errors import UsageError, shown
from loradeploy.runtime.resident import AdapterSpec
from loradeploy.runtime.session import (
    Adapters,
    AdapterSession,
    HeldAdapters,
    check_count,
    each_row,
)
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
    tuple[HeldAdapters, list[AdapterSpec | None], dict[str, NDArray[Any]], NDArray[np.int64]]
]:
    """The texts in batches, in their order: adapters held for a batch, names by row, feeds, mask.

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
    encoded = [
        encode(text, session.texts.of(name)) for text, name in zip(given, names, strict=True)
    ]
    pad_id = session.texts.base.tokenizer.pad_id
    for part in _parts(encoded, batch_size, alike=session.manifest.padding == NO_PADDING):
        ids, mask = pad(encoded[part], pad_id, left=False)
        made: dict[str, NDArray[Any]] = {
            INPUT_IDS: ids,
            ATTENTION_MASK: mask,
            TOKEN_TYPE_IDS: np.zeros_like(ids),
        }
        feeds = {name: values for name, values in made.items() if name in inputs}
        with session.hold(names[part]) as held:
            yield held, names[part], feeds, mask


def _parts(encoded: Sequence[Sequence[int]], size: int, *, alike: bool) -> Iterator[slice]:
    """Batches of at most `size` rows in their order, those of one length where they are `alike`."""
    start = 0
    for stop in range(1, len(encoded) + 1):
        ends = stop == len(encoded) or stop - start == size
        if ends or (alike and len(encoded[stop]) != len(encoded[start])):
            yield slice(start, stop)
            start = stop
