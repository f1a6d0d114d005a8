"""Runs the reference a second time: nothing can be compared with a nondeterministic one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loradeploy.adapter.tasks import GENERATING
from loradeploy.parity.backends.table import REFERENCE_TITLE
from loradeploy.parity.context import CheckContext
from loradeploy.parity.figures.metrics import Comparison
from loradeploy.parity.figures.tolerances import assumed
from loradeploy.parity.names import ONE_ROW, PREFILL, REPEAT
from loradeploy.parity.phases.choice import rows_of
from loradeploy.parity.phases.outputs import has_logits
from loradeploy.parity.phases.run import run_phases
from loradeploy.parity.reference.model import TorchModel
from loradeploy.parity.reference.pytorch import as_reference
from loradeploy.parity.report.results import Result
from loradeploy.parity.verdict import judge

if TYPE_CHECKING:
    from loradeploy.parity.reference.loading import Base
    from loradeploy.parity.reference.pytorch import Reference


def second_run(context: CheckContext, reference: Reference, base: Base) -> Result | None:
    """Run the base on a few rows again; return a failure if it differs by more than rounding.

    Inputs, weights and code are the same, so a difference is nondeterminism of the model: dropout
    that is still active, random sampling, or a kernel that sums in varying order. The measured
    limits would not show it, because they contain the same noise; assumed limits are used instead.
    """
    task = context.manifest.task
    scale = reference.scale[None]
    comparison = Comparison(scale=scale, logits=has_logits(task))
    alone = PREFILL if task in GENERATING else ONE_ROW
    rows = rows_of(REPEAT, reference.rows[None])
    with as_reference(context, base, None) as model:
        backend = TorchModel.of(context, model)
        for seen in run_phases(backend, rows, (alone,), context.feeding()):
            comparison.add(seen.expected, seen.values, case=seen.row.case, about=seen.about)
    verdict = judge(comparison.figures(), assumed("fp32", scale=scale), effect=None)
    if verdict.figures.not_finite or verdict.passed:
        return None  # NaN and infinite values are reported as failures of every backend
    return verdict.result(
        backend="torch",
        title=REFERENCE_TITLE,
        adapter=None,
        phase=REPEAT,
        problem=(
            "the reference is nondeterministic: two runs differ by"
            f" {verdict.figures.max_abs:.2g}; nothing can be compared with it"
        ),
    )
