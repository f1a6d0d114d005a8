"""The work of the engine's thread in one round: a chunk of prompts, and a decode step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.names import NO_PADDING
from loradeploy.printable import logger_of
from loradeploy.runtime.decoding.caches.memory import memory_for_rows, position_bytes
from loradeploy.runtime.decoding.caches.parts import TOKENS as LARGEST_PART
from loradeploy.runtime.decoding.caches.rows import CachedRows, UncachedRows
from loradeploy.runtime.decoding.caches.slots import SlotRows, keeps_slots
from loradeploy.runtime.decoding.graph import DecoderGraph
from loradeploy.runtime.decoding.loop import DecodingBatch, Entrant
from loradeploy.runtime.engine.prefix import BLOCK, PrefixCache
from loradeploy.runtime.engine.submission import too_late
from loradeploy.runtime.memory import return_freed_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.decoding.caches.protocols import Reading, RowAdapters, Rows, RowsBeside
    from loradeploy.runtime.engine.running import Running
    from loradeploy.runtime.engine.statistics import EngineStatistics, Observer
    from loradeploy.runtime.session import AdapterSession

logger = logger_of(__name__)

_POSITIONS: Final = 4096  # of a row, if the model has no maximum
_IDLE_CHUNKS: Final = 4  # chunks that are processed at once while no request is decoding
Ended = tuple["Running", "BaseException | None"]


class Worker:
    """The requests that are decoding, and those whose prompt is being processed.

    `slots`: maximum number of rows. `chunk`: prompt tokens that are processed between two steps;
    of a long prompt, up to four times as many while no request is decoding.
    `budget`: bytes of the rows' cache, None for no limit. `prefixes`: bytes of the prefix cache, 0
    for none.
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
        self.graph = DecoderGraph.of(session, pad_id)
        self._statistics = statistics
        self._observer = observer
        self.slots = slots
        self._chunk = chunk
        # Not more than what is fastest: a request that arrives meanwhile waits for it.
        self._idle_chunk = max(chunk, min(_IDLE_CHUNKS * chunk, LARGEST_PART))
        # Rows of different lengths cannot share a run if padding changes results. If a graph
        # derives positions from cache columns, its cache cannot be padded later.
        columns = self.graph.cached and self.graph.left and not self.graph.takes_positions
        self._alone = session.manifest.padding == NO_PADDING or columns
        available = memory_for_rows(session, budget)
        self.budget = available if budget is not None or available is None else available // 2
        statistics.cache_bytes = self.budget or 0
        self._adapters = session.joined()
        self._readers = session.joined()  # for prompts that are processed together
        rows, self._beside, self.positions = self._make_rows()
        self._batch = DecodingBatch(self.graph, self._adapters, rows, self._failed)
        self._prefixes = PrefixCache(prefixes) if prefixes and self.graph.cached else None
        self._active: dict[int, Running] = {}  # by number, in the batch
        self._reading: list[Running] = []  # in order of arrival
        self._long = False  # whether the last run processed a chunk of a long prompt
        self._ended: list[Ended] = []
        self._broken: BaseException | None = None  # an error that occurred while rows were moved

    def _make_rows(self) -> tuple[Rows, RowsBeside | None, int | None]:
        """Return the rows for the graph's kind of cache, and the fixed number of positions of each.

        The second value is the same rows if prompts are processed beside them, otherwise None.
        """
        if not self.graph.cached:
            return UncachedRows(self.graph, 0), None, None
        if not keeps_slots(self.graph):
            growing = CachedRows(self.graph, 0)
            return growing, growing, None
        most = self._session.texts.base.tokenizer.max_length or _POSITIONS
        if self.budget is not None:
            most = max(1, min(most, self.budget // (self.slots * position_bytes(self._session))))
        slots = SlotRows(self.graph, self.slots, most)
        return slots, slots, most

    def fits(self, one: Running) -> bool:
        """Whether there are rows and memory for the request now."""
        others = [*self._active.values(), *self._reading]
        if not others:
            return True
        rows = one.rows + sum(other.rows for other in others)
        if self._alone or rows > self.slots:
            return False
        if self.positions is not None:
            return True  # each slot has its own memory
        longest = max(other.most for other in (one, *others))
        taken = rows * longest * position_bytes(self._session)
        return self.budget is None or taken <= self.budget

    def admit(self, one: Running) -> None:
        """Start processing a request."""
        self._reading.append(one)
        self._statistics.prompt_tokens += len(one.request.ids)
        self._observer("queue", time.monotonic() - one.submission.created, one.submission)

    def advance(self) -> Sequence[Ended]:
        """Process a chunk of prompts and run a step; return the requests that ended."""
        for act in (self._end_cancelled, self._read, self._step):
            act()
            if self._broken is not None:  # the state of the rows is unknown
                self._fail_all(self._broken)
        self._statistics.rows = self._batch.rows
        ended, self._ended = self._ended, []
        return ended

    def return_memory(self) -> None:
        """Return memory to the system that only the next requests need, while there are none."""
        if isinstance(self._beside, SlotRows):
            self._beside.return_memory()
        return_freed_memory()

    def close(self) -> None:
        """Release the adapters of the batch."""
        self._readers.close()
        self._adapters.close()

    def _end_cancelled(self) -> None:
        """End requests that were cancelled or whose deadline passed."""
        now = time.monotonic()
        for one in [*self._active.values(), *self._reading]:
            if one.submission.late(now):
                self._end(one, too_late())
            elif one.submission.cancelled and one.cancel():
                one.emit(self._statistics, self._observer)
                self._end(one)

    def _read(self) -> None:
        """Process a chunk of a prompt, or several prompts; completed ones join the batch."""
        if not self._reading:
            return
        beside = self._beside
        if beside is None:
            for one in list(self._reading):
                self._enter(one)
            return
        group = self._next_prompts()
        try:
            self._run_prompts(beside, group)
        except BaseException as problem:  # a panic of a Rust library is not an Exception
            for one in group:
                if one in self._reading or one.number in self._active:
                    self._end(one, problem)

    def _enter(self, one: Running) -> None:
        """Add a request to the batch of a graph without a cache: no prompt is processed before."""
        one.submission.start(len(one.request.ids))
        try:
            self._activate(one)
            self._batch.enter(one.number, one.request.sequences)
        except BaseException as problem:
            self._end(one, problem)

    def _activate(self, one: Running) -> None:
        self._reading.remove(one)
        self._adapters.enter(one.number, one.held)
        self._active[one.number] = one

    def _next_prompts(self) -> list[Running]:
        """Choose the requests whose prompts are processed next: one long prompt, or short ones.

        Several are at most a chunk in total, padding included, or a chunk each if no request is
        decoding. Of prompts with a common prefix, one is processed first, so that the others find
        it in the cache.
        """
        for one in self._reading:
            if one.reading is None:
                one.blocks = self._find(one)
        short = [one for one in self._reading if one.reading is None and self._short_rest(one)]
        first = self._reading[0]
        if first not in short and not (self._long and short):
            self._long = True
            return [first]
        self._long = False
        most = self._chunk * (1 if self._active else self.slots)
        group: list[Running] = []
        for one in short:
            size = max(self._short_rest(other) for other in (*group, one))
            fits = (len(group) + 1) * size <= most and not any(
                self._shares_prefix(one, other) for other in group
            )
            # After cached tokens, a row's padding would be between its tokens, where a sliding
            # window counts it; and rows that end at different positions must begin at the same one.
            if not group or (fits and not (one.blocks or group[0].blocks)):
                group.append(one)
        return group

    def _short_rest(self, one: Running) -> int:
        """The number of remaining tokens of a prompt, if they fit in one chunk; otherwise 0.

        0 also for a prompt with embeddings, which is processed alone, in one run.
        """
        if one.embeds is not None:
            return 0
        rest = len(one.request.ids) - len(one.blocks) * BLOCK
        return rest if rest <= self._chunk else 0

    def _shares_prefix(self, one: Running, other: Running) -> bool:
        """Whether two prompts share a block that is not in the prefix cache yet."""
        if self._prefixes is None or one.owner != other.owner:
            return False
        found = max(len(one.blocks), len(other.blocks)) * BLOCK
        return self._prefixes.shares(one.request.ids, other.request.ids, found)

    def _run_prompts(self, beside: RowsBeside, group: list[Running]) -> None:
        reading = group[0].reading
        if reading is None:
            reading = beside.begin(len(group), [one.embeds for one in group])
            del group[reading.count :]  # the others are processed later
            self._begin(reading, group)
        began = time.monotonic()
        most = self._chunk if self._active else self._idle_chunk
        if group[0].embeds is not None:
            most = len(group[0].request.ids)
        prompts = [one.request.ids[one.read : one.read + most] for one in group]
        with self._adapters_of(group) as adapters:
            logits = reading.read(adapters, self.graph.padded(prompts))
        for one, tokens in zip(group, prompts, strict=True):
            one.read += len(tokens)
        self._statistics.prefills += 1
        alone = group[0].submission if len(group) == 1 else None
        self._observer("prefill", time.monotonic() - began, alone)
        if group[0].read < len(group[0].request.ids):
            return
        entrants = []
        try:
            for row, one in enumerate(group):
                self._keep(one, reading, row)
                one.reading = None
                self._activate(one)
                entrants.append(Entrant(one.number, one.request.sequences, row))
            failures = self._batch.join(reading, entrants, logits)
        finally:
            reading.close()
        for one in group:
            if one.number in failures:
                self._end(one, failures[one.number])
            else:
                self._emit(one)

    def _begin(self, reading: Reading, group: Sequence[Running]) -> None:
        """Start each prompt after its cached prefix; a prompt with one is processed alone."""
        for row, one in enumerate(group):
            # Several prompts are processed completely in one run, which closes `reading` then.
            one.reading = reading if row == 0 else None
            one.read = len(one.blocks) * BLOCK
            if one.blocks:
                parts = zip(*one.blocks, strict=True)
                reading.load([np.concatenate(part, axis=1) for part in parts])
            self._statistics.cached_tokens += one.read
            one.submission.start(len(one.request.ids), one.read)
            one.blocks = []

    @contextmanager
    def _adapters_of(self, group: Sequence[Running]) -> Iterator[RowAdapters]:
        """Yield the adapters of a group's prompts, one row for each."""
        if len(group) == 1:
            yield group[0].held
            return
        try:
            for one in group:
                self._readers.enter(one.number, one.held)
            self._readers.take_rows([one.number for one in group])
            yield self._readers
        finally:
            self._readers.close()
            for one in group:
                self._readers.leave(one.number)

    def _find(self, one: Running) -> list[list[NDArray[Any]]]:
        """The blocks of a prompt in the prefix cache, which has none with embeddings."""
        if self._prefixes is None or one.embeds is not None:
            return []
        return self._prefixes.find(one.owner, one.request.ids)

    def _keep(self, one: Running, reading: Reading, row: int) -> None:
        """Store a processed prompt in the prefix cache."""
        if self._prefixes is None or one.embeds is not None or len(one.request.ids) < BLOCK:
            return
        self._prefixes.keep(one.owner, one.request.ids, reading.past(row))
        self._statistics.prefix_entries = len(self._prefixes)
        self._statistics.prefix_bytes = self._prefixes.nbytes
        self._statistics.prefix_evictions = self._prefixes.evictions

    def _step(self) -> None:
        # A prompt that failed to join may have broken the rows, even if the batch is empty
        # otherwise.
        if not self._active and self._batch.whole:
            return
        began = time.monotonic()
        rows = self._batch.rows
        try:
            self._batch.step()
        except BaseException as problem:  # of the run, or of moving rows
            self._fail_all(problem)
            return
        statistics = self._statistics
        statistics.steps += 1
        statistics.one_adapter_steps += not self._adapters.mixed
        statistics.batch_sizes[rows] += 1
        self._observer("step", time.monotonic() - began, None)
        for one in list(self._active.values()):
            self._emit(one)

    def _emit(self, one: Running) -> None:
        try:
            whole = one.emit(self._statistics, self._observer)
        except BaseException as problem:  # in its tokenizer
            self._end(one, problem)
            return
        if whole:
            self._observer("request", time.monotonic() - one.submission.created, one.submission)
            self._end(one)

    def _failed(self, number: int, problem: BaseException) -> None:
        """End a request that failed; the batch removes it."""
        self._end(self._active[number], problem, left=True)

    def _end(self, one: Running, problem: BaseException | None = None, left: bool = False) -> None:
        self._ended.append((one, problem))
        if one in self._reading:
            self._reading.remove(one)
        if self._active.pop(one.number, None) is None:
            return
        try:
            if not left:
                self._batch.leave(one.number)
            self._adapters.leave(one.number)
            self._adapters.take_rows(self._batch.owners)
        except BaseException as fault:
            logger.exception("the rows of a batch could not be moved")
            self._broken = fault

    def _fail_all(self, problem: BaseException) -> None:
        """End all active requests, and clear the batch."""
        ended = list(self._active.values())
        self._active.clear()
        self._broken = None
        self._batch.clear()
        for one in ended:
            self._ended.append((one, problem))
            self._adapters.leave(one.number)
        self._adapters.close()
