"""The end of every check: compare with a baseline, write the certificate and the report files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loradeploy.bundle.names import CERTIFICATE_NAME, SIGNATURE_NAME
from loradeploy.bundle.proof.signature import private_key, sign
from loradeploy.errors import UsageError
from loradeploy.files import write_json
from loradeploy.parity.report.baseline import compare_with_baseline, read_baseline
from loradeploy.parity.report.writers import check_reports, write_report

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from loradeploy.parity.report.baseline import Baseline
    from loradeploy.parity.report.results import ParityReport


@dataclass(frozen=True, eq=False)
class Ending:
    """What a report is compared with, and where it is written.

    `baseline`: an earlier report. `files`: the report files. `bundle`: the bundle that gets its
    certificate, which `key` signs.
    """

    baseline: Baseline | None = None
    files: tuple[Path, ...] = ()
    bundle: Path | None = None
    key: Ed25519PrivateKey | None = None

    @classmethod
    def of(
        cls,
        report: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
        baseline: str | os.PathLike[str] | None,
        *,
        bundle: Path | None = None,
        sign: str | os.PathLike[str] | None = None,
    ) -> Ending:
        """Read the options of `loradeploy.parity` and `compare` before anything runs.

        Raises:
            UsageError: a file that cannot be a report, a baseline or a key, or no `bundle` to sign
                the certificate of.
        """
        files = check_reports(report)
        earlier = None if baseline is None else read_baseline(baseline)
        if sign is not None and bundle is None:
            raise UsageError("sign: there is no certificate to sign, certificate is False")
        key = None if sign is None else private_key(sign)
        return cls(earlier, files, bundle, key)


def finish(report: ParityReport, ending: Ending) -> ParityReport:
    """Add the regressions since the baseline to `report`, write it to the files, and return it.

    Its JSON is also written into the bundle as its certificate, and signed if the check passed. If
    the bundle is not writable, a note in the report says so.

    Raises:
        UsageError: the baseline is not comparable, or a file cannot be written.
    """
    if ending.baseline is not None:
        report = compare_with_baseline(report, ending.baseline)
    bundle = ending.bundle
    if bundle is not None:
        try:
            (bundle / SIGNATURE_NAME).unlink(missing_ok=True)  # that of an earlier certificate
            write_json(bundle / CERTIFICATE_NAME, report.to_json())
        except OSError as problem:
            note = f"no certificate was written: {problem.strerror or problem}"
            report = dataclasses.replace(report, notes=(*report.notes, note))
    for file in ending.files:
        write_report(report, file)
    if bundle is not None and ending.key is not None and report.passed and _is_certified(bundle):
        sign(bundle, ending.key)
    return report


def _is_certified(bundle: Path) -> bool:
    return (bundle / CERTIFICATE_NAME).is_file()
