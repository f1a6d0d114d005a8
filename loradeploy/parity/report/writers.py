"""Writes reports to files: JSON, JUnit XML, Markdown and HTML, chosen by the file extension."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

from loradeploy.adapter.files.digest import short
from loradeploy.bundle.names import GRAPH_NAME
from loradeploy.bundle.proof.certificate import FORMAT
from loradeploy.errors import UsageError
from loradeploy.files import (
    atomic_file,
    check_replaceable_file,
    check_writable,
    open_file,
    write_json,
)
from loradeploy.parity.report.html import html
from loradeploy.parity.report.results import BASE_LABEL
from loradeploy.parity.report.table import (
    adapter_lines,
    diagnosis_lines,
    has_variants,
    headline,
    rows,
    score_lines,
)
from loradeploy.printable import as_markdown, printable

if TYPE_CHECKING:
    from loradeploy.parity.report.results import ParityReport, Result

# In Markdown: the most rows that are not folded away, and the most failures that are listed.
_LONG: Final = 10
_MOST_FAILURES: Final = 20
# What a report of each ending has in its first characters.
_BEGINNING: Final = 1 << 16
_MARKS: Final = {
    ".json": re.compile(rf'"format":\s*"{FORMAT}"'),
    ".xml": re.compile("<testsuite name=[\"']loradeploy parity "),
    ".md": re.compile("^### [✅❌] parity "),
    ".html": re.compile("<title>[✓✕] parity "),
}


def check_reports(
    files: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
) -> tuple[Path, ...]:
    """Return the paths of the report files, or of the one file, if each can be a report.

    Raises:
        UsageError: an unknown file extension, a directory or link, an existing file that is not a
            report, or a directory that is not writable.
    """
    paths = tuple(map(Path, [files] if isinstance(files, str | os.PathLike) else files))
    for path in paths:
        if path.suffix not in WRITERS:
            raise UsageError(f"{path}: a report ends in one of {', '.join(WRITERS)}")
        check_replaceable_file(path, kind="an earlier report", own=_is_report)
        check_writable(path)
    return paths


def _is_report(file: Path) -> bool:
    """Whether `file` begins as a report of its ending."""
    with open_file(file, error=UsageError) as content:
        beginning = content.read(_BEGINNING).decode("utf-8", "replace")
    return _MARKS[file.suffix].search(beginning) is not None


def write_report(report: ParityReport, file: Path) -> None:
    """Write `report` to `file` atomically, in the format of its file extension.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        WRITERS[file.suffix](report, file)
    except OSError as problem:
        raise UsageError(f"{file} cannot be written: {problem.strerror or problem}") from None


def junit(report: ParityReport) -> str:
    """Return the report as JUnit XML, with a test case for each backend, adapter and phase."""
    suite = ET.Element(
        "testsuite",
        name=f"loradeploy parity {printable(report.bundle)}",
        timestamp=report.created,
        time=f"{report.seconds:.3f}",
    )
    counts = {"tests": 0, "failures": 0, "skipped": 0, "errors": 0}
    varied = has_variants(report)
    cases: list[tuple[str, str, float, str, str | None]] = [
        (result.backend, _case(result, varied), result.seconds, result.outcome, result.message)
        for result in report.results
    ]
    cases += [
        ("adapter", facts.name, 0.0, "failed" if facts.failed else "passed", facts.message)
        for facts in report.adapters
    ]
    cases += [
        ("control", f"{control.name}, {control.adapter}", 0.0,
         "passed" if control.caught else "failed", f"not caught: {control.meaning}")
        for control in report.controls
    ]  # fmt: skip
    cases += [
        ("score", f"{score.metric}, {score.title}, {score.adapter or BASE_LABEL}", 0.0,
         "passed" if score.passed else "failed", score.message)
        for score in report.scores
    ]  # fmt: skip
    cases += [
        ("baseline", f"{regression.where}, {regression.metric}", 0.0, "failed", regression.message)
        for regression in report.regressions
    ]
    for backend, name, seconds, outcome, message in cases:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=f"parity.{backend}",
            name=printable(name),
            time=f"{seconds:.3f}",
        )
        counts["tests"] += 1
        if outcome == "failed":
            counts["failures"] += 1
            ET.SubElement(case, "failure", message=printable(message or "failed"))
        elif outcome == "not run":
            counts["skipped"] += 1
            ET.SubElement(case, "skipped", message=printable(message or "not run"))
    for name, count in counts.items():
        suite.set(name, str(count))
    if diagnosis := diagnosis_lines(report):
        ET.SubElement(suite, "system-out").text = printable("\n".join(diagnosis), lines=True)
    ET.indent(suite)
    text: str = ET.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{printable(text, lines=True)}\n'


def markdown(report: ParityReport) -> str:
    """Return the report as Markdown for a pull request comment; a long table is folded away."""
    mark = "✅" if report.passed else "❌"
    lines = [f"### {mark} {as_markdown(headline(report))}", ""]
    if report.failures:
        lines += ["**Failures**", "", *_bullets(report.failures[:_MOST_FAILURES])]
        more = len(report.failures) - _MOST_FAILURES
        lines += [f"- and {more} more", ""] if more > 0 else [""]
    if diagnosis := diagnosis_lines(report):
        lines += ["**Where**", "", *_bullets(diagnosis), ""]
    header, *body = rows(report)
    table = [_row(header), _row("---" for _ in header), *map(_row, body), ""]
    if len(body) > _LONG:
        summary = f"{len(body)} results"
        table = [f"<details><summary>{summary}</summary>", "", *table, "</details>", ""]
    lines += [*table, *_bullets([*score_lines(report), *adapter_lines(report)])]
    versions = ", ".join(
        f"{name} {version}" for name, version in report.environment.versions.items()
    )
    digests = (("base", report.base_digest), (GRAPH_NAME, report.graph_digest))
    of = ", ".join(f"{name} {short(digest)}" for name, digest in digests if digest is not None)
    made = "; ".join(filter(None, (of, versions, f"{report.seconds:.0f} s", report.created)))
    lines += ["", f"<sub>{as_markdown(made)}</sub>", ""]
    return "\n".join(lines)


def _write_text(text: str, file: Path) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


WRITERS: Final[Mapping[str, Callable[[ParityReport, Path], None]]] = {
    ".json": lambda report, file: write_json(file, report.to_json()),
    ".xml": lambda report, file: _write_text(junit(report), file),
    ".md": lambda report, file: _write_text(markdown(report), file),
    ".html": lambda report, file: _write_text(html(report), file),
}


def _case(result: Result, varied: bool) -> str:
    variant = str(result.variant or "") if varied else ""
    return ", ".join(filter(None, (result.adapter_label, result.part, variant)))


def _bullets(lines: Iterable[str]) -> list[str]:
    return [f"- {as_markdown(line)}" for line in lines]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(as_markdown(cell) for cell in cells)} |"
