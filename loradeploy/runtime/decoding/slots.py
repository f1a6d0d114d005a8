"""Rows in slots of one buffer, for a graph that writes its cache in place.

A slot is a row of the cache, from its beginning on, as long as it is; a row that joins, ends or is
read beside the others moves nothing of them, and no shorter row is padded. A run reads the slots up
to the last one in use. A slot among them in which no row goes on reads one token behind what it
holds, which nobody reads after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from loradeploy.bundle.names import PAST, present_of
from loradeploy.runtime.cache import cache_inputs
from loradeploy.runtime.decoding.memory import on_host
from loradeploy.runtime.decoding.rows import RowAdapters, logits_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.decoding.graph import DecoderGraph

_Values = Mapping[str, onnxruntime.OrtValue]


def keeps_slots(graph: DecoderGraph) -> bool:
    """Whether rows of a graph may be in slots: it writes in place, in the host's memory."""
    manifest = graph.session.manifest
    past = [spec for spec in manifest.inputs if spec.name.startswith(PAST)]
    free = all(len(spec.shape) == 4 and not isinstance(spec.shape[2], int) for spec in past)
    return manifest.cache_in_place and bool(past) and free and on_host(graph.session)


class SlotRows:
    """Rows in `slots` slots of `positions` each.

    The memory of a position is taken when it is first written.
    """

    def __init__(self, graph: DecoderGraph, slots: int, positions: int) -> None:
        self._graph = graph
        self._arrays: dict[str, NDArray[Any]] = {
            spec.name: np.zeros(
                (slots, int(spec.shape[1]), positions, int(spec.shape[3])), spec.dtype
            )
            for spec in cache_inputs(graph.session.manifest)
        }
        self._outputs = tuple(present_of(name) for name in self._arrays)
        self._views: dict[tuple[int, int], tuple[_Values, _Values]] = {}
        self.positions = positions
        self._lengths = np.zeros(slots, np.int64)
        self._used: set[int] = set()
        self._reading: set[int] = set()  # of those in use, where a prompt is read

    @property
    def count(self) -> int:
        """As `Rows.count`."""
        return max(self._used - self._reading, default=-1) + 1

    def read(
        self,
        adapters: RowAdapters,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> NDArray[Any]:
        """As `Rows.read`, of one token a row."""
        count = len(ids)
        logits = self._run(adapters, ids, 0, ends)
        self._lengths[:count] += mask[:, 0]
        return logits

    def _run(
        self, adapters: RowAdapters, ids: NDArray[np.int64], first: int, ends: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Read `ids` [rows, new] in the slots from `first` on."""
        count, new = ids.shape
        lengths = self._lengths[first : first + count]
        mask = np.zeros((count, int(lengths.max()) + new), np.int64)
        mask[:, -new:] = 1
        mask[np.arange(mask.shape[1]) < lengths[:, np.newaxis]] = 1
        inputs, buffers = self._view(first, count)
        logits, *_ = adapters.run_with_ort_values(
            (self._graph.output, *self._outputs),
            {**self._graph.feeds(ids, mask, ends), **inputs},
            buffers=buffers,
        )
        return logits_at(logits, ends)

    def _view(self, first: int, count: int) -> tuple[_Values, _Values]:
        """The slots as a run reads them, and as it writes them."""
        if (first, count) not in self._views:
            values = [
                onnxruntime.OrtValue.ortvalue_from_numpy(array[first : first + count])
                for array in self._arrays.values()
            ]
            self._views[first, count] = (
                dict(zip(self._arrays, values, strict=True)),
                dict(zip(self._outputs, values, strict=True)),
            )
        return self._views[first, count]

    def move(self, parents: Sequence[int]) -> list[int]:
        """As `Rows.move`: the first that follows a row keeps its slot, others get copies."""
        for slot in self._used - self._reading - set(parents):
            self._free(slot)
        found: list[int] = []
        for parent in parents:
            found.append(parent if parent not in found else self._copy(parent, self._take()))
        if len(set(parents)) == len(parents) and 2 * len(found) <= self.count:
            found = [self._down(slot) for slot in found]
        return found

    def begin(self) -> SlotReading:
        """A slot in which a prompt is read, and which may `join` then."""
        slot = self._take()
        self._reading.add(slot)
        return SlotReading(self, slot)

    def join(self, rows: Sequence[int], other: SlotReading, copies: int) -> list[int]:
        """Go on with `rows`, and `copies` times with the prompt that `other` read."""
        other.joined = True
        self._reading.discard(other.slot)
        more = [self._copy(other.slot, self._take()) for _ in range(copies - 1)]
        return [*rows, other.slot, *more]

    def _take(self) -> int:
        slot = next(slot for slot in range(len(self._lengths)) if slot not in self._used)
        self._used.add(slot)
        self._lengths[slot] = 0
        return slot

    def _free(self, slot: int) -> None:
        self._used.discard(slot)
        self._reading.discard(slot)
        self._lengths[slot] = 0

    def _copy(self, source: int, slot: int) -> int:
        """Have `slot` hold what `source` does."""
        length = self._lengths[slot] = self._lengths[source]
        for array in self._arrays.values():
            array[slot, :, :length] = array[source, :, :length]
        return slot

    def _down(self, slot: int) -> int:
        """The row of `slot` in a slot before it, where one is free."""
        lower = next((free for free in range(slot) if free not in self._used), None)
        if lower is None:
            return slot
        self._copy(slot, self._take())
        self._free(slot)
        return lower


class SlotReading:
    """A slot while a prompt is read in it. `joined`: whether its row goes on with the others."""

    def __init__(self, rows: SlotRows, slot: int) -> None:
        self._rows = rows
        self.slot = slot
        self.joined = False

    def read(
        self,
        adapters: RowAdapters,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> NDArray[Any]:
        """Read `ids` [1, new]: the logits at the last token, [1, vocabulary]."""
        logits = self._rows._run(adapters, ids, self.slot, ends)
        self._rows._lengths[self.slot] += ids.shape[1]
        return logits

    def values(self) -> list[NDArray[Any]]:
        """What the slot holds, of each tensor of the cache [heads, positions, size]."""
        return [array[self.slot] for array in self._rows._arrays.values()]

    def load(self, values: Sequence[NDArray[Any]]) -> None:
        """Have the slot hold this, as if it had read the tokens."""
        length = values[0].shape[1]
        for array, part in zip(self._rows._arrays.values(), values, strict=True):
            array[self.slot, :, :length] = part
        self._rows._lengths[self.slot] = length

    def close(self) -> None:
        """Let go of the slot, unless its row goes on."""
        if not self.joined:
            self._rows._free(self.slot)
            self.joined = True
