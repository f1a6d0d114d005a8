"""The end of every check: compare with a baseline, write the certificate and the report files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loradeploy.bundle.names import CERTIFICATE_NAME, SIGNATURE_NAME
from loradeploy.bundle.proof.signature import sign
from loradeploy.files import write_json
from loradeploy.parity.report.baseline import compare_with_baseline
from loradeploy.parity.report.writers import write_report

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from loradeploy.parity.report.baseline import Baseline
    from loradeploy.parity.report.results import ParityReport


def finish(
    report: ParityReport,
    *,
    baseline: Baseline | None,
    files: Sequence[Path],
    bundle: Path | None = None,
    key: Ed25519PrivateKey | None = None,
) -> ParityReport:
    """Add the regressions since `baseline` to `report`, write it to `files`, and return it.

    Its JSON is also written into `bundle` as its certificate, and signed with `key` if the check
    passed. If the bundle is not writable, a note in the report says so.

    Raises:
        UsageError: the baseline is not comparable, or a file cannot be written.
    """
    if baseline is not None:
        report = compare_with_baseline(report, baseline)
    if bundle is not None:
        try:
            (bundle / SIGNATURE_NAME).unlink(missing_ok=True)  # that of an earlier certificate
            write_json(bundle / CERTIFICATE_NAME, report.to_json())
        except OSError as problem:
            note = f"no certificate was written: {problem.strerror or problem}"
            report = dataclasses.replace(report, notes=(*report.notes, note))
    for file in files:
        write_report(report, file)
    if bundle is not None and key is not None and report.passed and _is_certified(bundle):
        sign(bundle, key)
    return report


def _is_certified(bundle: Path) -> bool:
    return (bundle / CERTIFICATE_NAME).is_file()
