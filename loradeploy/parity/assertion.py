"""`assert_parity`: a parity check as an assertion, in pytest or elsewhere."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loradeploy.names import MODEL_CONFIG_NAME
from loradeploy.printable import printable

if TYPE_CHECKING:
    from loradeploy.parity.compare.opening import Comparable
    from loradeploy.parity.report.results import ParityReport


def assert_parity(
    candidate: Comparable, reference: Comparable | None = None, **options: Any
) -> ParityReport:
    """Raise AssertionError unless `candidate` computes the same as its reference.

    If `candidate` is a bundle and `reference` is None or a checkpoint's directory, they are
    compared by `loradeploy.parity`; otherwise by `loradeploy.compare`. `options` are passed on to
    that function: `adapters`, `prompts`, `others`, …, or `inputs`, `tolerances`, ….

    Raises:
        AssertionError: the check failed; its message has the failures and the table of figures.
        LoraDeployError: as `loradeploy.parity` and `loradeploy.compare`.
    """
    __tracebackhide__ = True
    report = run_check(candidate, reference, **options)
    if not report.passed:
        raise AssertionError(failure_text(report))
    return report


def run_check(
    candidate: Comparable, reference: Comparable | None = None, **options: Any
) -> ParityReport:
    """Return the report of the comparison that `assert_parity` makes.

    Raises:
        UsageError: `candidate` is not a bundle and no `reference` is given.
    """
    from loradeploy.errors import UsageError
    from loradeploy.parity.api import parity
    from loradeploy.parity.compare.api import compare

    if _is_bundle(candidate) and (reference is None or _is_checkpoint(reference)):
        return parity(candidate, model=reference, **options)  # type: ignore[arg-type]
    if reference is None:
        raise UsageError(f"{candidate} is not a bundle: give the reference to compare it with")
    return compare(reference, candidate, **options)


def failure_text(report: ParityReport) -> str:
    """Return the failures, one per line, and the table of figures."""
    from rich.console import Console

    from loradeploy.parity.report.table import print_report

    out = io.StringIO()
    print_report(report, Console(file=out, color_system=None, force_terminal=False, width=120))
    failures = "\n".join(f"  {printable(line)}" for line in report.failures)
    return f"{len(report.failures)} parity failures\n{failures}\n\n{out.getvalue().rstrip()}"


def _is_bundle(given: object) -> bool:
    from loradeploy.bundle.names import MANIFEST_NAME

    return isinstance(given, str | os.PathLike) and (Path(given) / MANIFEST_NAME).is_file()


def _is_checkpoint(given: object) -> bool:
    """Whether `given` is a PyTorch model's directory. Bundles also have a config.json."""
    if not isinstance(given, str | os.PathLike) or _is_bundle(given):
        return False
    path = Path(given)
    return (path / MODEL_CONFIG_NAME).is_file() and not any(path.glob("*.onnx"))
