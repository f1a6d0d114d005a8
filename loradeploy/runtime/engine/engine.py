"""The engine: requests that come one by one are generated together, each with its adapter.

A request is in one of these states; `_changed` guards all of them.

    State      Where                    Goes on to
    waits      `_queue`                 prepared, by the loader; shed, late or cancelled: ended
    prepared   `_preparing`             ready, with its adapter in use; refused or cancelled: ended
    ready      `_ready`                 runs, where there are rows; late or cancelled: ended
    runs       `_running`, the worker   ended: with its last text, failed, late or cancelled
    ended      nowhere                  its adapter is no longer in use

A defect of either thread ends the engine (`_break`): what waits, is prepared or ready ends with its
error at once, what runs when the engine's thread has seen it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Final

from loradeploy.errors import (
    EngineClosedError,
    EngineFullError,
    UsageError,
)
from loradeploy.printable import logger_of
from loradeploy.runtime.adapters.resident import AdapterSpec, weights_of
from loradeploy.runtime.arguments import check_adapters, check_count
from loradeploy.runtime.decoding.calls import Call, Prompt
from loradeploy.runtime.decoding.reading import PromptReader
from loradeploy.runtime.engine.endings import abandon, end_unread, ended_by_defect, guarded
from loradeploy.runtime.engine.queue import FairQueue
from loradeploy.runtime.engine.running import Running, prepare
from loradeploy.runtime.engine.statistics import EngineStatistics, Observer
from loradeploy.runtime.engine.submission import (
    Submission,
    deadline_of,
    too_late,
)
from loradeploy.runtime.engine.worker import Worker
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loradeploy.runtime.decoding.options import GenerationFlags

logger = logger_of(__name__)

# Requests whose adapters are read while they wait for rows: for half of the rows, or these.
_AHEAD: Final = 4
# Characters of a text for a token, to weigh requests by before they are read.
_CHARACTERS: Final = 4


class Engine:
    """Generates requests of a decoder bundle together, as they come, each with its own adapter.

    A request joins the others between two tokens and leaves when it has ended; its texts are those
    that it would get alone. Two threads of its own do the work, from `start` (or the beginning of
    a `with`) until `close`: one reads adapters and prompts of requests that wait, the other runs
    the graph. It may be used from several threads, and with asyncio.

    `bundle`: a session on a decoder bundle, or a generator of one.
    `max_rows`: how many texts are generated together. `max_waiting`: how many requests may wait
    for that. `prefill_chunk`: so many tokens of a prompt are read between two steps of the others.
    `cache_budget`: the bytes that the rows' keys and values may take, by default half of what the
    machine has available (Linux, on the CPU).
    `prefix_budget`: the bytes that keys and values of prompts' beginnings may take, which later
    prompts of the same adapter and scope begin with; 0 keeps none.
    `observer`: called with what it measures, see `Moment`.

    Raises:
        UsageError: as `TextGenerator`, or a number below 1.
    """

    def __init__(
        self,
        bundle: AdapterSession | TextGenerator,
        *,
        max_rows: int = 8,
        max_waiting: int = 64,
        prefill_chunk: int = 64,
        cache_budget: int | None = None,
        prefix_budget: int = 256 << 20,
        observer: Observer | None = None,
    ) -> None:
        for name, value in (
            ("max_rows", max_rows),
            ("max_waiting", max_waiting),
            ("prefill_chunk", prefill_chunk),
        ):
            check_count(name, value)
        if cache_budget is not None:
            check_count("cache_budget", cache_budget)
        if (
            isinstance(prefix_budget, bool)
            or not isinstance(prefix_budget, int)
            or prefix_budget < 0
        ):
            raise UsageError(f"prefix_budget is {prefix_budget!r}: give bytes, 0 for none")
        generator = bundle if isinstance(bundle, TextGenerator) else TextGenerator(bundle)
        self.session = generator.session
        self.tokenizer = generator.tokenizer
        self._reader = PromptReader(self.session)
        self._max_waiting = max_waiting
        self._ahead = max(_AHEAD, max_rows // 2)
        self._statistics = EngineStatistics(slots=max_rows)
        self._worker = Worker(
            self.session,
            self.tokenizer.pad_id,
            self._statistics,
            guarded(observer),
            slots=max_rows,
            chunk=prefill_chunk,
            budget=cache_budget,
            prefixes=prefix_budget,
        )
        self._changed = threading.Condition()
        self._queue: FairQueue[Submission] = FairQueue()
        self._preparing: Submission | None = None
        self._ready: deque[Running] = deque()
        self._running: dict[int, Running] = {}
        self._threads: list[threading.Thread] = []
        self._number = 0
        self._pace = 0.0  # seconds from one request's end to the next one's, of late
        self._last_end: float | None = None
        self._draining = self._closed = False
        self._broken: BaseException | None = None  # the defect that ended it

    # -- life ----------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether it serves what was submitted: False once it is closed, or a defect ended it."""
        return not self._closed

    def start(self) -> Engine:
        """Begin to work; what was submitted before waits until then."""
        with self._changed:
            if self._broken is not None:
                raise ended_by_defect(self._broken)
            if self._closed:
                raise EngineClosedError("this engine is closed: make another one")
            if not self._threads:
                self._threads = [
                    threading.Thread(target=self._loader, name="loradeploy-loader", daemon=True),
                    threading.Thread(target=self._work, name="loradeploy-engine", daemon=True),
                ]
                for thread in self._threads:
                    thread.start()
        return self

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait until those that there are have ended.

        True where they all have; after `timeout` seconds the others are cancelled.
        """
        with self._changed:
            self._draining = True
            empty = self._changed.wait_for(lambda: not self._unfinished(), timeout)
            rest = self._unfinished()
        for submission in rest:
            submission.cancel()
        if rest and self._threads:
            with self._changed:
                self._changed.wait_for(lambda: not self._unfinished())
        return empty

    def close(self) -> None:
        """Cancel all requests and end; the session stays open. A second call changes nothing."""
        with self._changed:
            self._draining = self._closed = True
            rest = self._unfinished()
            self._changed.notify_all()
        for submission in rest:
            submission.cancel()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- requests ------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        adapter: AdapterSpec | None = None,
        *,
        seed: int = 0,
        chat: bool = False,
        scope: str | None = None,
        deadline: float | None = None,
        shorten: bool = False,
        **options: Unpack[GenerationFlags],
    ) -> Submission:
        """Take a request in, and return at once.

        `prompt`, `adapter`, `seed`, `chat` and `options` are as those of one prompt of
        `TextGenerator.generate`. `scope`: whose it is, such as an API key: scopes take turns, and
        nothing that is kept of a prompt serves another scope. `deadline`: seconds from now after
        which it fails, wherever it is. `shorten`: fewer than `max_new_tokens` will do where a row
        has less room, instead of a BudgetError; so it is without `max_new_tokens`.

        Raises:
            UsageError: as `TextGenerator.generate`, but for what needs the adapter or the prompt's
                tokens, which the submission raises, and UnknownAdapterError, AdapterError and
                BudgetError with it.
            EngineFullError: as many requests wait as may; with `retry_after`.
            EngineClosedError: the engine is closed, drains, or was ended by a defect.
        """
        if not (adapter is None or isinstance(adapter, str)):
            check_adapters([adapter])
            weights_of(adapter)
        until = deadline_of(deadline)
        call = Call.of([prompt], [adapter], seed, chat, None, None, options)
        own = call.options[0]
        # Blends of the same adapters are one flow, whatever their weights are.
        names = () if adapter is None else tuple(name for name, _ in weights_of(adapter))
        length = len(prompt) // _CHARACTERS if isinstance(prompt, str) else len(prompt)
        cost = 1 + length + own.max_new_tokens * max(own.n, own.num_beams)
        shed = None
        with self._changed:
            self._check_open()
            if len(self._queue) >= self._max_waiting:
                self._statistics.refused += 1
                shed = self._queue.shed(scope)
                if shed is None:
                    raise self._full()
            self._number += 1
            limited = "max_new_tokens" in options and not shorten
            submission = Submission(self._number, call, scope, until, self._cancel, limited)
            self._queue.push(submission, scope, names, cost)
            self._statistics.submitted += 1
            self._changed.notify_all()
        if shed is not None:
            self._fail(shed, self._full())
        return submission

    def stats(self) -> EngineStatistics:
        """What it did and has at hand, a copy."""
        with self._changed:
            return replace(
                self._statistics,
                waiting=len(self._queue) + len(self._ready) + (self._preparing is not None),
                running=len(self._running),
                finished=Counter(self._statistics.finished),
                failed=Counter(self._statistics.failed),
                batch_sizes=Counter(self._statistics.batch_sizes),
            )

    def _check_open(self) -> None:
        """Raise EngineClosedError where no more requests are taken. `_changed` is held."""
        if self._broken is not None:
            raise ended_by_defect(self._broken)
        if self._draining:
            raise EngineClosedError("the engine takes no more requests: it is closed, or drains")

    def _full(self) -> EngineFullError:
        waiting = self._max_waiting
        after = min(max(self._pace * (waiting + 1) / 2, 0.1), 60.0)
        return EngineFullError(
            f"{waiting} requests wait, as many as may: try again in {after:.1f} seconds",
            retry_after=after,
        )

    def _unfinished(self) -> list[Submission]:
        """All requests that have not ended. `_changed` is held."""
        preparing = [] if self._preparing is None else [self._preparing]
        prepared = [one.submission for one in (*self._ready, *self._running.values())]
        return [*self._queue, *preparing, *prepared]

    def _cancel(self, submission: Submission) -> None:
        """End a request that waits; the threads see to those that they have."""
        with self._changed:
            waited = self._queue.remove(submission)
            self._changed.notify_all()
        if waited:
            self._end_unread(submission)

    def _end_unread(self, submission: Submission) -> None:
        """The end of a request that was cancelled before its prompt was read."""
        choices = end_unread(submission)
        with self._changed:
            self._statistics.finished["cancelled"] += choices
            self._changed.notify_all()

    def _fail(self, submission: Submission, problem: BaseException) -> None:
        name = type(submission.fail(problem)).__name__
        with self._changed:
            self._statistics.failed[name] += 1
            self._changed.notify_all()

    def _break(self, problem: BaseException) -> None:
        """The end by a defect in one of the threads: nobody may wait for ever.

        What runs is let go of by the thread that runs it.
        """
        logger.error("a defect ends the engine", exc_info=problem)
        with self._changed:
            self._draining = self._closed = True
            self._broken = self._broken or problem
            waiting = list(self._queue)
            for submission in waiting:
                self._queue.remove(submission)
            if self._preparing is not None:
                waiting.append(self._preparing)
                self._preparing = None
            ready, self._ready = self._ready, deque()
            self._changed.notify_all()
        for submission in waiting:
            self._fail(submission, problem)
        abandon(ready, problem, self._fail)

    # -- the thread that reads adapters and prompts --------------------------------------------

    def _loader(self) -> None:
        try:
            self._load()
        except BaseException as problem:
            self._break(problem)

    def _load(self) -> None:
        while True:
            late: list[Submission] = []
            taken = None
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or (self._queue and len(self._ready) < self._ahead),
                    self._patience(),
                )
                if self._closed and not self._queue:
                    return
                now = time.monotonic()
                for submission in list(self._queue):
                    if submission.late(now):
                        self._queue.remove(submission)
                        late.append(submission)
                if self._queue and len(self._ready) < self._ahead:
                    taken = self._preparing = self._queue.pop()
            for submission in late:
                self._fail(submission, too_late())
            if taken is not None:
                self._prepare(taken)

    def _patience(self) -> float | None:
        """Seconds until the next deadline of those that wait. `_changed` is held."""
        ends = [one.deadline for one in self._queue if one.deadline is not None]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _prepare(self, submission: Submission) -> None:
        running = None
        try:
            if not submission.cancelled:
                running = prepare(
                    self.session,
                    self._reader,
                    submission,
                    self._worker.slots,
                    self._worker.budget,
                    self._worker.positions,
                )
        except BaseException as problem:  # a panic of a tokenizer is no Exception
            self._fail(submission, problem)
        else:
            if running is None:
                self._end_unread(submission)
        with self._changed:
            self._preparing = None
            broken = self._broken
            if running is not None and broken is None:
                self._ready.append(running)
            self._changed.notify_all()
        if running is not None and broken is not None:
            abandon([running], broken, self._fail)

    # -- the thread that runs the graph --------------------------------------------------------

    def _work(self) -> None:
        try:
            self._rounds()
        except BaseException as problem:
            self._break(problem)
        finally:
            with self._changed:
                rest, self._running = list(self._running.values()), {}
                broken = self._broken
            if broken is not None:
                abandon(rest, broken, self._fail)
            self._worker.close()

    def _rounds(self) -> None:
        while True:
            self._drop_ready()
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._ready or self._running)
                if self._broken is not None or (self._closed and not self._unfinished()):
                    return
                while self._ready and self._worker.fits(self._ready[0]):
                    one = self._ready.popleft()
                    self._running[one.number] = one
                    self._worker.admit(one)
                    self._changed.notify_all()  # the loader has room for another one
                if not self._running:  # what is ready is being read, or nothing goes on
                    self._changed.wait(0.05)
                    continue
            self._changed_by(self._worker.advance())

    def _drop_ready(self) -> None:
        """Let go of requests that were cancelled, or are late, before there were rows for them."""
        now = time.monotonic()
        with self._changed:
            late = [one for one in self._ready if one.submission.late(now)]
            idle = [one for one in self._ready if one.submission.cancelled and one not in late]
            for one in (*late, *idle):
                self._ready.remove(one)
            if late or idle:
                self._changed.notify_all()
        for one in (*late, *idle):
            one.close()
        for one in late:
            self._fail(one.submission, too_late())
        for one in idle:
            self._end_unread(one.submission)

    def _changed_by(self, ended: Sequence[tuple[Running, BaseException | None]]) -> None:
        """Let go of what has ended in a round of the worker."""
        for one, problem in ended:
            one.close()
            if problem is not None:
                self._fail(one.submission, problem)
        if not ended:
            return
        now = time.monotonic()
        with self._changed:
            for one, _ in ended:
                del self._running[one.number]
            if self._last_end is not None:
                each = (now - self._last_end) / len(ended)
                self._pace = each if not self._pace else 0.8 * self._pace + 0.2 * each
            self._last_end = now
            self._changed.notify_all()
