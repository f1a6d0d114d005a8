"""The runs of a check: the variants and phases of each backend, and the progress through them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from loradeploy.parity.backends.table import Backend
from loradeploy.parity.context import CheckContext
from loradeploy.parity.phases.choice import phases_of
from loradeploy.parity.report.results import BASE_LABEL
from loradeploy.printable import logger_of

logger = logger_of(__name__)

# Durations of this many seconds or more are shown in minutes.
_MINUTES: Final = 100


def phases_in(backend: Backend, context: CheckContext) -> tuple[str, ...]:
    """Return the phases of this check in which the backend runs."""
    asked = context.phases or phases_of(context.manifest.task, embeds=bool(context.manifest.embeds))
    return tuple(phase for phase in asked if phase in backend.phases)


def varied(backend: Backend, context: CheckContext) -> list[CheckContext]:
    """Return the context of every variant in which the backend runs."""
    if not backend.on_onnxruntime:
        return [context]
    every = [context.at(variant) for variant in context.variants.each]
    return [
        at
        for at in every
        if (backend.captured or not at.captured)
        and (at.manifest.mode in backend.operated or not at.operator)
    ]


class Progress:
    """Logs the start of each run, and an estimate of the time left from the runs so far.

    A run is one backend with one adapter.
    """

    def __init__(self, backends: Sequence[Backend], context: CheckContext) -> None:
        self._total = sum(_run_count(backend, context) for backend in backends)
        self._begun = 0
        self._start = time.monotonic()

    def begin(self, backend: Backend, adapter: str | None, context: CheckContext) -> None:
        """Log the start of a run."""
        done, self._begun = self._begun, self._begun + 1
        named = [backend.title, "mixed" if backend.mixed else adapter or BASE_LABEL]
        if len(context.variants.each) > 1 and backend.on_onnxruntime:
            named.append(str(context.variant))
        left = ""
        if done:
            pace = (time.monotonic() - self._start) / done
            left = f" (about {_duration(pace * (self._total - done))} left)"
        logger.info("[%d/%d] %s%s", self._begun, self._total, ", ".join(named), left)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < _MINUTES else f"{seconds / 60:.0f} min"


def _run_count(backend: Backend, context: CheckContext) -> int:
    if backend.missing(context) is not None or not phases_in(backend, context):
        return 0
    base = not backend.needs_adapter and not context.merged
    adapters = 1 if backend.mixed else len(context.adapters) + base
    return adapters * len(varied(backend, context))
