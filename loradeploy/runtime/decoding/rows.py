"""What the rows of a batch have read: their cache, and how a run reads more.

A run reads `ids` [rows, new]; in each row those count whose `mask` is 1, the last of them at `end`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from loradeploy.bundle.names import ATTENTION_MASK

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.runtime.decoding.graph import DecoderGraph
    from loradeploy.runtime.decoding.source import EncodedSource
    from loradeploy.runtime.feeds import Feeds


class RowAdapters(Protocol):
    """The adapters of the rows of a batch."""

    def take_rows(self, rows: Sequence[int], /) -> None:
        """Run from now on with the adapters of these numbers, one a row."""

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        feeds: Feeds,
        *,
        buffers: Mapping[str, onnxruntime.OrtValue] | None = None,
    ) -> list[onnxruntime.OrtValue]:
        """As `AdapterSession.run_with_ort_values`."""


class Rows(Protocol):
    """Rows of a batch, each with what it has read. `count`: how many a run reads."""

    @property
    def count(self) -> int:
        """How many rows a run reads, those that nobody goes on with among them."""

    def read(
        self,
        adapters: RowAdapters,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> NDArray[Any]:
        """Read `ids`: each row's logits at its last token, [rows, vocabulary]."""

    def move(self, parents: Sequence[int]) -> list[int]:
        """Go on with rows that follow the rows `parents`; where each of them is now.

        A row may be followed by several, or by none.
        """


class UncachedRows:
    """Rows of a graph without a cache: every run reads them from their beginning."""

    def __init__(self, graph: DecoderGraph, rows: int) -> None:
        self._graph = graph
        self.count = rows

    def read(
        self,
        adapters: RowAdapters,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> NDArray[Any]:
        """As `Rows.read`, of whole rows."""
        (logits,) = adapters.run_with_ort_values(
            (self._graph.output,), self._graph.feeds(ids, mask, ends), buffers={}
        )
        return logits_at(logits, ends)

    def move(self, parents: Sequence[int]) -> list[int]:
        """As `Rows.move`."""
        self.count = len(parents)
        return list(range(self.count))


class CachedRows:
    """Rows whose cache each run gives anew, or writes into buffers of the batch.

    A row that nobody goes on with may be read as padding meanwhile, which takes no position, as
    moving the cache costs more than one such row. `most`: how many positions a row has at most,
    where that is known. `source`: of an encoder-decoder, what the encoder made for the rows.
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

    @property
    def count(self) -> int:
        """As `Rows.count`."""
        return len(self._mask)

    def read(
        self,
        adapters: RowAdapters,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> NDArray[Any]:
        """As `Rows.read`."""
        self._mask = np.concatenate([self._mask, mask], axis=1)
        cache = self._cache
        cache.make_room(self._mask.shape[1], self._most)
        logits, *present = adapters.run_with_ort_values(
            (self._graph.output, *cache.outputs),
            {
                **self._fed(ids, ends),
                **cache.inputs,
                **({} if self._source is None else self._source.inputs),
            },
            buffers=cache.buffers,
        )
        cache.keep(present)
        return logits_at(logits, ends)

    def _fed(self, ids: NDArray[np.int64], ends: NDArray[np.int64]) -> dict[str, Any]:
        feeds = self._graph.feeds(ids, self._mask, ends)
        length = self._cache.length
        if length is not None and ids.shape[1] == 1 and ATTENTION_MASK in feeds:
            # A step of one length is one that a device has recorded.
            mask = feeds[ATTENTION_MASK]
            feeds[ATTENTION_MASK] = np.pad(mask, ((0, 0), (0, length - mask.shape[1])))
        return feeds

    def move(self, parents: Sequence[int]) -> list[int]:
        """As `Rows.move`."""
        if not parents:
            self._cache = self._graph.session.empty_cache(1)
            self._mask = np.zeros((0, 0), np.int64)
            return []
        apart = all(a < b for a, b in itertools.pairwise(parents))
        if not apart or 2 * len(parents) <= self.count:
            self._cache.take_rows(parents)
            if self._source is not None:
                self._source.take_rows(parents)
            self._mask = self._mask[list(parents)]
            return list(range(len(parents)))
        return list(parents)

    def values(self) -> list[NDArray[Any]]:
        """What the first row's cache holds, of each of its tensors [heads, tokens, size]."""
        return [value.numpy()[0] for value in self._cache.inputs.values()]

    def load(self, values: Sequence[NDArray[Any]]) -> None:
        """Have the one row hold this, as if it had read the tokens."""
        self._cache.fill([part[np.newaxis] for part in values])
        self._mask = np.ones((1, values[0].shape[1]), np.int64)

    def close(self) -> None:
        """Let go of what was read; nothing to do, it goes with the rows."""

    def begin(self) -> CachedRows:
        """A row that reads a prompt by itself, and may `join` then."""
        return CachedRows(self._graph, 1)

    def join(self, rows: Sequence[int], other: CachedRows, copies: int) -> list[int]:
        """Go on with `rows`, and `copies` times with the one row of `other`; where they are now.

        Positions that no row uses go with it.
        """
        mine = self._mask[list(rows)].sum(axis=1)
        theirs = int(other._mask.sum())
        width = int(mine.max(initial=0))
        left = self._graph.left
        self._cache.join(rows, width, other._cache, copies, theirs, left)
        lengths = np.concatenate([mine, np.full(copies, theirs, np.int64)])
        columns = np.arange(max(width, theirs))
        if left:
            columns = columns[::-1]
        self._mask = (columns < lengths[:, np.newaxis]).astype(np.int64)
        return list(range(self.count))


def logits_at(logits: onnxruntime.OrtValue, ends: NDArray[np.int64]) -> NDArray[Any]:
    """Of logits [rows, tokens, vocabulary], or of the last tokens alone, those at `ends`."""
    scores = logits.numpy()
    if scores.ndim == 2:
        scores = scores[:, np.newaxis]
    # A graph may give the last position alone.
    ends = np.zeros_like(ends) if scores.shape[1] == 1 else ends
    last: NDArray[Any] = scores[np.arange(len(scores)), ends]
    return last
