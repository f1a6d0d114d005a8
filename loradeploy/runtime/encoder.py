"""Texts as the feeds of an encoder's graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.names import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from loradeploy.errors import UsageError
from loradeploy.runtime.resident import AdapterSpec
from loradeploy.runtime.session import Adapters, AdapterSession, HeldAdapters, each_row
from loradeploy.runtime.tokenizer import Tokenizer, pad

if TYPE_CHECKING:
    from numpy.typing import NDArray


def encoded_batches(
    session: AdapterSession,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    adapters: Adapters,
    batch_size: int,
) -> Iterator[tuple[HeldAdapters, list[AdapterSpec | None], dict[str, NDArray[Any]]]]:
    """The texts in batches: the adapters held for a batch, their names by row, and the feeds.

    Texts are padded on the right, and cut at the model's positions; special tokens stay.

    Raises:
        UsageError: no texts, not one adapter for each, or a batch size below 1.
    """
    given = [texts] if isinstance(texts, str) else list(texts)
    if not given:
        raise UsageError("there are no texts")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: give 1 or more")
    names = each_row(adapters, len(given))
    inputs = {spec.name for spec in session.manifest.inputs}
    for start in range(0, len(given), batch_size):
        part = slice(start, start + batch_size)
        ids, mask = pad(
            [tokenizer.encode(text, max_length=tokenizer.max_length) for text in given[part]],
            tokenizer.pad_id,
            left=False,
        )
        feeds = {INPUT_IDS: ids, ATTENTION_MASK: mask}
        if TOKEN_TYPE_IDS in inputs:
            feeds[TOKEN_TYPE_IDS] = np.zeros_like(ids)
        with session.hold(names[part]) as held:
            yield held, names[part], feeds
