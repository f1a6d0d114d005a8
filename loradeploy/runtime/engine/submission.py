"""A submitted request of an engine and its results, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loradeploy.errors import DeadlineError, RunError, UsageError, shown
from loradeploy.given_numbers import checked_number

if TYPE_CHECKING:
    from types import TracebackType

    from loradeploy.runtime.adapters.resident import AdapterSpec
    from loradeploy.runtime.decoding.choosing.logprobs import TokenLogprob
    from loradeploy.runtime.decoding.prompts.calls import Call
    from loradeploy.runtime.tasks.generation import Generation


@dataclass(frozen=True)
class Usage:
    """The token counts of a request.

    Args:
        prompt_tokens: number of tokens of the prompt.
        completion_tokens: number of generated tokens, in all of its texts.
        cached_tokens: prompt tokens whose keys and values were in the prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class GenerationEvent:
    """An update of one of a request's texts.

    Args:
        choice: index of the text, of the request's `n` texts.
        text: the new, final text; the events of a text add up to it.
        token_ids: the new tokens; their text may follow in a later event.
        logprobs: one for each of `token_ids`, if requested.
        generation: the whole text with its finish_reason, in its last event.
        usage: of the whole request, in its last event.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    generation: Generation | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Completion:
    """The result of a request.

    Args:
        generations: its `n` texts.
        usage: its token counts.
    """

    generations: tuple[Generation, ...]
    usage: Usage


class Submission:
    """A request that was submitted with `Engine.submit`.

    `async for event in submission` and `for event in submission` yield its events as they arrive,
    and `result` returns the complete result; `started` waits until its adapter and its prompt are
    read.
    If a request fails, all of these raise its error. It runs even if its events are not read:
    `cancel` ends it, and so does the end of an `async with submission`.
    """

    def __init__(
        self,
        number: int,
        call: Call,
        scope: str | None,
        deadline: float | None,
        on_cancel: Callable[[Submission], None],
        limited: bool,
    ) -> None:
        self.number = number
        self.call = call
        self.scope = scope
        self.deadline = deadline  # by time.monotonic
        self.limited = limited  # max_new_tokens was given, and must not be reduced
        self.created = time.monotonic()
        self.prompt_tokens: int | None = None
        self.cached_tokens = 0
        self._on_cancel = on_cancel
        self._lock = threading.RLock()  # acquired itself, see lifetime.py
        self._changed = threading.Condition(self._lock)
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._events: deque[GenerationEvent] = deque()
        self._generations: dict[int, Generation] = {}
        self._usage: Usage | None = None
        self._error: Exception | None = None
        self._started = False
        self._cancelled = False

    @property
    def adapter(self) -> AdapterSpec | None:
        """The requested adapter."""
        return self.call.adapters[0]

    @property
    def done(self) -> bool:
        """Whether it has ended, successfully or not."""
        return self._usage is not None or self._error is not None

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled

    def late(self, now: float) -> bool:
        """Whether its deadline has passed at `now`, by time.monotonic."""
        return self.deadline is not None and self.deadline <= now

    def cancel(self) -> None:
        """End its texts as "cancelled" before the next token."""
        self._cancelled = True
        self._on_cancel(self)

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for its end.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds; it continues.
            LoraDeployError: the request failed.
        """
        with self._lock:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended after {timeout} seconds")
        return self._completion()

    async def completion(self) -> Completion:
        """Like `result`, for asyncio."""
        await self._until(lambda: self.done)
        return self._completion()

    async def started(self) -> int:
        """Wait until it joins the batch, and return the number of tokens of its prompt.

        Raises its error if its prompt or its adapter is refused.
        """
        await self._until(lambda: self._started or self.done)
        if self._error is not None:
            raise self._error
        return self.prompt_tokens or 0

    def _completion(self) -> Completion:
        if self._error is not None:
            raise self._error
        assert self._usage is not None
        return Completion(
            tuple(self._generations[choice] for choice in sorted(self._generations)), self._usage
        )

    # -- events --------------------------------------------------------------------------------

    def __aiter__(self) -> Submission:
        return self

    async def __anext__(self) -> GenerationEvent:
        await self._until(lambda: bool(self._events) or self.done)
        event = self._next()
        if event is None:
            raise StopAsyncIteration
        return event

    def __iter__(self) -> Iterator[GenerationEvent]:
        return self

    def __next__(self) -> GenerationEvent:
        with self._lock:
            self._changed.wait_for(lambda: self._events or self.done)
        event = self._next()
        if event is None:
            raise StopIteration
        return event

    def _next(self) -> GenerationEvent | None:
        with self._lock:
            if self._events:
                return self._events.popleft()
        if self._error is not None:
            raise self._error
        return None

    async def _until(self, ready: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                if ready():
                    return
                woken = loop.create_future()
                self._waiting.append((loop, woken))
            await woken

    async def __aenter__(self) -> Submission:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.done:
            self.cancel()

    # -- the engine's side ---------------------------------------------------------------------

    def start(self, prompt_tokens: int, cached_tokens: int = 0) -> None:
        """Mark it as started; called by the engine."""
        with self._lock:
            self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens
            self._started = True
            self._wake()

    def put(self, event: GenerationEvent) -> bool:
        """Add an event; called by the engine. An event with a usage is the last.

        Returns False if the request had ended already.
        """
        with self._lock:
            if self.done:
                return False
            self._events.append(event)
            if event.generation is not None:
                self._generations[event.choice] = event.generation
            self._usage = event.usage
            self._wake()
        return True

    def fail(self, problem: BaseException) -> Exception | None:
        """Fail it with `problem`, or a RunError caused by it; called by the engine.

        Returns the error that readers get, or None if the request had ended already. What is not an
        Exception, such as a panic of a Rust library, becomes the cause of a RunError.
        """
        if isinstance(problem, Exception):
            error = problem
        else:
            error = RunError(f"{type(problem).__name__}: {shown(str(problem), 200)}")
            error.__cause__ = problem
        with self._lock:
            first = not self.done
            if first:
                self._error = error
                self._wake()
        return error if first else None

    def _wake(self) -> None:
        """Wake all waiting threads and tasks. The caller holds `_changed`."""
        self._changed.notify_all()
        waiting, self._waiting = self._waiting, []
        for loop, woken in waiting:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(_set, woken)


def too_late() -> DeadlineError:
    """The error of a request whose deadline passed."""
    return DeadlineError("the request's deadline passed before it ended")


def _set(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


def deadline_of(seconds: object) -> float | None:
    """The time, by time.monotonic, that is `seconds` from now; None for None.

    Raises:
        UsageError: it is not a number above 0.
    """
    if seconds is None:
        return None
    number = checked_number(seconds)
    if number is None or not number > 0:
        raise UsageError(f"deadline is {shown(seconds)}: give seconds, a number above 0, or None")
    return time.monotonic() + number
