"""Reports on disk: JSON, JUnit XML, Markdown and HTML, chosen by the file's ending."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

from loradeploy.errors import UsageError
from loradeploy.files import atomic_file, write_json
from loradeploy.parity.html import html
from loradeploy.parity.table import adapter_lines, headline, rows

if TYPE_CHECKING:
    from loradeploy.parity.report import ParityReport

# What XML 1.0 cannot hold at all.
_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def check_reports(files: Iterable[str | os.PathLike[str]]) -> tuple[Path, ...]:
    """The report files, every one of a kind that can be written.

    Raises:
        UsageError: an ending that is unknown, or a directory.
    """
    paths = tuple(map(Path, files))
    for path in paths:
        if path.suffix not in WRITERS:
            raise UsageError(f"{path}: a report ends in one of {', '.join(WRITERS)}")
        if path.is_dir():
            raise UsageError(f"{path} is a directory: give the name of a file")
    return paths


def write_report(report: ParityReport, file: Path) -> None:
    """Write `report` to `file` in the form that its ending names, atomically.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        WRITERS[file.suffix](report, file)
    except OSError as problem:
        raise UsageError(f"{file} cannot be written: {problem.strerror or problem}") from None


def junit(report: ParityReport) -> str:
    """The report as JUnit XML: a test case for each backend, adapter and phase."""
    suite = ET.Element(
        "testsuite",
        name=f"loradeploy parity {_clean(report.bundle)}",
        timestamp=report.created,
        time=f"{report.seconds:.3f}",
    )
    counts = {"tests": 0, "failures": 0, "skipped": 0, "errors": 0}
    cases = [
        (result.backend, ", ".join(filter(None, (result.subject, result.phase))), result.seconds,
         result.outcome, result.message)
        for result in report.results
    ]  # fmt: skip
    cases += [
        ("adapter", facts.name, 0.0, "failed" if facts.failed else "passed", facts.message)
        for facts in report.adapters
    ]
    cases += [
        ("control", f"{control.name}, {control.adapter}", 0.0,
         "passed" if control.caught else "failed", f"not caught: {control.meaning}")
        for control in report.controls
    ]  # fmt: skip
    for backend, name, seconds, outcome, message in cases:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=f"parity.{backend}",
            name=_clean(name),
            time=f"{seconds:.3f}",
        )
        counts["tests"] += 1
        if outcome == "failed":
            counts["failures"] += 1
            ET.SubElement(case, "failure", message=_clean(message or "failed"))
        elif outcome == "not run":
            counts["skipped"] += 1
            ET.SubElement(case, "skipped", message=_clean(message or "not run"))
    for name, count in counts.items():
        suite.set(name, str(count))
    ET.indent(suite)
    text: str = ET.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def markdown(report: ParityReport) -> str:
    """The report for a pull request comment."""
    mark = "✅" if report.passed else "❌"
    lines = [f"### {mark} {_escape(headline(report))}", ""]
    header, *body = rows(report)
    lines += [_row(header), _row("---" for _ in header), *map(_row, body), ""]
    lines += [f"- {_escape(line)}" for line in adapter_lines(report)]
    if report.failures:
        lines += ["", "**Failures**", "", *(f"- {_escape(line)}" for line in report.failures)]
    versions = ", ".join(
        f"{name} {version}" for name, version in report.environment.versions.items()
    )
    lines += ["", f"<sub>{_escape(versions)}; {report.seconds:.0f} s; {report.created}</sub>", ""]
    return "\n".join(lines)


def _write_text(text: str, file: Path) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(_clean(text), encoding="utf-8")


WRITERS: Final[Mapping[str, Callable[[ParityReport, Path], None]]] = {
    ".json": lambda report, file: write_json(file, report.to_json()),
    ".xml": lambda report, file: _write_text(junit(report), file),
    ".md": lambda report, file: _write_text(markdown(report), file),
    ".html": lambda report, file: _write_text(html(report), file),
}


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_escape(cell) for cell in cells)} |"


def _escape(text: str) -> str:
    """What Markdown would take for its own; names come from users."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def _clean(text: str) -> str:
    return _NOT_XML.sub("�", text)
