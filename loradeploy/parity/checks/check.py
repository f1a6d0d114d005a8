"""The check itself: runs every backend through the phases and judges its outputs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loradeploy.errors import LoraDeployError, kind_and_line
from loradeploy.parity.backends.onnx_model import NotRunError, OnnxModel, Replayed
from loradeploy.parity.backends.table import Backend, open_backend
from loradeploy.parity.checks.rows import mixed_rows, same_everywhere
from loradeploy.parity.checks.runs import Progress, phases_in, varied
from loradeploy.parity.context import CheckContext
from loradeploy.parity.figures.metrics import Comparison
from loradeploy.parity.names import REPEAT
from loradeploy.parity.phases.choice import left_out, rows_of, spread
from loradeploy.parity.phases.models import Model
from loradeploy.parity.phases.outputs import has_logits
from loradeploy.parity.phases.rows import Observation, Row
from loradeploy.parity.phases.run import run_phases
from loradeploy.parity.report.results import BASE_LABEL, Result, Variant
from loradeploy.parity.verdict import judge

if TYPE_CHECKING:
    import torch

    from loradeploy.parity.figures.metrics import Figures
    from loradeploy.parity.reference.pytorch import Reference

# Number of rows that a PyTorch backend runs with an adapter that acts alike at every position.
_ROWS_IN_TORCH: Final = 8


@dataclass
class _Tally:
    """The comparison of one adapter in one phase so far. `due`: number of missing positions."""

    comparison: Comparison
    due: int = 0
    seconds: float = 0.0


@dataclass
class _Tallies:
    """The tallies of one backend, by adapter and phase, in the order in which they began."""

    reference: Reference
    logits: bool
    found: dict[tuple[str | None, str], _Tally] = field(default_factory=dict)

    def of(self, adapter: str | None, phase: str) -> _Tally:
        if (adapter, phase) not in self.found:
            reference = self.reference.of(phase)
            logits = self.logits and not reference.states
            comparison = Comparison(scale=reference.scale_in(phase, adapter), logits=logits)
            self.found[adapter, phase] = _Tally(comparison)
        return self.found[adapter, phase]


def run_backends(
    backends: Sequence[Backend],
    context: CheckContext,
    reference: Reference,
    model: torch.nn.Module | None,
    progress: Progress,
) -> list[Result]:
    """Run every backend on the reference's rows and judge its outputs.

    A backend on onnxruntime is run once for each variant.

    Raises:
        LoraDeployError: an adapter or the bundle is invalid. Different numbers do not raise.
    """
    results: list[Result] = []
    for backend in backends:
        missing = backend.missing(context)
        phases = phases_in(backend, context)
        if missing is None and not phases:
            missing = f"it has none of the phases {', '.join(context.phases or ())}"
        if missing is not None:
            results.append(_not_run(backend, missing))
            continue
        for at in varied(backend, context):
            crash = context.crashed.get(at.variant.provider) if backend.on_onnxruntime else None
            if crash is not None:
                results.append(_broken(backend, at, crash))
                continue
            results += _run_backend(backend, at, phases, reference, model, progress)
    return results


def _run_backend(
    backend: Backend,
    context: CheckContext,
    phases: Sequence[str],
    reference: Reference,
    model: torch.nn.Module | None,
    progress: Progress,
) -> Iterator[Result]:
    opened = open_backend(backend, context, model)
    while True:
        try:
            entry = next(opened, None)
        except NotRunError as reason:
            yield _not_run(backend, str(reason))
            return
        except LoraDeployError:
            raise
        except Exception as problem:  # any other error is a failure of the backend
            yield _broken(backend, context, kind_and_line(problem))
            return
        if entry is None:
            return
        name, opened_model = entry
        progress.begin(backend, name, context)
        rows = mixed_rows(reference.rows) if backend.mixed else reference.rows[name]
        if backend.on_torch and same_everywhere(context.adapters, name):
            rows = tuple(spread(rows, _ROWS_IN_TORCH))
        counts: dict[str, Replayed] = {}
        results = _run_rows(backend, opened_model, rows, phases, context, reference, counts)
        if context.captured:
            results = _as_captured(backend, name, results, counts, context)
        yield from results


def _as_captured(
    backend: Backend,
    adapter: str | None,
    results: Iterable[Result],
    counts: Mapping[str, Replayed],
    context: CheckContext,
) -> Iterator[Result]:
    """Return `results` with the number of replays in the messages of those that passed.

    If no run was a replay, results that passed do not certify captured runs, and one "not run"
    result replaces them. `counts`: numbers of runs and replays, by phase.
    """
    found = list(results)
    if not any(count.replays for count in counts.values()):
        others = [result for result in found if result.outcome != "passed"]
        yield from others
        if len(others) < len(found):
            runs = sum(count.runs for count in counts.values())
            who = "the mixed batch" if backend.mixed else adapter or BASE_LABEL
            why = f"none of the {runs} runs of {who} on {context.variant} was captured"
            yield dataclasses.replace(_not_run(backend, why), variant=context.variant)
        return
    for result in found:
        count = counts.get(result.phase or "")
        if result.outcome != "passed" or count is None:
            yield result
            continue
        said = f"{count.replays} of {count.runs} runs were replays"
        message = said if result.message is None else f"{result.message}; {said}"
        yield dataclasses.replace(result, message=message)


def _run_rows(
    backend: Backend,
    model: Model,
    rows: Sequence[Row],
    phases: Sequence[str],
    context: CheckContext,
    reference: Reference,
    counts: dict[str, Replayed],
) -> Iterator[Result]:
    """Yield the result of each adapter in each phase; add the numbers of replays to `counts`."""
    tallies = _Tallies(reference, logits=has_logits(context.manifest.task))
    for phase in phases:
        for row in rows_of(phase, rows, batched=backend.batched):
            if row.due(phase):
                tallies.of(row.adapter, phase).due += row.due(phase)
    observations = run_phases(model, rows, phases, context.feeding(batched=backend.batched))
    problem = "it returned fewer positions than expected"
    while True:
        begin = time.perf_counter()
        try:
            seen = next(observations, None)
            if seen is None:
                break
            if isinstance(model, OnnxModel):
                counts.setdefault(seen.phase, Replayed()).take(model.replayed)
            tally = tallies.of(seen.row.adapter, seen.phase)
            _record(tally, seen)
        except Exception as raised:  # any error that a backend raises is its failure
            problem = kind_and_line(raised)
            break
        tally.seconds += time.perf_counter() - begin
    for (adapter, phase), tally in tallies.found.items():
        # Positions that were not reached are unproved too, and fail.
        failure = problem if tally.due else None
        yield _result(backend, adapter, phase, tally, failure, context, reference)
    for phase in phases:
        for adapter in left_out(phase, rows, batched=backend.batched):
            why = f"{phase}: no row of {adapter or BASE_LABEL} is among those of this phase"
            skipped = dataclasses.replace(_not_run(backend, why), adapter=adapter, phase=phase)
            yield dataclasses.replace(skipped, variant=_variant(backend, context))


def _record(tally: _Tally, seen: Observation) -> None:
    row = seen.row
    tally.comparison.add(
        seen.expected,
        seen.values,
        case=row.case,
        first=seen.first,
        first_step=row.first_step,
        about=seen.about,
    )
    tally.due -= len(seen.values)


def _result(
    backend: Backend,
    adapter: str | None,
    phase: str,
    tally: _Tally,
    problem: str | None,
    context: CheckContext,
    reference: Reference,
) -> Result:
    reference = reference.of(phase)
    effect = None if adapter is None else reference.effect[adapter].largest
    limits = reference.limits_in(phase, adapter)
    verdict = judge(tally.comparison.figures(), limits, effect=effect)
    if problem is None and phase == REPEAT and not verdict.passed:
        problem = f"two runs differ: {verdict.failure}"
    return verdict.result(
        backend=backend.name,
        title=backend.title,
        adapter=adapter,
        phase=phase,
        problem=problem,
        remark=_remark(phase, verdict.figures),
        effect=effect,
        seconds=tally.seconds,
        variant=_variant(backend, context),
    )


def _remark(phase: str, figures: Figures) -> str | None:
    if phase != REPEAT:
        return None
    if figures.max_abs == 0.0:
        return "bit for bit equal"
    return f"two runs differ by up to {figures.max_abs:.2g}"


def _variant(backend: Backend, context: CheckContext) -> Variant | None:
    return context.variant if backend.on_onnxruntime else None


def _not_run(backend: Backend, reason: str) -> Result:
    return Result(backend.name, backend.title, None, None, "not run", reason)


def _broken(backend: Backend, context: CheckContext, problem: str) -> Result:
    return Result(
        backend.name,
        backend.title,
        None,
        None,
        "failed",
        problem,
        variant=_variant(backend, context),
    )
