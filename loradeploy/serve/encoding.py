"""Batch requests to an encoder: rows of several requests share runs of the graph.

A run takes rows of waiting requests, each with its own adapter, up to `max_rows`. A request with
more rows is split between runs, so that others do not wait for it. API keys take turns.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from loradeploy.bundle.graph_form import SHARED_SCALE
from loradeploy.errors import DeadlineError, EngineClosedError, EngineFullError, UsageError
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters
from loradeploy.runtime.session import AdapterSession
from loradeploy.serve.keys import ApiKey
from loradeploy.serve.problems import RequestError
from loradeploy.serve.settings import ServeLimits
from loradeploy.snapshot import ATTEMPTS

_Row = TypeVar("_Row")
_Prepared = TypeVar("_Prepared")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class RowWork(Generic[_Row, _Prepared, _Result]):
    """The work for the rows of a request, done in a thread.

    `group`: requests with equal groups may share a run, because their `run` is the same function.
    `prepare`: called once, before the first run; an error fails only this request.
    `run`: the results of rows with their adapters, one for all or one for each.
    """

    group: Hashable
    prepare: Callable[[], _Prepared]
    run: Callable[[Sequence[_Row], Adapters], Sequence[_Result]]


@dataclass(eq=False)
class _Request:
    """A request, whose rows from `taken` on have not run yet."""

    work: RowWork[Any, Any, Any]
    rows: Sequence[Any]
    adapter: AdapterSpec | None
    key: str
    answer: asyncio.Future[tuple[Any, list[Any]]]
    taken: int = 0
    results: list[Any] = field(default_factory=list)
    prepared: Any = None
    counts: tuple[int, ...] | None = None  # `TextSides.counts` of its adapter before the first run
    runs: int = 0
    attempts: int = 1

    def begin_again(self) -> None:
        """Discard the results, and run all rows again."""
        self.taken, self.results, self.counts, self.runs = 0, [], None, 0
        self.attempts += 1


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of a request that are in one run."""

    request: _Request
    rows: Sequence[Any]


class EncoderQueue:
    """The requests to an encoder, for one asyncio loop. Runs are sequential.

    `on_run`: called at the end of each run. `running`: number of requests with rows in the current
    run. `closed`: whether the session is closed or being closed.
    """

    def __init__(
        self, limits: ServeLimits, session: AdapterSession, *, on_run: Callable[[], None]
    ) -> None:
        self._limits = limits
        self._session = session
        self._on_run = on_run
        self._shares = rows_are_independent(session)
        self._seconds = 0.0  # moving average of a run's duration
        self._queues: dict[str, deque[_Request]] = {}  # by API key, in the order of their turns
        self._worker: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()
        self.running = 0
        self.closed = False

    @property
    def waiting(self) -> int:
        """The number of requests with rows that have not run yet."""
        return sum(map(len, self._queues.values()))

    async def run(
        self,
        work: RowWork[_Row, _Prepared, _Result],
        rows: Sequence[_Row],
        adapter: AdapterSpec | None,
        key: ApiKey,
    ) -> tuple[_Prepared, list[_Result]]:
        """Run `rows`; return what `work` prepares, and the results, all of one adapter version.

        Raises:
            EngineFullError: too many requests are waiting, in total or of this key.
            DeadlineError: it did not complete in time. A running run continues without it.
            EngineClosedError: the service was closed.
        """
        self._check_room(key.name)
        answer: asyncio.Future[tuple[Any, list[Any]]] = asyncio.get_running_loop().create_future()
        request = _Request(work, rows, adapter, key.name, answer)
        self._wait(request)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())
        try:
            found = await asyncio.wait_for(answer, self._limits.request_timeout)
        except asyncio.TimeoutError:
            raise DeadlineError("the request took longer than the service allows") from None
        except UsageError:
            if self.closed:  # caused by the closed session, not by the request
                raise EngineClosedError("the service ended") from None
            raise
        finally:
            self._drop(request)
        return cast("tuple[_Prepared, list[_Result]]", found)

    def _check_room(self, key: str) -> None:
        most, waiting = self._limits.max_waiting, self.waiting
        own = len(self._queues.get(key, ()))
        # A single key may use half of the queue.
        crowded = bool(key) and own >= max(1, most // 2)
        if waiting >= most or crowded:
            whose = " of this API key" if crowded else ""
            raise EngineFullError(
                f"{own if crowded else waiting} requests{whose} are waiting, the maximum",
                retry_after=max(self._seconds * (waiting + 1) / 2, 0.1),
            )

    def _wait(self, request: _Request) -> None:
        self._queues.setdefault(request.key, deque()).append(request)
        self._arrived.set()

    def _drop(self, request: _Request) -> None:
        queue = self._queues.get(request.key, deque())
        if request in queue:
            queue.remove(request)
            if not queue:
                del self._queues[request.key]

    # -- runs ----------------------------------------------------------------------------------

    async def _work(self) -> None:
        """Run waiting requests until there are none."""
        while self._queues:
            await self._gather()
            parts = self._take()
            if not parts:
                continue  # the waiting requests have timed out
            self.running = len(parts)
            begin = time.perf_counter()
            try:
                done = await asyncio.to_thread(self._run, parts)
            except Exception as defect:
                done = [defect] * len(parts)
            finally:
                taken = time.perf_counter() - begin
                self._seconds = taken if not self._seconds else 0.8 * self._seconds + 0.2 * taken
                self.running = 0
                self._on_run()
            for part, results in zip(parts, done, strict=True):
                self._finish(part.request, results)

    async def _gather(self) -> None:
        """Wait briefly for further requests, unless there are enough rows for a run."""
        end = time.monotonic() + self._limits.batch_delay
        while self._shares and self._waiting_rows() < self._limits.max_rows:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), max(end - time.monotonic(), 0))
            except asyncio.TimeoutError:
                return

    def _waiting_rows(self) -> int:
        waiting = (request for queue in self._queues.values() for request in queue)
        return sum(len(request.rows) - request.taken for request in waiting)

    def _take(self) -> list[_Part]:
        """Take the rows of the next run: the first request of each key in turn, up to the limit."""
        parts: list[_Part] = []
        room = self._limits.max_rows
        found = True
        while found:
            found = False
            for name, queue in list(self._queues.items()):
                groups = {part.request.work.group for part in parts}
                request = next((r for r in queue if not groups or r.work.group in groups), None)
                if request is None or not room:
                    continue
                rows = request.rows[request.taken : request.taken + room]
                parts.append(_Part(request, rows))
                request.taken += len(rows)
                room = room - len(rows) if self._shares else 0
                found = True
                # Move this request behind the key's other requests, and the key behind other keys.
                queue.remove(request)
                if request.taken < len(request.rows):
                    queue.append(request)
                del self._queues[name]
                if queue:
                    self._queues[name] = queue
        return parts

    def _run(self, parts: Sequence[_Part]) -> list[Sequence[Any] | Exception]:
        """Return the results of each part, or its error. Runs in a thread."""
        done: dict[_Part, Sequence[Any] | Exception] = {}
        ready = []
        for part in parts:
            try:
                self._begin(part.request)
            except Exception as problem:
                done[part] = problem
            else:
                ready.append(part)
        try:
            done.update(self._run_together(ready))
        except Exception as problem:
            for part in ready:  # run each alone, so that only the faulty one fails
                try:
                    done.update(self._run_together([part]) if len(ready) > 1 else {part: problem})
                except Exception as own:
                    done[part] = own
        return [done[part] for part in parts]

    def _begin(self, request: _Request) -> None:
        request.runs += 1
        if request.counts is None:
            request.counts = self._session.texts.counts(request.adapter)
            request.prepared = request.work.prepare()

    def _run_together(self, parts: Sequence[_Part]) -> dict[_Part, Sequence[Any]]:
        """Run the rows of several parts together; return the results of each part."""
        if not parts:
            return {}
        rows = [row for part in parts for row in part.rows]
        adapters = [part.request.adapter for part in parts for _ in part.rows]
        alike = all(adapter == adapters[0] for adapter in adapters)
        results = parts[0].request.work.run(rows, adapters[0] if alike else adapters)
        done, start = {}, 0
        for part in parts:
            done[part] = results[start : start + len(part.rows)]
            start += len(part.rows)
        return done

    def _finish(self, request: _Request, results: Sequence[Any] | Exception) -> None:
        """Answer a request if it failed or is complete."""
        if request.answer.done():
            return  # it was cancelled
        if isinstance(results, Exception):
            self._drop(request)
            request.answer.set_exception(results)
            return
        request.results.extend(results)
        if len(request.results) < len(request.rows):
            return
        assert request.counts is not None
        if request.runs == 1 or not self._session.texts.have_moved(request.adapter, request.counts):
            request.answer.set_result((request.prepared, request.results))
        elif request.attempts < ATTEMPTS:
            request.begin_again()  # its runs may have used two versions of the adapter
            self._wait(request)
        else:
            request.answer.set_exception(
                RequestError(
                    503,
                    "the adapter is being replaced: try again when that has ended",
                    param="model",
                    code="adapter_load_failed",
                    retry_after=1,
                )
            )


def rows_are_independent(session: AdapterSession) -> bool:
    """Whether a row's results do not depend on the other rows of its run.

    They do in dynamically quantized graphs, which have one scale for all rows, and may if
    onnxruntime does not report the graph's operators.
    """
    operators = {name for counts in session.placement.values() for name in counts}
    return bool(operators) and not any(name.startswith(SHARED_SCALE) for name in operators)
