"""Localizes failures of a check: compares values inside both sides, module by module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.errors import first_line
from loradeploy.parity.backends.table import Backend
from loradeploy.parity.context import CheckContext
from loradeploy.parity.diagnose.inside import GRAPHS, MODELS, TorchRow, other_side
from loradeploy.parity.diagnose.search import ROUNDINGS, Found, Sides, search
from loradeploy.parity.reference.loading import Base
from loradeploy.parity.reference.pytorch import Reference
from loradeploy.parity.reference.quantized import activations_of
from loradeploy.parity.report.results import BASE_LABEL, Localization
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from loradeploy.parity.report.results import Result, Variant

logger = logger_of(__name__)

# Number of failures that are examined, the first of each backend and adapter.
AT_MOST: Final = 3
# Number of random perturbations. Where large values cancel, the error is that of a single number,
# and one perturbation may hardly change it.
_DRAWS: Final = 3
# With fewer positions there are too few values to measure rounding.
_LEAST_TOKENS: Final = 8


@dataclass(frozen=True)
class _Request:
    """A failure to examine, on `case` up to `position`, or on the whole case.

    `variant`: the variant in which onnxruntime ran it; None is the context's current one.
    """

    backend: str
    title: str
    adapter: str | None
    case: int
    position: int | None = None
    variant: Variant | None = None


def localizations(
    context: CheckContext,
    reference: Reference,
    backends: Sequence[Backend],
    results: Sequence[Result],
    load: Callable[[], Base],
    *,
    always: bool,
) -> tuple[Localization, ...]:
    """Examine failures in `results`, at most `AT_MOST`; `load` loads the base if it is needed.

    `always`: if nothing failed, examine the base and the first adapter with one of `backends`.
    """
    requests = _failures(context, reference, results)
    failed = bool(requests)
    if not requests and always:
        requests = _samples(context, backends)
    if not requests:
        return ()
    logger.info("searching for the first module that diverges" if failed else "comparing modules")
    try:
        base = load()
    except Exception as problem:  # it loaded before: out of memory, or a file was removed
        logger.warning("nothing can be examined: %s", first_line(problem))
        return ()
    found = []
    for request in requests[:AT_MOST]:
        logger.info("%s, %s", request.title, request.adapter or BASE_LABEL)
        tokens = reference.rows[request.adapter][request.case].tokens
        if request.position is not None:
            tokens = tokens[: max(request.position + 1, _LEAST_TOKENS)]
        its = context if request.variant is None else context.at(request.variant)
        localization = localize(its, base, request.backend, request.adapter, tokens, failed=failed)
        found.append(dataclasses.replace(localization, title=request.title, case=request.case))
    return tuple(found)


def localize(
    context: CheckContext,
    base: Base,
    backend: str,
    adapter: str | None,
    tokens: Sequence[int],
    *,
    failed: bool,
) -> Localization:
    """Find where `backend` with `adapter` (None: the base) diverges from PyTorch on `tokens`.

    `failed`: whether the backend is known to fail; if so, a message explains an empty result.
    Errors become the message of the localization and are never raised.
    """
    nothing = Localization(backend, backend, adapter, 0, len(tokens), ())
    # Backends in PyTorch run in float32, whatever the precision of the graph.
    rounding = ROUNDINGS["fp32" if backend in MODELS else context.manifest.precision]
    activations = {} if backend in MODELS else activations_of(base.quantized)
    try:
        row = TorchRow(context, base, adapter, tokens)
        with other_side(row, backend, row.sites()) as other:
            sides = Sides(
                other.points,
                reference=row.values(other.points, row.reference),
                disturbed=[
                    row.values(
                        other.points,
                        partial(row.disturbed, rounding.unit, activations, seed),
                    )
                    for seed in range(_DRAWS)
                ],
                backend=other.values,
                rounding=rounding,
                upstream=other.upstream,
            )
            found = search(sides, tokens=len(tokens))
    except Exception as problem:  # an error of a broken graph must not hide the verdict
        message = f"it could not be examined: {first_line(problem)}"
        return dataclasses.replace(nothing, message=message)
    return dataclasses.replace(
        nothing,
        steps=found.steps,
        first=found.first,
        before=found.before,
        offenders=found.offenders,
        heatmap=found.heatmap,
        unmatched=(*other.unmatched, *found.lost),
        message=_message(found, rounding.limit, failed),
    )


def _failures(
    context: CheckContext, reference: Reference, results: Sequence[Result]
) -> list[_Request]:
    """Return the first failure of each backend and adapter, at its worst position.

    If that is unknown, for example because values are not finite, the longest case is used.
    """
    # Only with causal attention may the case be cut after the worst position.
    causal = context.manifest.task == CAUSAL_LM
    requests: dict[tuple[str, str | None], _Request] = {}
    for result in results:
        if result.outcome != "failed" or result.figures is None:
            continue
        if result.backend not in (*GRAPHS, *MODELS) or result.nearly_untrained:
            continue
        worst = result.figures.worst
        rows = reference.rows[result.adapter]
        longest = max(range(len(rows)), key=lambda case: len(rows[case].tokens))
        request = _Request(
            result.backend,
            result.title,
            result.adapter,
            case=longest if worst is None else worst.case,
            position=worst.position if worst is not None and causal else None,
            variant=result.variant,
        )
        requests.setdefault((result.backend, result.adapter), request)
    return list(requests.values())


def _samples(context: CheckContext, backends: Sequence[Backend]) -> list[_Request]:
    """Return requests for the base and the first adapter, with one backend that has a graph."""
    able = [b for b in backends if b.name in GRAPHS and not b.missing(context)]
    if not able:
        return []
    backend = min(able, key=lambda each: each.needs_adapter)
    adapters: list[str | None] = [] if backend.needs_adapter else [None]
    adapters += [tested.name for tested in context.adapters[:1]]
    return [_Request(backend.name, backend.title, adapter, case=0) for adapter in adapters]


def _message(found: Found, limit: float, failed: bool) -> str | None:
    if found.first is not None and not np.isfinite(found.first.scale):
        return "PyTorch's own values are not finite there either"
    if found.first is not None or not failed:
        return None
    if not found.steps:
        return "no module of the model was found in the graph"
    if found.largest > limit:
        return (
            f"no single module diverges: the error grows gradually, to {found.largest:.0f} times"
            " the rounding error"
        )
    return (
        "in a batch of one row, without a cache and with inner values as outputs, every module"
        " agrees within rounding: the cause is the batch, the cache, a fusion of onnxruntime, or a"
        " tight limit"
    )
