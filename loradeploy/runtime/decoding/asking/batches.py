"""Which texts share a run, and the adapters that they are run with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from loradeploy.bundle.names import NO_PADDING
from loradeploy.runtime.decoding.asking.reading import ReadText
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.leased import leased_batches
from loradeploy.runtime.session import AdapterSession

_T = TypeVar("_T", bound=ReadText)


def batches(
    session: AdapterSession, texts: Sequence[_T], size: int, again: Callable[[int], _T]
) -> Iterator[tuple[Sequence[_T], HeldAdapters]]:
    """Texts that may share a run, with their adapters; `again` reads one whose adapter was
    replaced between its texts and its factors."""
    for start in range(0, len(texts), size):
        yield from leased_batches(
            session,
            _together(session, texts[start : start + size]),
            lambda together: [text.adapter for text in together],
            lambda together: _together(session, [again(text.number) for text in together]),
        )


def _together(session: AdapterSession, texts: Sequence[_T]) -> list[list[_T]]:
    """The texts that may share a run: those of one length, where padding changes answers."""
    if session.manifest.padding != NO_PADDING:
        return [list(texts)]
    by_length: dict[int, list[_T]] = {}
    for text in texts:
        by_length.setdefault(len(text.ids), []).append(text)
    return list(by_length.values())
