"""What the routes of one service share: the session, its engine or encoder, keys, metrics."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from loradeploy.adapter.tasks import CAUSAL_LM, FEATURE_EXTRACTION, SEQUENCE_CLASSIFICATION
from loradeploy.errors import DeadlineError, EngineClosedError, EngineFullError, UsageError
from loradeploy.runtime.engine.engine import Engine
from loradeploy.runtime.session import AdapterSession
from loradeploy.serve.catalog import Catalog
from loradeploy.serve.grammar import Grammars
from loradeploy.serve.keys import ApiKey, KeyRing
from loradeploy.serve.metrics import Metrics
from loradeploy.serve.problems import RequestError
from loradeploy.serve.settings import ServeLimits

_Result = TypeVar("_Result")
# The tasks that a route answers.
_SERVED: Final = (CAUSAL_LM, FEATURE_EXTRACTION, SEQUENCE_CLASSIFICATION)


class Service:
    """A bundle that is served.

    `root`: the adapter root. `updates`: whether adapters may be loaded and unloaded by requests.
    `keys`: None where anybody may ask. `host`: the address that it is reached by.

    Raises:
        UsageError: as `Catalog`, or the bundle is for a task that no route answers.
    """

    def __init__(
        self,
        session: AdapterSession,
        *,
        limits: ServeLimits,
        keys: KeyRing | None = None,
        root: Path | None = None,
        updates: bool = False,
        host: str = "127.0.0.1",
    ) -> None:
        if session.manifest.task not in _SERVED:
            raise UsageError(
                f"a bundle for {session.manifest.task} is not served, only one for"
                f" {', '.join(_SERVED)}: run it with `loradeploy run` or the Python API"
            )
        self.session = session
        self.limits = limits
        self.keys = keys
        self.updates = updates
        self.host = host
        self.created = int(time.time())
        self.metrics = Metrics()
        self.metrics.watch_adapters(lambda: session.statistics)
        self.catalog = Catalog(
            session,
            root=root,
            max_bytes=limits.max_adapter_bytes,
            on_load=self.metrics.adapter_loaded,
        )
        self.engine: Engine | None = None
        self.encoder = EncoderQueue(limits)
        if session.manifest.task == CAUSAL_LM:
            self.engine = Engine(
                session,
                max_rows=limits.max_rows,
                max_waiting=limits.max_waiting,
                observer=self.metrics.observe,
            )
            self.metrics.watch_engine(self.engine.stats)
        else:
            self.metrics.watch_queue(lambda: self.encoder.waiting, lambda: self.encoder.running)
        self.grammars = Grammars(session)
        self.draining = False

    def now(self) -> int:
        """Seconds since 1970, for answers."""
        return int(time.time())

    def text_engine(self) -> Engine:
        """The engine.

        Raises:
            RequestError: 404, the bundle generates no text; 503, the engine has failed.
        """
        if self.engine is None:
            raise RequestError(
                404, f"this bundle is for {self.session.manifest.task}: it generates no text"
            )
        self.check_alive()
        return self.engine

    def check_alive(self) -> None:
        """Raise RequestError, 503, where the engine ended by a defect: a new process is needed."""
        if self.engine is not None and not self.engine.alive and not self.draining:
            raise RequestError(
                503, "the engine has failed: restart the service", code="engine_failed"
            )

    def check_task(self, task: str, what: str) -> None:
        """Raise RequestError, 404, unless the bundle is for `task`, which gives `what`."""
        own = self.session.manifest.task
        if own != task:
            raise RequestError(404, f"this bundle is for {own}: it gives no {what}")

    def start(self) -> None:
        """Begin to work."""
        if self.engine is not None:
            self.engine.start()

    def drain(self) -> None:
        """Take no more requests, and wait for those that there are, as long as the limits have."""
        self.draining = True
        if self.engine is not None:
            self.engine.drain(self.limits.drain_timeout)

    def close(self) -> None:
        """End whatever goes on, and let go of the bundle."""
        self.draining = self.encoder.closed = True
        if self.engine is not None:
            self.engine.close()
        self.session.close()


class EncoderQueue:
    """Requests of an encoder, one of which runs at a time; for one asyncio loop.

    `waiting` and `running` are how many there are. `closed`: whether the session is, or will be.
    """

    def __init__(self, limits: ServeLimits) -> None:
        self._limits = limits
        self._turn = asyncio.Lock()
        self._seconds = 0.0  # of a request, of late
        self._of_keys: Counter[str] = Counter()  # how many wait, by the key's name
        self.waiting = 0
        self.running = 0
        self.closed = False

    async def run(self, work: Callable[[], _Result], key: ApiKey) -> _Result:
        """What `work` returns, which runs in a thread.

        Raises:
            EngineFullError: too many wait, or too many of this key.
            DeadlineError: it did not end in time. A run that has begun goes on for nobody.
            EngineClosedError: the service ended.
        """
        most = self._limits.max_waiting
        # One key leaves room for others.
        crowded = bool(key.name) and self._of_keys[key.name] >= max(1, most // 2)
        if self.waiting >= most or crowded:
            after = max(self._seconds * (self.waiting + 1) / 2, 0.1)
            whose = " of this API key" if crowded else ""
            raise EngineFullError(
                f"{self._of_keys[key.name] if crowded else self.waiting} requests{whose} wait, as"
                " many as may",
                retry_after=after,
            )
        end = time.monotonic() + self._limits.request_timeout
        try:
            with self._counted(key):
                await asyncio.wait_for(self._turn.acquire(), self._limits.request_timeout)
            self.running += 1
            # A client that is gone does not make room: the thread goes on.
            run = asyncio.ensure_future(self._run(work))
            return await asyncio.wait_for(asyncio.shield(run), max(end - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            raise DeadlineError("the request took longer than the service allows") from None
        except UsageError:
            if self.closed:  # of the session, not of the request
                raise EngineClosedError("the service ended") from None
            raise

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        begin = time.perf_counter()
        try:
            return await asyncio.to_thread(work)
        finally:
            taken = time.perf_counter() - begin
            self._seconds = taken if not self._seconds else 0.8 * self._seconds + 0.2 * taken
            self.running -= 1
            self._turn.release()

    @contextmanager
    def _counted(self, key: ApiKey) -> Iterator[None]:
        self.waiting += 1
        self._of_keys[key.name] += 1
        try:
            yield
        finally:
            self.waiting -= 1
            self._of_keys[key.name] -= 1
