"""The check itself: runs every backend through the phases and judges its outputs."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loradeploy.errors import LoraDeployError, kind_and_line
from loradeploy.parity.backends.onnx_model import NotRunError, OnnxModel, Replayed
from loradeploy.parity.backends.table import Backend, open_backend
from loradeploy.parity.context import AdapterUnderTest, CheckContext
from loradeploy.parity.figures.metrics import Comparison
from loradeploy.parity.names import REPEAT
from loradeploy.parity.phases.choice import left_out, phases_of, rows_of, spread
from loradeploy.parity.phases.models import Model
from loradeploy.parity.phases.outputs import has_logits
from loradeploy.parity.phases.rows import Observation, Row
from loradeploy.parity.phases.run import run_phases
from loradeploy.parity.report.results import BASE_LABEL, AdapterFacts, Result, Variant
from loradeploy.parity.verdict import judge
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import torch

    from loradeploy.parity.figures.metrics import Figures
    from loradeploy.parity.reference.pytorch import Reference

logger = logger_of(__name__)

# Number of rows that a PyTorch backend runs with an adapter that acts alike at every position.
_ROWS_IN_TORCH: Final = 8
# The name of a linear layer inside one of several experts.
_EXPERT_LAYER: Final = re.compile(r"(?:^|\.)\w*experts?\.\d+(?:\.|$)")
# Durations of this many seconds or more are shown in minutes.
_MINUTES: Final = 100


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
        phases = _phases(backend, context)
        if missing is None and not phases:
            missing = f"it does not have the phases {', '.join(context.phases or ())}"
        if missing is not None:
            results.append(_not_run(backend, missing))
            continue
        for at in _varied(backend, context):
            crash = context.crashed.get(at.variant.provider) if backend.on_onnxruntime else None
            if crash is not None:
                results.append(_broken(backend, at, crash))
                continue
            results += _run_backend(backend, at, phases, reference, model, progress)
    return results


def _varied(backend: Backend, context: CheckContext) -> list[CheckContext]:
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
    if backend.missing(context) is not None or not _phases(backend, context):
        return 0
    base = not backend.needs_adapter and not context.merged
    adapters = 1 if backend.mixed else len(context.adapters) + base
    return adapters * len(_varied(backend, context))


def _phases(backend: Backend, context: CheckContext) -> tuple[str, ...]:
    asked = context.phases or phases_of(context.manifest.task, embeds=bool(context.manifest.embeds))
    return tuple(phase for phase in asked if phase in backend.phases)


def adapter_facts(context: CheckContext, reference: Reference) -> tuple[AdapterFacts, ...]:
    """Return each adapter's effect in the reference; one without an effect must be untrained."""
    facts = []
    for tested in context.adapters:
        effect = reference.effect[tested.name]
        failed, message = False, None
        if effect.largest == 0.0:
            failed, message = _without_effect(context, tested)
        facts.append(
            AdapterFacts(
                tested.name,
                tested.digest,
                effect.largest,
                effect.mean,
                failed,
                message,
            )
        )
    return tuple(facts)


def _without_effect(context: CheckContext, tested: AdapterUnderTest) -> tuple[bool, str]:
    """For an adapter without an effect: whether that is a failure, and the explanation."""
    adapter, added = tested.adapter, context.manifest.added_tokens
    if any(pair.has_update for pair in adapter.factors.values()):
        return True, "the adapter has factors other than zero, yet it changes nothing in PyTorch"
    if added is not None and any(
        token >= added.base and values.any()
        for rows in adapter.rows.values()
        for token, values in zip(rows.indices, rows.values, strict=True)
    ):
        return False, "its only effect is on tokens that the base does not have"
    if adapter.rows:
        return False, "no effect: all of its updates are zero, and its tokens' rows change nothing"
    return False, "no effect: it is untrained, all of its updates are zero"


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


def same_everywhere(adapters: Sequence[AdapterUnderTest], name: str | None) -> bool:
    """Whether the adapter acts at every position, whatever the token there is.

    In PyTorch both sides share the base model, so an error in such an adapter shows on any row. A
    trained embedding row acts only at its token, and an expert only where the router selects it.
    """
    named = [tested.adapter for tested in adapters if tested.name == name]
    return all(
        all(
            pair.kind == "linear" and _EXPERT_LAYER.search(module) is None
            for module, pair in adapter.factors.items()
        )
        and not (adapter.saved or adapter.carried or adapter.rows)
        for adapter in named
    )


def mixed_rows(rows: Mapping[str | None, Sequence[Row]]) -> tuple[Row, ...]:
    """Return a batch in which neighboring rows have different adapters; the base counts as one.

    Each adapter has at least one usual row and one of an extreme length, if there are any.
    """
    adapters = list(rows)
    usual = [number for number, row in enumerate(rows[None]) if not row.edge]
    edges = [number for number, row in enumerate(rows[None]) if row.edge]
    cases = [
        some[i % len(some)]
        for some in (usual, edges)
        if some
        for i in range(max(len(some), len(adapters)))
    ]
    return tuple(rows[adapters[i % len(adapters)]][case] for i, case in enumerate(cases))


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
    task = context.manifest.task
    tallies = _Tallies(reference, logits=has_logits(task))
    for phase in phases:
        for row in rows_of(phase, rows, batched=backend.batched):
            if row.due(phase):
                tallies.of(row.adapter, phase).due += row.due(phase)
    observations = run_phases(
        model,
        rows,
        task=task,
        pad=context.cases.pad,
        phases=phases,
        left=context.cases.left,
        alike=context.cases.alike,
        batched=backend.batched,
    )
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
