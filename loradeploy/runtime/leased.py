"""Batches of texts with their adapters held: both of one moment, however names are reloaded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.session import AdapterSession


class EncodedText(Protocol):
    """A text as its adapter reads it."""

    @property
    def adapter(self) -> AdapterSpec | None:
        """Its adapter."""

    @property
    def counts(self) -> tuple[int, ...]:
        """How often the adapter had changed when the text was read (`TextSides.counts`)."""


_Text = TypeVar("_Text", bound=EncodedText)


def leased_batches(
    session: AdapterSession,
    batches: Iterable[Sequence[_Text]],
    rows: Callable[[Sequence[_Text]], Sequence[AdapterSpec | None]],
    again: Callable[[Sequence[_Text]], Iterable[Sequence[_Text]]],
) -> Iterator[tuple[Sequence[_Text], HeldAdapters]]:
    """Each batch of texts with the adapters that they were read for.

    `rows`: the adapters of a batch's rows; a batch without any is left out. `again`: the texts of a
    batch read again, where an adapter was replaced between its texts and its factors.
    """
    waiting = deque(batches)
    while waiting:
        batch = waiting.popleft()
        adapters = rows(batch)
        if not adapters:
            continue
        with session.hold(adapters) as held:
            moved = any(session.texts.have_moved(text.adapter, text.counts) for text in batch)
            if not moved:
                yield batch, held
        if moved:
            waiting.extendleft(reversed(list(again(batch))))
