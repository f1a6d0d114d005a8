"""The state of a service that its routes share: session, engine or encoder, keys, metrics."""

from __future__ import annotations

import time
from typing import Final

from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    CLASSIFICATIONS,
    FEATURE_EXTRACTION,
    TASK_TABLE,
    VISION_TOWER,
)
from loradeploy.errors import UsageError
from loradeploy.runtime.engine.engine import Engine
from loradeploy.runtime.session import AdapterSession
from loradeploy.serve.adapters.catalog import Catalog
from loradeploy.serve.adapters.roots import AdapterRoot
from loradeploy.serve.encoding import EncoderQueue
from loradeploy.serve.grammar import Grammars
from loradeploy.serve.keys import KeyRing
from loradeploy.serve.metrics import Metrics
from loradeploy.serve.problems import RequestError
from loradeploy.serve.settings import HOST, ServeLimits
from loradeploy.serve.vision import Vision

# The tasks that have routes.
_SERVED: Final = (CAUSAL_LM, FEATURE_EXTRACTION, *CLASSIFICATIONS)


class Service:
    """A bundle that is served.

    `root`: the adapter root. `updates`: whether requests may load and unload adapters. `keys`: None
    if no key is required. `host`: the address that clients use. `vision`: the vision tower of a
    vision-language model, whose decoder the bundle is.

    Raises:
        UsageError: as `Catalog`, or the bundle is for a task without routes.
    """

    def __init__(
        self,
        session: AdapterSession,
        *,
        limits: ServeLimits,
        keys: KeyRing | None = None,
        root: AdapterRoot | None = None,
        updates: bool = False,
        host: str = HOST,
        vision: Vision | None = None,
    ) -> None:
        if (task := session.manifest.task) not in _SERVED:
            runner = TASK_TABLE[task].runner
            alone = "ImageTextGenerator" if task == VISION_TOWER else "AdapterSession.run"
            use = f"`loradeploy run` or {runner}" if runner else alone
            raise UsageError(
                f"a bundle for {task} is not served, only one for"
                f" {', '.join(_SERVED)}: run it with {use}"
            )
        self.session = session
        self.vision = vision
        self.limits = limits
        self.keys = keys
        self.updates = updates
        self.host = host
        self.created = int(time.time())
        self.metrics = Metrics()
        self.metrics.watch_adapters(lambda: session.statistics)
        self.metrics.watch_captures(lambda: session.capture_statistics)
        self.catalog = Catalog(
            session,
            root=root,
            others=() if vision is None else vision.generator.tower.adapters,
            max_bytes=limits.max_adapter_bytes,
            on_load=self.metrics.adapter_loaded,
        )
        self.engine: Engine | None = None
        self.encoder = EncoderQueue(limits, session, on_run=self.metrics.encoder_ran)
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
        """The Unix time in seconds, for responses."""
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
        """Raise RequestError, 503, if the engine ended by a defect: a new process is needed."""
        if self.engine is not None and not self.engine.alive and not self.draining:
            raise RequestError(
                503, "the engine has failed: restart the service", code="engine_failed"
            )

    def check_ready(self) -> None:
        """Raise RequestError, 503, if no requests are accepted."""
        self.check_alive()
        if self.draining:
            raise RequestError(503, "the service is shutting down", code="shutting_down")

    def check_task(self, task: str, what: str) -> None:
        """Raise RequestError, 404, unless the bundle is for `task`, which computes `what`."""
        own = self.session.manifest.task
        if own != task:
            raise RequestError(404, f"this bundle is for {own}: it gives no {what}")

    def start(self) -> None:
        """Start the engine."""
        if self.engine is not None:
            self.engine.start()

    def drain(self) -> None:
        """Accept no more requests, and wait for running ones, at most for the drain timeout."""
        self.draining = True
        if self.engine is not None:
            self.engine.drain(self.limits.drain_timeout)

    def close(self) -> None:
        """End all requests, and release the bundle."""
        self.draining = self.encoder.closed = True
        if self.engine is not None:
            self.engine.close()
        if self.vision is not None:
            self.vision.close()
        self.session.close()
        if self.catalog.root is not None:
            self.catalog.root.close()
