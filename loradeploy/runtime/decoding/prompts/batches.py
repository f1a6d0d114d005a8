"""Batches of texts that can share a run, with their adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from loradeploy.bundle.names import NO_PADDING
from loradeploy.runtime.decoding.prompts.reading import ReadText
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.leased import leased_batches
from loradeploy.runtime.session import AdapterSession

_T = TypeVar("_T", bound=ReadText)


def batches(
    session: AdapterSession, texts: Sequence[_T], size: int, again: Callable[[int], _T]
) -> Iterator[tuple[Sequence[_T], HeldAdapters]]:
    """Yield texts that can share a run, with their adapters.

    `again`: encodes a text again if its adapter was replaced after the text was encoded.
    """
    for start in range(0, len(texts), size):
        yield from leased_batches(
            session,
            _shareable(session, texts[start : start + size]),
            lambda together: [text.adapter for text in together],
            lambda together: _shareable(session, [again(text.number) for text in together]),
        )


def _shareable(session: AdapterSession, texts: Sequence[_T]) -> list[list[_T]]:
    """Group texts that can share a run: those of equal length, if padding changes results."""
    if session.manifest.padding != NO_PADDING:
        return [list(texts)]
    by_length: dict[int, list[_T]] = {}
    for text in texts:
        by_length.setdefault(len(text.ids), []).append(text)
    return list(by_length.values())
