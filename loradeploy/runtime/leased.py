"""Pair batches of texts with their adapters, both of one version even if an adapter is reloaded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.session import AdapterSession


class EncodedText(Protocol):
    """A text, encoded with the tokenizer and template of its adapter."""

    @property
    def adapter(self) -> AdapterSpec | None:
        """Its adapter."""

    @property
    def counts(self) -> tuple[int, ...]:
        """`TextSides.counts` of the adapter when the text was encoded."""


_Text = TypeVar("_Text", bound=EncodedText)


def leased_batches(
    session: AdapterSession,
    batches: Iterable[Sequence[_Text]],
    rows: Callable[[Sequence[_Text]], Sequence[AdapterSpec | None]],
    again: Callable[[Sequence[_Text]], Iterable[Sequence[_Text]]],
) -> Iterator[tuple[Sequence[_Text], HeldAdapters]]:
    """Yield each batch of texts with the adapters that the texts were encoded for.

    `rows`: returns the adapters of a batch's rows; a batch without rows is skipped. `again`:
    encodes the texts of a batch again, into batches; called if an adapter was replaced after its
    texts were encoded and before its factors were leased.
    """
    waiting = deque(batches)
    while waiting:
        batch = waiting.popleft()
        adapters = rows(batch)
        if not adapters:
            continue
        with session.hold(adapters) as held:
            replaced = any(session.texts.have_moved(text.adapter, text.counts) for text in batch)
            if not replaced:
                yield batch, held
        if replaced:
            waiting.extendleft(reversed(list(again(batch))))
