"""Rows in slots of one buffer, for a graph that writes its cache in place.

A slot is one row of the cache, filled from position 0. Rows that join, end or are processed beside
others move nothing, and shorter rows are not padded. A run uses the slots up to the last one in
use. An unused slot among them processes one token after its contents, which is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from loradeploy.bundle.names import PAST, present_of
from loradeploy.runtime.cache import cache_inputs
from loradeploy.runtime.decoding.caches.memory import on_host
from loradeploy.runtime.decoding.caches.protocols import Past, RowAdapters
from loradeploy.runtime.decoding.caches.rows import logits_at
from loradeploy.runtime.decoding.caches.sparse import return_pages, zeros_by_page
from loradeploy.runtime.running.bindings import FixedBuffers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.decoding.graph import DecoderGraph, NewTokens, TokenEmbeds


def keeps_slots(graph: DecoderGraph) -> bool:
    """Whether a graph supports slots: its cache is updated in place, in host memory."""
    manifest = graph.session.manifest
    past = [spec for spec in manifest.inputs if spec.name.startswith(PAST)]
    free = all(len(spec.shape) == 4 and not isinstance(spec.shape[2], int) for spec in past)
    return manifest.cache_in_place and bool(past) and free and on_host(graph.session)


class SlotRows:
    """Rows in `slots` slots of `positions` each.

    Memory is allocated when a position is first written, and kept until `return_memory`.
    """

    def __init__(self, graph: DecoderGraph, slots: int, positions: int) -> None:
        self._graph = graph
        self._arrays: dict[str, NDArray[Any]] = {
            spec.name: zeros_by_page(
                (slots, int(spec.shape[1]), positions, int(spec.shape[3])), np.dtype(spec.dtype)
            )
            for spec in cache_inputs(graph.session.manifest)
        }
        self._outputs = tuple(present_of(name) for name in self._arrays)
        self._views: dict[tuple[int, int], FixedBuffers] = {}
        self.positions = positions
        self._lengths = np.zeros(slots, np.int64)
        self._shifts = np.zeros(slots, np.int64)  # of positions after images
        self._used: set[int] = set()
        self._reading: set[int] = set()  # the slots in use whose prompt is being processed

    @property
    def count(self) -> int:
        """See `Rows.count`."""
        return max(self._used - self._reading, default=-1) + 1

    def read(self, adapters: RowAdapters, new: NewTokens) -> NDArray[Any]:
        """See `Rows.read`; one token per row."""
        logits = self._run(self._graph, adapters, new, 0)
        self._lengths[: len(new.ids)] += new.mask[:, 0]
        return logits

    def _run(
        self,
        graph: DecoderGraph,
        adapters: RowAdapters,
        new: NewTokens,
        first: int,
    ) -> NDArray[Any]:
        """Run `new` in consecutive slots from `first` on.

        Several rows start at position 0, or have one token each. Rows without a token, and padding,
        are written after a slot's contents.
        """
        count, length = new.ids.shape
        mask = new.mask
        lengths = self._lengths[first : first + count]
        if count == 1 or length == 1:
            mask = np.zeros((count, int(lengths.max()) + length), np.int64)
            mask[:, -length:] = 1
            mask[np.arange(mask.shape[1]) < lengths[:, np.newaxis]] = 1
        fixed = self._view(first, count)
        logits, *_ = adapters.run_with_ort_values(
            (graph.output, *self._outputs),
            {
                **graph.feeds(new.ids, mask, new.ends, self._shifts[first : first + count]),
                **fixed.inputs,
            },
            # A prompt is processed in one run, or few, so its bindings are not kept.
            buffers=fixed if length == 1 else dict(fixed),
        )
        return logits_at(logits, new.ends)

    def _view(self, first: int, count: int) -> FixedBuffers:
        """The slots as inputs and outputs of a run."""
        if (first, count) not in self._views:
            values = [
                onnxruntime.OrtValue.ortvalue_from_numpy(array[first : first + count])
                for array in self._arrays.values()
            ]
            self._views[first, count] = FixedBuffers(
                dict(zip(self._arrays, values, strict=True)),
                dict(zip(self._outputs, values, strict=True)),
            )
        return self._views[first, count]

    def move(self, parents: Sequence[int]) -> list[int]:
        """See `Rows.move`; the first successor of a row keeps its slot, others get copies."""
        for slot in self._used - self._reading - set(parents):
            self._free(slot)
        found: list[int] = []
        for parent in parents:
            found.append(parent if parent not in found else self._copy(parent, self._take()))
        if len(set(parents)) == len(parents) and 2 * len(found) <= self.count:
            found = [self._lowered(slot) for slot in found]
        return found

    def begin(self, count: int, embeds: Sequence[TokenEmbeds | None] = ()) -> SlotReading:
        """See `RowsBeside.begin`; uses free slots that are adjacent."""
        slots = self._adjacent(count)
        for slot in slots:
            self._use(slot)
        self._reading.update(slots)
        return SlotReading(self, slots, self._graph.with_embeds(embeds))

    def join(self, rows: Sequence[int], joining: Sequence[int]) -> list[int]:
        """Continue with `rows` and the slots `joining`, whose prompts were processed."""
        found = list(rows)
        self._reading -= set(joining)  # owned by the batch from now on, even if this fails
        for slot in joining:
            found.append(slot if slot not in found else self._copy(slot, self._take()))
        return found

    def return_memory(self) -> None:
        """Return the memory of all slots to the system, if none is in use."""
        if not self._used:
            for array in self._arrays.values():
                return_pages(array)

    def _adjacent(self, count: int) -> list[int]:
        """The first `count` adjacent free slots, or the longest run of fewer."""
        best: list[int] = []
        run: list[int] = []
        for slot in range(len(self._lengths)):
            run = [] if slot in self._used else [*run, slot]
            best = run if len(run) > len(best) else best
            if len(best) == count:
                break
        return best

    def _use(self, slot: int) -> None:
        self._used.add(slot)
        self._lengths[slot] = self._shifts[slot] = 0

    def _take(self) -> int:
        slot = next(slot for slot in range(len(self._lengths)) if slot not in self._used)
        self._use(slot)
        return slot

    def _free(self, slot: int) -> None:
        self._used.discard(slot)
        self._reading.discard(slot)
        self._lengths[slot] = self._shifts[slot] = 0

    def _copy(self, source: int, slot: int) -> int:
        """Copy the contents of `source` to `slot`."""
        length = self._lengths[slot] = self._lengths[source]
        self._shifts[slot] = self._shifts[source]
        for array in self._arrays.values():
            array[slot, :, :length] = array[source, :, :length]
        return slot

    def _lowered(self, slot: int) -> int:
        """Move the row of `slot` to a lower free slot, if any, and return its slot."""
        lower = next((free for free in range(slot) if free not in self._used), None)
        if lower is None:
            return slot
        self._copy(slot, self._take())
        self._free(slot)
        return lower


class SlotReading:
    """Adjacent slots in which prompts are processed; joined slots belong to the batch."""

    def __init__(self, rows: SlotRows, slots: list[int], graph: DecoderGraph) -> None:
        self._rows = rows
        self._slots = slots
        self._graph = graph
        self._joined: set[int] = set()

    @property
    def count(self) -> int:
        """See `Reading.count`."""
        return len(self._slots)

    def load(self, past: Past) -> None:
        """See `Reading.load`."""
        slot, length = self._slots[0], past[0].shape[1]
        for array, part in zip(self._rows._arrays.values(), past, strict=True):
            array[slot, :, :length] = part
        self._rows._lengths[slot] = length

    def read(self, adapters: RowAdapters, new: NewTokens) -> NDArray[Any]:
        """See `Rows.read`; several prompts start at position 0, padded on the right."""
        logits = self._rows._run(self._graph, adapters, new, self._slots[0])
        self._rows._lengths[self._slots] += new.mask.sum(axis=1)
        self._rows._shifts[self._slots] = self._graph.shifts(len(self._slots))
        return logits

    def past(self, row: int) -> Past:
        """See `Reading.past`."""
        slot = self._slots[row]
        length = self._rows._lengths[slot]
        return [array[slot, :, :length] for array in self._rows._arrays.values()]

    def join(self, rows: Sequence[int], joining: Sequence[int]) -> list[int]:
        """See `Reading.join`."""
        self._joined.update(joining)
        return self._rows.join(rows, [self._slots[row] for row in joining])

    def close(self) -> None:
        """See `Reading.close`."""
        for row, slot in enumerate(self._slots):
            if row not in self._joined:
                self._rows._free(slot)
        self._joined.update(range(len(self._slots)))
