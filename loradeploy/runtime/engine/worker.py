"""What the engine's thread does between two looks at the queue: a chunk of a prompt, and a step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.names import NO_PADDING
from loradeploy.runtime.decoding.graph import DecoderGraph
from loradeploy.runtime.decoding.loop import DecodingBatch
from loradeploy.runtime.decoding.memory import memory_for_rows, position_bytes
from loradeploy.runtime.decoding.rows import CachedRows, UncachedRows
from loradeploy.runtime.decoding.slots import SlotRows, keeps_slots
from loradeploy.runtime.engine.prefix import BLOCK, PrefixCache
from loradeploy.runtime.engine.submission import too_late

if TYPE_CHECKING:
    from loradeploy.runtime.engine.running import Running
    from loradeploy.runtime.engine.statistics import EngineStatistics, Observer
    from loradeploy.runtime.session import AdapterSession

_POSITIONS: Final = 4096  # of a row, where the model has no end
Ended = tuple["Running", "BaseException | None"]


class Worker:
    """The requests that take part in steps, and those whose prompt is read.

    `slots`: how many rows there are. `chunk`: tokens of a prompt that are read in one run.
    `budget`: bytes of the rows' cache, None where nothing limits it. `prefixes`: bytes of the
    prefix cache, 0 for none.
    """

    def __init__(
        self,
        session: AdapterSession,
        pad_id: int,
        statistics: EngineStatistics,
        observer: Observer,
        *,
        slots: int,
        chunk: int,
        budget: int | None,
        prefixes: int,
    ) -> None:
        self._session = session
        self._graph = DecoderGraph.of(session, pad_id)
        self._statistics = statistics
        self._observer = observer
        self.slots = slots
        self._chunk = chunk
        # Rows of different lengths cannot share a run where padding changes answers. A cache whose
        # keys may have their columns for positions cannot be padded later.
        columns = self._graph.cached and self._graph.left and not self._graph.takes_positions
        self._alone = session.manifest.padding == NO_PADDING or columns
        available = memory_for_rows(session, budget)
        self.budget = available if budget is not None or available is None else available // 2
        statistics.cache_bytes = self.budget or 0
        self._adapters = session.joined()
        self._rows, self.positions = self._make_rows()
        self._batch = DecodingBatch(self._graph, self._adapters, self._rows, self._failed)
        self._prefixes = PrefixCache(prefixes) if prefixes and self._graph.cached else None
        self._going: dict[int, Running] = {}  # in the batch
        self._reading: list[Running] = []  # the one that is read next comes first
        self._ended: list[Ended] = []

    def _make_rows(self) -> tuple[CachedRows | SlotRows | UncachedRows, int | None]:
        """The rows as the graph's cache wants them, and the positions of one where it is fixed."""
        if not self._graph.cached:
            return UncachedRows(self._graph, 0), None
        if not keeps_slots(self._graph):
            return CachedRows(self._graph, 0), None
        most = self._session.texts.base.tokenizer.max_length or _POSITIONS
        if self.budget is not None:
            most = max(1, min(most, self.budget // (self.slots * position_bytes(self._session))))
        return SlotRows(self._graph, self.slots, most), most

    def fits(self, one: Running) -> bool:
        """Whether there are rows and memory for a request now."""
        others = [*self._going.values(), *self._reading]
        if not others:
            return True
        rows = one.rows + sum(other.rows for other in others)
        if self._alone or rows > self.slots:
            return False
        if self.positions is not None:
            return True  # every slot has its memory
        longest = max(other.most for other in (one, *others))
        taken = rows * longest * position_bytes(self._session)
        return self.budget is None or taken <= self.budget

    def admit(self, one: Running) -> None:
        """Begin with a request."""
        self._reading.append(one)
        self._statistics.prompt_tokens += len(one.request.ids)
        self._observer("queue", time.monotonic() - one.submission.created, one.submission)

    def advance(self) -> Sequence[Ended]:
        """A chunk of a prompt and a step of all others; the requests that have ended with it."""
        self._heed()
        if self._reading:
            self._read(self._reading[0])
        if self._going:
            self._step()
        self._statistics.rows = self._batch.rows
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Let go of the batch."""
        self._adapters.close()

    def _heed(self) -> None:
        """End what was cancelled, and what is late."""
        now = time.monotonic()
        for one in [*self._going.values(), *self._reading]:
            if one.submission.late(now):
                self._end(one, too_late())
            elif one.submission.cancelled and one.cancel():
                one.tell(self._statistics, self._observer)
                self._end(one)

    def _read(self, one: Running) -> None:
        """Read the next chunk of a prompt; behind its last token the request takes part."""
        prompt = one.request.ids
        try:
            if isinstance(self._rows, UncachedRows):
                one.submission.start(len(prompt))
                self._reading.remove(one)
                self._adapters.enter(one.number, one.held)
                self._going[one.number] = one
                self._batch.enter(one.number, one.request.sequences)
                return
            if one.reading is None:
                one.reading = self._rows.begin()
                self._find(one)
                one.submission.start(len(prompt), one.read)
            began = time.monotonic()
            chunk = np.array([prompt[one.read : one.read + self._chunk]], np.int64)
            logits = one.reading.read(one.held, chunk, np.ones_like(chunk), np.array([-1]))
            one.read += chunk.shape[1]
            self._statistics.prefills += 1
            self._observer("prefill", time.monotonic() - began, one.submission)
            if one.read < len(prompt):
                return
            self._keep(one)
            self._reading.remove(one)
            self._adapters.enter(one.number, one.held)
            self._going[one.number] = one
            self._batch.join(one.number, one.request.sequences, logits, one.reading)
            one.reading.close()
            one.reading = None
            self._tell(one)
        except BaseException as problem:  # a panic of a mask's library is no Exception
            self._end(one, problem)

    def _find(self, one: Running) -> None:
        """Begin behind what the prefix cache has of a prompt."""
        if self._prefixes is None or one.reading is None:
            return
        blocks = self._prefixes.find(one.owner, one.request.ids)
        if blocks:
            one.reading.load([np.concatenate(parts, axis=1) for parts in zip(*blocks, strict=True)])
            one.read = len(blocks) * BLOCK
            self._statistics.cached_tokens += one.read

    def _keep(self, one: Running) -> None:
        """Keep what a prompt was read to."""
        if self._prefixes is None or one.reading is None or len(one.request.ids) < BLOCK:
            return
        self._prefixes.keep(one.owner, one.request.ids, one.reading.values())
        self._statistics.prefix_entries = len(self._prefixes)
        self._statistics.prefix_bytes = self._prefixes.nbytes
        self._statistics.prefix_evictions = self._prefixes.evictions

    def _step(self) -> None:
        began = time.monotonic()
        rows = self._batch.rows
        try:
            self._batch.step()
        except BaseException as problem:  # the run itself
            for one in list(self._going.values()):
                self._end(one, problem)
            return
        statistics = self._statistics
        statistics.steps += 1
        statistics.one_adapter_steps += not self._adapters.mixed
        statistics.batch_sizes[rows] += 1
        self._observer("step", time.monotonic() - began, None)
        for one in list(self._going.values()):
            self._tell(one)

    def _tell(self, one: Running) -> None:
        try:
            whole = one.tell(self._statistics, self._observer)
        except BaseException as problem:  # of its tokenizer
            self._end(one, problem)
            return
        if whole:
            self._observer("request", time.monotonic() - one.submission.created, one.submission)
            self._end(one)

    def _failed(self, number: int, problem: BaseException) -> None:
        """A request that cannot go on; the batch has let go of it, or will."""
        self._end(self._going[number], problem, left=True)

    def _end(self, one: Running, problem: BaseException | None = None, left: bool = False) -> None:
        self._ended.append((one, problem))
        if one in self._reading:
            self._reading.remove(one)
        if self._going.pop(one.number, None) is not None:
            if not left:
                self._batch.leave(one.number)
            self._adapters.leave(one.number)
            self._adapters.take_rows(self._batch.owners)
