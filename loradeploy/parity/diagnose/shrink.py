"""Shrinks a failing prompt to the smallest input that still fails.

If the model is causal, a failing row is first cut after the position where it fails. Then tokens
are removed, by halves and one by one, as long as the rest fails in the same phase by the same
limits. A row that fails in a batch is run in a batch with another prompt's row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.text.tokenizer_files import TOKENIZER_NAME
from loradeploy.errors import kind_and_line
from loradeploy.parity.backends.table import Backend, open_backend
from loradeploy.parity.checks.rows import mixed_rows
from loradeploy.parity.context import CheckContext
from loradeploy.parity.figures.metrics import Comparison
from loradeploy.parity.names import DECODE, EMBEDDED, ENCODER, PADDED_BATCH, PERMUTED, REPEAT
from loradeploy.parity.phases.choice import phases_of
from loradeploy.parity.phases.models import Model
from loradeploy.parity.phases.outputs import has_logits
from loradeploy.parity.phases.rows import Row
from loradeploy.parity.phases.run import run_phases
from loradeploy.parity.reference.model import TorchModel
from loradeploy.parity.reference.pytorch import as_reference
from loradeploy.parity.report.results import BASE_LABEL, Counterexample, Result
from loradeploy.parity.verdict import judge
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import torch

    from loradeploy.parity.reference.loading import Base
    from loradeploy.parity.reference.pytorch import Reference

logger = logger_of(__name__)

Tokens = tuple[int, ...]

# Number of failures that are shrunk, and number of inputs that are tried for each.
MOST: Final = 3
TRIES: Final = 40
# Number of rows that are tried to reproduce a failure.
_ROWS: Final = 4
_BESIDE: Final = (PADDED_BATCH, PERMUTED, DECODE)


@dataclass(frozen=True)
class Fault:
    """Why an input fails, and its largest error."""

    message: str
    error: float


def shrink(
    tokens: Tokens,
    fails: Callable[[Tokens], Fault | None],
    *,
    causal: bool,
    tries: int = TRIES,
) -> tuple[Tokens, Fault, int] | None:
    """Return the smallest part of `tokens` found to fail, its fault, and the number of tries.

    None if `tokens` themselves do not fail. `causal`: later tokens do not affect earlier ones, so
    the shortest failing prefix is found by bisection.
    """
    tried = 0
    found: Fault | None = None

    def still(candidate: Tokens) -> bool:
        nonlocal tried, found
        tried += 1
        fault = fails(candidate)
        found = fault or found
        return fault is not None

    if not tokens or not still(tokens):
        return None
    if causal:
        low, high = 0, len(tokens)  # tokens[:low] passes, tokens[:high] fails
        while high - low > 1 and tried < tries:
            middle = (low + high) // 2
            low, high = (low, middle) if still(tokens[:middle]) else (middle, high)
        tokens = tokens[:high]
    size = len(tokens) // 2
    while size:
        start, smaller = 0, False
        while start < len(tokens) and tried < tries:
            candidate = tokens[:start] + tokens[start + size :]
            if candidate and still(candidate):
                tokens, smaller = candidate, True
            else:
                start += size
        # Single tokens are removed again until none can be removed.
        size = size if size == 1 and smaller and tried < tries else size // 2
        size = min(size, len(tokens) // 2) if size > 1 else size
    assert found is not None
    return tokens, found, tried


def shrink_failures(
    backends: Sequence[Backend],
    context: CheckContext,
    reference: Reference,
    results: Sequence[Result],
    load: Callable[[], Base],
) -> tuple[tuple[Counterexample, ...], tuple[str, ...]]:
    """Return counterexamples for failed backends and adapters, `MOST` at most, and remarks.

    `backends`: those that do not run in PyTorch. `load`: loads the base in PyTorch if it is needed.
    Errors of the search become remarks and do not affect the verdict.
    """
    failed = _failures(backends, context.manifest.task, results)
    if not failed:
        return (), ()
    remarks = []
    if len(failed) > MOST:
        remarks.append(f"the smallest failing input was searched for in {MOST} of {len(failed)}")
    found = []
    try:
        base = load()
        for backend, result in failed[:MOST]:
            logger.info("the smallest input that fails: %s, %s", result.title, result.adapter_label)
            example = _smallest(backend, result, context, reference, base)
            if example is None:
                remarks.append(
                    f"{result.title}, {result.adapter_label}, {result.phase}: the failure was"
                    " not reproduced with a single prompt, so no smallest input was found"
                )
            else:
                found.append(example)
    except Exception as problem:  # an error of the search must not hide the verdict
        remarks.append(f"the search for the smallest failing input ended: {kind_and_line(problem)}")
    return tuple(found), tuple(remarks)


def _failures(
    backends: Sequence[Backend], task: str, results: Sequence[Result]
) -> list[tuple[Backend, Result]]:
    """Return the simplest failure of each backend and adapter, in the order of the phases."""
    known = {backend.name: backend for backend in backends}
    order = {phase: number for number, phase in enumerate(phases_of(task))}
    plainest: dict[tuple[str, str | None], Result] = {}
    for result in results:
        # "repeat" does not depend on the input, and embeddings and sources cannot be shrunk.
        if result.outcome != "failed" or result.phase in (None, REPEAT, EMBEDDED, ENCODER):
            continue
        if result.backend not in known or result.nearly_untrained:
            continue
        key = (result.backend, result.adapter)
        before = plainest.get(key)
        if before is None or order[str(result.phase)] < order[str(before.phase)]:
            plainest[key] = result
    return [(known[result.backend], result) for result in plainest.values()]


def _smallest(
    backend: Backend,
    result: Result,
    context: CheckContext,
    reference: Reference,
    base: Base,
) -> Counterexample | None:
    if result.variant is not None:
        context = context.at(result.variant)
    rows = mixed_rows(reference.rows) if backend.mixed else reference.rows[result.adapter]
    with (
        as_reference(context, base, result.adapter) as model,
        closing(_opened(backend, result.adapter, context)) as opened,
    ):
        trial = _Trial(backend, next(opened), model, result, context, reference, rows)
        for row in _likeliest(rows, result):
            smallest = shrink(row.tokens, trial.on(row), causal=context.manifest.task == CAUSAL_LM)
            if smallest is not None:
                tokens, fault, tried = smallest
                return Counterexample(
                    backend=result.backend,
                    title=result.title,
                    adapter=result.adapter,
                    tokens=tokens,
                    text=_text(context, tokens),
                    error=fault.error,
                    message=f"{result.phase}{trial.beside(row)}: {fault.message}",
                    length=len(row.tokens),
                    tried=tried,
                )
    return None


def _opened(
    backend: Backend, adapter: str | None, context: CheckContext
) -> Generator[Model, None, None]:
    """Yield the backend with one adapter; it is open until the iterator is closed."""
    for name, model in open_backend(backend, context, None):
        if backend.mixed or name == adapter:
            yield model


def _likeliest(rows: Sequence[Row], result: Result) -> list[Row]:
    """Return rows of the failing adapter, the one with the largest error first."""
    worst = None if result.figures is None else result.figures.worst
    case = None if worst is None else worst.case
    own = [row for row in rows if row.adapter == result.adapter]
    return sorted(own, key=lambda row: row.case != case)[:_ROWS]


@dataclass(frozen=True, eq=False)
class _Trial:
    """One backend in one phase, which can be run on any tokens."""

    backend: Backend
    model: Model
    torch_model: torch.nn.Module
    result: Result
    context: CheckContext
    reference: Reference
    rows: Sequence[Row]

    def on(self, row: Row) -> Callable[[Tokens], Fault | None]:
        """Return the function that runs tokens in place of `row` and returns their fault."""
        return lambda tokens: self._fault(tokens, row)

    def beside(self, row: Row) -> str:
        """Return a text about the other row in the batch; empty if there is none."""
        other = self._other(row)
        if other is None:
            return ""
        adapter = f" with {other.adapter or BASE_LABEL}" if self.backend.mixed else ""
        return f", beside prompt {other.case + 1}{adapter}"

    def _fault(self, tokens: Tokens, row: Row) -> Fault | None:
        phase = str(self.result.phase)
        steps = max(0, len(row.forced) - 1) if phase == DECODE else 0
        steps = min(steps, len(tokens) - 1)
        if phase == DECODE and not steps:
            return None
        tried = self._row(tokens, row.adapter, steps)
        other = self._other(row)
        batch = [tried] if other is None else [tried, _shortened(other, steps)]
        feeding = self.context.feeding(batched=self.backend.batched)
        scale = self.reference.scale_in(phase, row.adapter)
        comparison = Comparison(scale=scale, logits=has_logits(feeding.task))
        try:
            for seen in run_phases(self.model, batch, (phase,), feeding):
                if seen.row is tried:
                    comparison.add(seen.expected, seen.values, first=seen.first)
        except Exception as problem:  # any error that a backend raises is its failure
            return Fault(kind_and_line(problem), float("nan"))
        figures = comparison.figures()
        if not figures.positions:
            return None  # too short for the phase
        limits = self.reference.limits_in(phase, row.adapter)
        effect = None if row.adapter is None else self.reference.effect[row.adapter].largest
        failure = judge(figures, limits, effect=effect).failure
        return None if failure is None else Fault(failure, figures.max_abs)

    def _row(self, tokens: Tokens, adapter: str | None, steps: int) -> Row:
        """Return a row with PyTorch's outputs for the tokens; the last `steps` are decoded."""
        manifest = self.context.manifest
        ids = np.array([tokens], np.int64)
        reference = TorchModel(
            self.torch_model, manifest, self.context.cases.known, tokens=self.context.tokens
        )
        values, _ = reference.forward(ids, np.ones_like(ids), None, [adapter])
        if values.ndim == 3:
            values = values[0]  # [positions, width]
        own = self.context.outputs_of(adapter)
        values = values[..., :own]
        if not steps:
            return Row(0, adapter, tokens, (), values, outputs=own)
        # The last forced token is never fed, so any value will do.
        return Row(0, adapter, tokens[:-steps], (*tokens[-steps:], 0), values, outputs=own)

    def _other(self, row: Row) -> Row | None:
        """Return another row for the batch, if the phase needs one; in a mixed batch, of another
        adapter.
        """
        if self.result.phase not in _BESIDE or not self.backend.batched:
            return None
        others = [other for other in self.rows if other is not row and other.edge == row.edge]
        if self.backend.mixed:
            others = [other for other in others if other.adapter != row.adapter]
        return max(others, key=lambda other: len(other.prompt), default=None)


def _shortened(row: Row, steps: int) -> Row:
    """Return `row` with `steps` decoding steps, and able to share a batch with any row."""
    forced = row.forced[: steps + 1] if steps else ()
    return dataclasses.replace(row, forced=forced, edge=False)


def _text(context: CheckContext, tokens: Tokens) -> str | None:
    if not (context.bundle / TOKENIZER_NAME).is_file():
        return None
    from loradeploy.bundle.text.tokenizer import Tokenizer

    return Tokenizer(context.bundle).decode(tokens)
