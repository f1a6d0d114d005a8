"""The thread of an engine that loads adapters and tokenizes prompts of waiting requests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from loradeploy.runtime.decoding.prompts.reading import PromptReader
from loradeploy.runtime.engine.endings import abandon
from loradeploy.runtime.engine.running import prepare
from loradeploy.runtime.engine.submission import too_late

if TYPE_CHECKING:
    from loradeploy.runtime.engine.requests import EngineRequests
    from loradeploy.runtime.engine.submission import Submission
    from loradeploy.runtime.engine.worker import Worker
    from loradeploy.runtime.session import AdapterSession

# Requests that are prepared in advance: half the number of rows, but at least this many.
_AHEAD: Final = 4


class Loader:
    """Prepares requests for the rows of `worker`, in the order of the queue."""

    def __init__(self, session: AdapterSession, requests: EngineRequests, worker: Worker) -> None:
        self._session, self._requests, self._worker = session, requests, worker
        self._reader = PromptReader(session)
        self._ahead = max(_AHEAD, worker.slots // 2)

    def run(self) -> None:
        """Run until the engine is closed, or ended by a defect."""
        try:
            self._run()
        except BaseException as problem:
            self._requests.defect(problem)

    def _run(self) -> None:
        requests = self._requests
        while True:
            late: list[Submission] = []
            taken = None
            with requests.lock:
                requests.changed.wait_for(
                    lambda: (
                        requests.closed or (requests.queue and len(requests.ready) < self._ahead)
                    ),
                    self._timeout(),
                )
                if requests.closed and not requests.queue:
                    return
                now = time.monotonic()
                for submission in list(requests.queue):
                    if submission.late(now):
                        requests.queue.remove(submission)
                        late.append(submission)
                if self._has_room():
                    taken = requests.preparing = requests.queue.pop()
            for submission in late:
                requests.fail(submission, too_late())
            if taken is not None:
                self._prepare(taken)

    def _has_room(self) -> bool:
        """Whether another request may be prepared. The caller holds the lock."""
        return bool(self._requests.queue) and len(self._requests.ready) < self._ahead

    def _timeout(self) -> float | None:
        """Seconds until the next deadline of a waiting request. The caller holds the lock."""
        requests = self._requests
        ends = [one.deadline for one in requests.queue if one.deadline is not None]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _prepare(self, submission: Submission) -> None:
        requests, running = self._requests, None
        try:
            if not submission.cancelled:
                running = prepare(
                    self._session,
                    self._reader,
                    submission,
                    self._worker.slots,
                    self._worker.budget,
                    self._worker.positions,
                )
        except BaseException as problem:  # a panic of a Rust tokenizer is not an Exception
            requests.fail(submission, problem)
        else:
            if running is None:
                requests.end_unprocessed(submission)
        with requests.lock:
            requests.preparing = None
            broken = requests.broken
            if running is not None and broken is None:
                requests.ready.append(running)
            requests.changed.notify_all()
        if running is not None and broken is not None:
            abandon([running], broken, requests.fail)
