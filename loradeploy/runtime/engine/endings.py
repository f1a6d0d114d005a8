"""End requests outside of a step: before their prompt was processed, and after a defect.

A defect is an error in a thread of the engine that no request caused. All requests fail with it,
and later ones are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from loradeploy.errors import EngineClosedError, shown
from loradeploy.printable import logger_of
from loradeploy.runtime.engine.submission import GenerationEvent, Submission, Usage
from loradeploy.runtime.tasks.generation import Generation

if TYPE_CHECKING:
    from loradeploy.runtime.engine.running import Running
    from loradeploy.runtime.engine.statistics import Moment, Observer

logger = logger_of(__name__)


def ended_by_defect(problem: BaseException) -> EngineClosedError:
    """The error of later calls to an engine that `problem` ended."""
    return EngineClosedError(
        f"the engine was ended by a defect ({type(problem).__name__}: {shown(str(problem))}):"
        " make another one, and see the log"
    )


def abandon(
    rest: Iterable[Running],
    problem: BaseException,
    fail: Callable[[Submission, BaseException], None],
) -> None:
    """Fail requests whose adapters are in use, after a defect."""
    for one in rest:
        try:
            one.close()
        except BaseException:  # the others must be failed too
            logger.exception("a request's adapter stays in use")
        fail(one.submission, problem)


def end_unprocessed(submission: Submission) -> int:
    """End a request that was cancelled before its prompt was processed.

    Returns the number of its texts that this ends.
    """
    choices, ended = submission.call.options[0].n, 0
    for choice in range(choices):
        nothing = Generation("", (), "cancelled", submission.adapter, 0, choice=choice)
        usage = Usage(0, 0) if choice == choices - 1 else None
        ended += submission.put(GenerationEvent(choice, "", generation=nothing, usage=usage))
    return ended


def guarded(observer: Observer | None) -> Observer:
    """Wrap `observer` so that its errors are logged and affect no request."""

    def observe(moment: Moment, seconds: float, submission: Submission | None) -> None:
        try:
            if observer is not None:
                observer(moment, seconds, submission)
        except BaseException:
            logger.exception("the observer of an engine fails at %s", moment)

    return observe
