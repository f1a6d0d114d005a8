"""A report as rows of text, and as a table on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from loradeploy.parity.report import BASE_LABEL

if TYPE_CHECKING:
    from rich.console import Console

    from loradeploy.parity.report import ParityReport, Result

_HEADER: Final = (
    "backend", "adapter", "phase", "max abs", "p99 abs", "max rel", "1 − cos", "KL", "top-1",
    "greedy", "effect", "verdict",
)  # fmt: skip
_COLOURS: Final = {"passed": "green", "failed": "red", "not run": "yellow"}


def headline(report: ParityReport) -> str:
    """The verdict in one line."""
    verdict = "passed" if report.passed else "FAILED"
    return (
        f"parity {verdict}: {report.bundle} ({report.task}, {report.mode}, {report.precision})"
        f" against PyTorch with {report.base}"
    )


def rows(report: ParityReport) -> Iterator[tuple[str, ...]]:
    """The results as rows of text, the header first."""
    yield _HEADER
    for result in report.results:
        yield _row(result)


def adapter_lines(report: ParityReport) -> list[str]:
    """What is to be said of the adapters, the controls, and the check itself."""
    lines = []
    for facts in report.adapters:
        said = "" if facts.message is None else f": {facts.message}"
        lines.append(f"adapter {facts.name}: effect {facts.effect:.2g} max abs{said}")
    caught = sum(control.caught for control in report.controls)
    if report.controls:
        lines.append(f"controls: {caught} of {len(report.controls)} mistakes caught")
    inputs = report.inputs
    lines.append(
        f"inputs: {inputs.prompts} prompts, {inputs.prompt_tokens} tokens"
        f"{f', {inputs.generated} generated after each' if inputs.generated else ''}"
        f" ({inputs.source})"
    )
    return lines + list(report.notes)


def score_lines(report: ParityReport) -> list[str]:
    """Each score with its confidence interval."""
    return [
        f"{score.metric} of {score.title}, {score.adapter or BASE_LABEL}: {score.value:.4g} for"
        f" PyTorch's {score.reference:.4g}, {score.difference:+.2g}"
        f" [95 %: {score.low:+.2g} to {score.high:+.2g}] on {score.examples} examples"
        for score in report.scores
    ]


def print_report(report: ParityReport, console: Console) -> None:
    """Print the verdict, the table, and why it failed."""
    from rich.table import Table
    from rich.text import Text

    header, *body = rows(report)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, no_wrap=True)
    for result, cells in zip(report.results, body, strict=True):
        verdict = Text(cells[-1], style=_COLOURS[result.outcome])
        table.add_row(*map(Text, cells[:-1]), verdict)
    # Off a terminal nobody can widen the window: let the table be as wide as it is.
    if console.is_terminal:
        console.print(table)
    else:
        console.print(table, width=max(console.width, 200), crop=False)
    for result in report.results:
        if result.outcome == "not run":
            console.print(Text(f"not run: {result.title}: {result.message}"), soft_wrap=True)
    for line in (*score_lines(report), *adapter_lines(report)):
        console.print(Text(line), soft_wrap=True)
    for line in report.failures:
        console.print(Text(f"FAILED: {line}", style="red"), soft_wrap=True)
    style = "bold green" if report.passed else "bold red"
    console.print(Text(headline(report), style=style), soft_wrap=True)


def _row(result: Result) -> tuple[str, ...]:
    figures = result.figures
    subject = "" if result.phase is None else result.subject
    named = (result.title, subject, result.phase or "")
    if figures is None:
        return (*named, *("" for _ in _HEADER[3:-1]), result.outcome)
    return (
        *named,
        f"{figures.max_abs:.1e}",
        f"{figures.p99_abs:.1e}",
        f"{figures.max_rel:.1e}",
        f"{figures.cosine_distance:.0e}",
        _number(figures.kl),
        _share(figures.top1),
        _share(figures.greedy),
        "" if result.effect is None else f"{result.effect:.2g}",
        result.outcome,
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _share(value: float | None) -> str:
    """A share in per cent; 100 % only where it is all of them."""
    if value is None:
        return ""
    return "100%" if value == 1 else f"{min(99.9, 100 * value):.1f}%"
