"""The check itself: every backend walked along the inputs, and judged."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loradeploy.errors import LoraDeployError
from loradeploy.parity.backends import Backend, open_backend
from loradeploy.parity.metrics import Comparison
from loradeploy.parity.onnx_side import NotRunError
from loradeploy.parity.report import BASE_LABEL, AdapterFacts, Result
from loradeploy.parity.setting import Setting
from loradeploy.parity.verdict import failure, judge
from loradeploy.parity.walk import Model, Observation, Row, has_logits, phases_of, walk

if TYPE_CHECKING:
    import torch

    from loradeploy.parity.torch_side import Reference

logger = logging.getLogger(__name__)


@dataclass
class _Tally:
    """What one adapter in one phase has come to so far. `due`: positions that must come yet."""

    comparison: Comparison
    due: int = 0
    seconds: float = 0.0


@dataclass
class _Tallies:
    """The tallies of one walk, by adapter and phase, in the order in which they began."""

    reference: Reference
    logits: bool
    found: dict[tuple[str | None, str], _Tally] = field(default_factory=dict)

    def of(self, subject: str | None, phase: str) -> _Tally:
        if (subject, phase) not in self.found:
            comparison = Comparison(scale=self.reference.scale[subject], logits=self.logits)
            self.found[subject, phase] = _Tally(comparison)
        return self.found[subject, phase]


def run_backends(
    backends: Sequence[Backend],
    setting: Setting,
    reference: Reference,
    model: torch.nn.Module | None,
) -> list[Result]:
    """Walk every backend along the reference's rows and judge what it gives.

    Raises:
        LoraDeployError: an adapter or the bundle is bad input, rather than different numbers.
    """
    results: list[Result] = []
    for backend in backends:
        missing = backend.missing(setting)
        if missing is not None:
            results.append(_not_run(backend, missing))
            continue
        results += _run_backend(backend, setting, reference, model)
    return results


def adapter_facts(setting: Setting, reference: Reference) -> tuple[AdapterFacts, ...]:
    """What each adapter does to the reference; one without an effect must be an untrained one."""
    facts = []
    for subject in setting.subjects:
        effect = reference.effect[subject.name]
        trained = any(pair.B.any() for pair in subject.adapter.factors.values())
        failed, message = False, None
        if effect.largest == 0.0 and trained:
            failed = True
            message = "the adapter has factors other than zero, yet it changes nothing in PyTorch"
        elif effect.largest == 0.0:
            message = "no effect: it is untrained, all of its B are zero"
        facts.append(
            AdapterFacts(
                subject.name,
                subject.digest,
                effect.largest,
                effect.mean,
                failed,
                message,
            )
        )
    return tuple(facts)


def _run_backend(
    backend: Backend, setting: Setting, reference: Reference, model: torch.nn.Module | None
) -> Iterator[Result]:
    opened = open_backend(backend, setting, model)
    phases = [phase for phase in phases_of(setting.manifest.task) if phase in backend.phases]
    while True:
        try:
            entry = next(opened, None)
        except NotRunError as reason:
            yield _not_run(backend, str(reason))
            return
        except LoraDeployError:
            raise
        except Exception as problem:  # a backend's own: it is the backend that fails, not we
            yield _broken(backend, None, None, problem)
            return
        if entry is None:
            return
        name, opened_model = entry
        logger.info("%s, %s", backend.title, "mixed" if backend.mixed else name or BASE_LABEL)
        rows = mixed_rows(reference.rows) if backend.mixed else reference.rows[name]
        yield from _walk(backend, opened_model, rows, phases, setting, reference)


def mixed_rows(rows: Mapping[str | None, Sequence[Row]]) -> tuple[Row, ...]:
    """A batch in which neighbours have different adapters, the base among them."""
    subjects = list(rows)
    cases = len(rows[None])
    return tuple(
        rows[subjects[number % len(subjects)]][number % cases]
        for number in range(max(cases, len(subjects)))
    )


def _walk(
    backend: Backend,
    model: Model,
    rows: Sequence[Row],
    phases: Sequence[str],
    setting: Setting,
    reference: Reference,
) -> Iterator[Result]:
    task = setting.manifest.task
    tallies = _Tallies(reference, logits=has_logits(task))
    for phase in phases:
        for row in rows:
            if row.due(phase):
                tallies.of(row.subject, phase).due += row.due(phase)
    observations = walk(
        model, rows, task=task, pad=setting.cases.pad, phases=phases, left=setting.cases.left
    )
    problem = "it gave less than all positions"
    while True:
        begin = time.perf_counter()
        try:
            seen = next(observations, None)
            if seen is None:
                break
            tally = tallies.of(seen.row.subject, seen.phase)
            _take_in(tally, seen)
        except Exception as raised:  # whatever a backend raises is its failure
            problem = _one_line(raised)
            break
        tally.seconds += time.perf_counter() - begin
    for (subject, phase), tally in tallies.found.items():
        # What it did not come to is as unproved as what it failed in.
        said = problem if tally.due else None
        yield _result(backend, subject, phase, tally, said, setting, reference)


def _take_in(tally: _Tally, seen: Observation) -> None:
    row = seen.row
    tally.comparison.add(
        row.expected[seen.first : seen.first + len(seen.values)],
        seen.values,
        case=row.case,
        first=seen.first,
        first_step=row.first_step,
    )
    tally.due -= len(seen.values)


def _result(
    backend: Backend,
    subject: str | None,
    phase: str,
    tally: _Tally,
    problem: str | None,
    setting: Setting,
    reference: Reference,
) -> Result:
    figures = tally.comparison.figures()
    effect = None if subject is None else reference.effect[subject].largest
    checks = judge(figures, reference.limits[subject], effect=effect)
    message = problem or failure(figures, checks)
    return Result(
        backend=backend.name,
        title=backend.title,
        adapter=subject,
        phase=phase,
        outcome="passed" if message is None else "failed",
        message=message,
        figures=figures if figures.positions else None,
        checks=checks if figures.positions else (),
        effect=effect,
        seconds=round(tally.seconds, 3),
    )


def _not_run(backend: Backend, reason: str) -> Result:
    return Result(backend.name, backend.title, None, None, "not run", reason)


def _broken(backend: Backend, subject: str | None, phase: str | None, problem: Exception) -> Result:
    return Result(backend.name, backend.title, subject, phase, "failed", _one_line(problem))


def _one_line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0] if lines else 'no message'}"
