"""The requests of an engine by state, and how they end outside of a step.

A request is in one of these states; `changed` guards all of them.

    State      Where             Next
    waiting    `queue`           preparing, by the loader; shed, late or cancelled: ended
    preparing  `preparing`       ready, with its adapter in use; refused or cancelled: ended
    ready      `ready`           running, when there are rows; late or cancelled: ended
    running    `running`         ended: with its last text, failed, late or cancelled
    ended      -                 its adapter is no longer in use

A defect of one of the engine's threads ends the engine (`defect`): waiting, preparing and ready
requests fail immediately, running ones when the thread that runs them detects it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loradeploy.errors import EngineClosedError, EngineFullError
from loradeploy.printable import logger_of
from loradeploy.runtime.engine.endings import abandon, end_unprocessed, ended_by_defect
from loradeploy.runtime.engine.queue import FairQueue
from loradeploy.runtime.engine.submission import Submission, too_late

if TYPE_CHECKING:
    from loradeploy.runtime.engine.running import Running
    from loradeploy.runtime.engine.statistics import EngineStatistics

logger = logger_of(__name__)


class EngineRequests:
    """The requests of one engine. `most`: the maximum number of waiting requests.

    `draining`: no more requests are accepted. `closed`: existing requests are only ended. `broken`:
    the defect that ended the engine.
    """

    def __init__(self, statistics: EngineStatistics, most: int) -> None:
        self.statistics, self.most = statistics, most
        self.lock = threading.RLock()  # acquired itself, see lifetime.py
        self.changed = threading.Condition(self.lock)
        self.queue: FairQueue[Submission] = FairQueue()
        self.preparing: Submission | None = None
        self.ready: deque[Running] = deque()
        self.running: dict[int, Running] = {}
        self.draining = self.closed = False
        self.broken: BaseException | None = None
        self._pace = 0.0  # moving average of seconds between ends
        self._last_end: float | None = None

    def check_open(self) -> None:
        """Raise EngineClosedError if no more requests are accepted. The caller holds the lock."""
        if self.broken is not None:
            raise ended_by_defect(self.broken)
        if self.draining:
            raise EngineClosedError("the engine accepts no more requests: it is closed or draining")

    def full(self) -> EngineFullError:
        """The error of a request when the queue is full."""
        waiting = self.most
        after = min(max(self._pace * (waiting + 1) / 2, 0.1), 60.0)
        return EngineFullError(
            f"{waiting} requests are waiting, the maximum: try again in {after:.1f} seconds",
            retry_after=after,
        )

    def unfinished(self) -> list[Submission]:
        """All requests that have not ended. The caller holds the lock."""
        preparing = [] if self.preparing is None else [self.preparing]
        prepared = [one.submission for one in (*self.ready, *self.running.values())]
        return [*self.queue, *preparing, *prepared]

    def stats(self) -> EngineStatistics:
        """The current statistics, a copy."""
        with self.lock:
            return replace(
                self.statistics,
                waiting=len(self.queue) + len(self.ready) + (self.preparing is not None),
                running=len(self.running),
                finished=Counter(self.statistics.finished),
                failed=Counter(self.statistics.failed),
                batch_sizes=Counter(self.statistics.batch_sizes),
            )

    def cancel(self, submission: Submission) -> None:
        """End a waiting request; the threads end those that they process."""
        with self.lock:
            waited = self.queue.remove(submission)
            self.changed.notify_all()
        if waited:
            self.end_unprocessed(submission)

    def end_unprocessed(self, submission: Submission) -> None:
        """End a request that was cancelled before its prompt was processed."""
        choices = end_unprocessed(submission)
        with self.lock:
            if choices:
                self.statistics.finished["cancelled"] += choices
            self.changed.notify_all()

    def fail(self, submission: Submission, problem: BaseException) -> None:
        """Fail a request, unless it has ended already, for example by a defect."""
        error = submission.fail(problem)
        with self.lock:
            if error is not None:
                self.statistics.failed[type(error).__name__] += 1
            self.changed.notify_all()

    def defect(self, problem: BaseException) -> None:
        """End the engine after a defect in one of its threads, so that nobody waits forever.

        Running requests are failed by the thread that runs them.
        """
        logger.error("a defect ends the engine", exc_info=problem)
        with self.lock:
            self.draining = self.closed = True
            self.broken = self.broken or problem
            waiting = list(self.queue)
            for submission in waiting:
                self.queue.remove(submission)
            if self.preparing is not None:
                waiting.append(self.preparing)
                self.preparing = None
            ready, self.ready = self.ready, deque()
            self.changed.notify_all()
        for submission in waiting:
            self.fail(submission, problem)
        abandon(ready, problem, self.fail)

    def drop_ready(self) -> None:
        """End requests that were cancelled or became late before there were rows for them."""
        now = time.monotonic()
        with self.lock:
            late = [one for one in self.ready if one.submission.late(now)]
            idle = [one for one in self.ready if one.submission.cancelled and one not in late]
            for one in (*late, *idle):
                self.ready.remove(one)
            if late or idle:
                self.changed.notify_all()
        for one in (*late, *idle):
            one.close()
        for one in late:
            self.fail(one.submission, too_late())
        for one in idle:
            self.end_unprocessed(one.submission)

    def release(self, ended: Sequence[tuple[Running, BaseException | None]]) -> None:
        """Release the requests that ended in a round of the worker."""
        for one, problem in ended:
            one.close()
            if problem is not None:
                self.fail(one.submission, problem)
        if not ended:
            return
        now = time.monotonic()
        with self.lock:
            for one, _ in ended:
                del self.running[one.number]
            if self._last_end is not None:
                each = (now - self._last_end) / len(ended)
                self._pace = each if not self._pace else 0.8 * self._pace + 0.2 * each
            self._last_end = now
            self.changed.notify_all()
