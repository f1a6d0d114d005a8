"""Rows of a batch: their cache, and the runs that extend it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.names import ATTENTION_MASK
from loradeploy.runtime.cache import span_of
from loradeploy.runtime.decoding.caches.parts import parts_of
from loradeploy.runtime.decoding.caches.protocols import Past, RowAdapters

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.runtime.decoding.caches.source import EncodedSource
    from loradeploy.runtime.decoding.graph import DecoderGraph, NewTokens, TokenEmbeds


class UncachedRows:
    """Rows of a graph without a cache, which every run processes from the first token."""

    def __init__(self, graph: DecoderGraph, rows: int) -> None:
        self._graph = graph
        self.count = rows

    def read(self, adapters: RowAdapters, new: NewTokens) -> NDArray[Any]:
        """See `Rows.read`; the rows are complete."""
        (logits,) = adapters.run_with_ort_values(
            (self._graph.output,), self._graph.feeds(new.ids, new.mask, new.ends), buffers={}
        )
        return logits_at(logits, new.ends)

    def move(self, parents: Sequence[int]) -> list[int]:
        """See `Rows.move`."""
        self.count = len(parents)
        return list(range(self.count))


class CachedRows:
    """Rows with a cache that each run returns, or updates in place.

    An ended row may stay and be fed padding, which takes no position, because moving the cache
    costs more than running such a row. `most`: maximum number of positions of a row, if known.
    `source`: for an encoder-decoder, the encoder's outputs for the rows.
    """

    def __init__(
        self,
        graph: DecoderGraph,
        rows: int,
        most: int | None = None,
        source: EncodedSource | None = None,
    ) -> None:
        self._graph = graph
        self._most = most
        self._source = source
        self._cache = graph.session.empty_cache(max(rows, 1))
        self._mask = np.zeros((rows, 0), np.int64)
        self._shifts = graph.shifts(rows)  # of positions after images

    @property
    def count(self) -> int:
        """See `Rows.count`."""
        return len(self._mask)

    def read(self, adapters: RowAdapters, new: NewTokens) -> NDArray[Any]:
        """See `Rows.read`; a long prompt is processed in several runs."""
        *earlier, last = parts_of(self._graph, new.mask)
        if not earlier:
            return self._run(adapters, new)
        # Allocate once, since growing a buffer copies it.
        self._cache.make_room(self._mask.shape[1] + new.mask.shape[1], self._most)
        for part in earlier:
            self._run(adapters, new.part(part))
        return self._run(adapters, new.part(last))

    def _run(self, adapters: RowAdapters, new: NewTokens) -> NDArray[Any]:
        """Run once, and add the tokens to the cache."""
        self._mask = np.concatenate([self._mask, new.mask], axis=1)
        cache = self._cache
        cache.make_room(self._mask.shape[1], self._most)
        logits, *present = adapters.run_with_ort_values(
            (self._graph.output, *cache.outputs),
            {
                **self._fed(new),
                **cache.inputs,
                **({} if self._source is None else self._source.inputs),
            },
            buffers=cache.buffers,
        )
        cache.keep(present)
        return logits_at(logits, new.ends)

    def _fed(self, new: NewTokens) -> dict[str, Any]:
        feeds = self._graph.feeds(new.ids, self._mask, new.ends, self._shifts)
        if ATTENTION_MASK in feeds:
            feeds[ATTENTION_MASK] = self._cache.step_mask(feeds[ATTENTION_MASK], new.ids.shape[1])
        return feeds

    def move(self, parents: Sequence[int]) -> list[int]:
        """See `Rows.move`."""
        if not parents:
            self._cache.release()
            self._cache = self._graph.session.empty_cache(1)
            self._mask, self._shifts = np.zeros((0, 0), np.int64), np.zeros(0, np.int64)
            return []
        apart = all(a < b for a, b in itertools.pairwise(parents))
        if not apart or 2 * len(parents) <= self.count:
            self._cache.take_rows(parents)
            if self._source is not None:
                self._source.take_rows(parents)
            self._mask = self._mask[list(parents)]
            self._shifts = self._shifts[list(parents)]
            return list(range(len(parents)))
        return list(parents)

    def begin(self, count: int, embeds: Sequence[TokenEmbeds | None] = ()) -> CachedReading:
        """See `RowsBeside.begin`."""
        return CachedReading(self, CachedRows(self._graph.with_embeds(embeds), count))

    def load(self, past: Past) -> None:
        """Load keys and values into the only row, as if it had processed the tokens."""
        self._cache.fill([part[np.newaxis] for part in past])
        self._mask = np.ones((1, past[0].shape[1]), np.int64)
        self._shifts = np.zeros(1, np.int64)

    def past(self, row: int) -> Past:
        """The keys and values of a row."""
        positions = span_of(np.flatnonzero(self._mask[row]))
        return [value.numpy()[row][:, positions] for value in self._cache.inputs.values()]

    def take(self, rows: Sequence[int], other: CachedRows, joining: Sequence[int]) -> list[int]:
        """Continue with `rows` and the rows `joining` of `other`; return where they are.

        Positions that no row uses are dropped.
        """
        mine = self._mask[list(rows)].sum(axis=1)
        theirs = [np.flatnonzero(other._mask[row]) for row in joining]
        width = int(mine.max(initial=0))
        taken = list(zip(joining, theirs, strict=True))
        self._cache.join(rows, width, other._cache, taken, self._graph.left)
        lengths = np.concatenate([mine, np.array([len(one) for one in theirs], np.int64)])
        columns = np.arange(int(lengths.max()))
        if self._graph.left:
            columns = columns[::-1]
        self._mask = (columns < lengths[:, np.newaxis]).astype(np.int64)
        self._shifts = np.concatenate([self._shifts[list(rows)], other._shifts[list(joining)]])
        return list(range(self.count))


class CachedReading:
    """Prompts that are processed in separate rows, and then copied into those of a batch."""

    def __init__(self, into: CachedRows, own: CachedRows) -> None:
        self._into, self._own = into, own

    @property
    def count(self) -> int:
        """See `Reading.count`."""
        return self._own.count

    def load(self, past: Past) -> None:
        """See `Reading.load`."""
        self._own.load(past)

    def past(self, row: int) -> Past:
        """See `Reading.past`."""
        return self._own.past(row)

    def read(self, adapters: RowAdapters, new: NewTokens) -> NDArray[Any]:
        """See `Rows.read`."""
        return self._own.read(adapters, new)

    def join(self, rows: Sequence[int], joining: Sequence[int]) -> list[int]:
        """See `Reading.join`."""
        return self._into.take(rows, self._own, joining)

    def close(self) -> None:
        """See `Reading.close`; the rows are released with this object."""


def logits_at(logits: onnxruntime.OrtValue, ends: NDArray[np.int64]) -> NDArray[Any]:
    """The logits at `ends`, from [rows, tokens, vocabulary] or those of the last tokens only."""
    scores = logits.numpy()
    if scores.ndim == 2:
        scores = scores[:, np.newaxis]
    if scores.shape[1] == 1:  # a step, or a graph that returns only the last position
        only: NDArray[Any] = scores[:, 0]
        return only
    last: NDArray[Any] = scores[np.arange(len(scores)), ends]
    return last
