"""The report as rows of text, and as a table on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from loradeploy.parity.report.results import BASE_LABEL, COMPARED
from loradeploy.parity.report.shares import share
from loradeploy.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from loradeploy.parity.figures.metrics import Figures
    from loradeploy.parity.report.results import Localization, ParityReport, Result

_NAMED: Final = ("backend", "adapter", "phase")
_VARIANT: Final = "variant"  # a column only where there is more than one
_FIGURES: Final[Mapping[str, Callable[[Figures], str]]] = {
    "max abs": lambda figures: f"{figures.max_abs:.1e}",
    "p99 abs": lambda figures: f"{figures.p99_abs:.1e}",
    "max rel": lambda figures: f"{figures.max_rel:.1e}",
    "1 − cos": lambda figures: f"{figures.cosine_distance:.0e}",
    "KL": lambda figures: "" if figures.kl is None else f"{figures.kl:.0e}",
    "top-1": lambda figures: _known_share(figures.top1),
    "greedy": lambda figures: _known_share(figures.greedy),
}
_MOST_OFFENDERS: Final = 3
_MOST_TOKENS: Final = 24
_COLORS: Final = {"passed": "green", "failed": "red", "not run": "yellow"}


def headline(report: ParityReport) -> str:
    """Return the verdict in one line."""
    verdict = "passed" if report.passed else "FAILED"
    if report.mode == COMPARED:
        return f"parity {verdict}: {report.bundle} ({report.precision}) against {report.base}"
    return (
        f"parity {verdict}: {report.bundle} ({report.task}, {report.mode}, {report.precision})"
        f" against PyTorch with {report.base}"
    )


def rows(report: ParityReport) -> Iterator[tuple[str, ...]]:
    """Yield the results as rows of text, the header first."""
    varied = has_variants(report)
    yield (*_NAMED, *((_VARIANT,) if varied else ()), *_FIGURES, "effect", "verdict")
    for result in report.results:
        yield _row(result, varied)


def has_variants(report: ParityReport) -> bool:
    """Whether onnxruntime ran the graphs in more than one way."""
    return len({result.variant for result in report.results if result.variant is not None}) > 1


def adapter_lines(report: ParityReport) -> list[str]:
    """Return lines about the providers, the adapters, the controls, the inputs, and the notes."""
    lines = [f"ran on {facts.provider}: {facts}" for facts in report.environment.providers]
    for facts in report.adapters:
        text = "" if facts.message is None else f": {facts.message}"
        lines.append(f"adapter {facts.name}: effect {facts.effect:.2g} max abs{text}")
    caught = sum(control.caught for control in report.controls)
    if report.controls:
        lines.append(
            f"controls: {caught} of {len(report.controls)} mistakes caught, mutation score"
            f" {share(report.mutation_score)}"
        )
    lines.append(f"inputs: {inputs_line(report)} ({report.inputs.source})")
    if report.baseline is not None:
        lines.append(f"baseline {report.baseline}: {len(report.regressions) or 'none'} worse")
    return lines + list(report.notes)


def inputs_line(report: ParityReport) -> str:
    """Return the numbers of prompts, additional rows and tokens in one line."""
    inputs = report.inputs
    unit = "cases" if report.mode == COMPARED else "prompts"
    parts = [f"{inputs.prompts} {unit}"]
    parts += [f"{inputs.fuzz} random rows"] if inputs.fuzz else []
    parts += [f"{inputs.edges} of extreme lengths"] if inputs.edges else []
    parts.append(f"{inputs.prompt_tokens} tokens")
    parts += [f"{inputs.generated} generated after each"] if inputs.generated else []
    return ", ".join(parts)


def score_lines(report: ParityReport) -> list[str]:
    """Return a line for each score, with its confidence interval."""
    return [
        f"{score.metric} of {score.title}, {score.adapter or BASE_LABEL}: {score.value:.4g}"
        f" (PyTorch {score.reference:.4g}), {score.difference:+.2g}"
        f" [95 %: {score.low:+.2g} to {score.high:+.2g}] on {score.examples} examples"
        for score in report.scores
    ]


def diagnosis_lines(report: ParityReport) -> list[str]:
    """Return lines about the modules where errors begin, and the smallest inputs that fail."""
    lines = [
        f"{found.title}, {found.adapter or BASE_LABEL}, prompt {found.case + 1}:"
        f" {_localization(found)}"
        for found in report.localizations
    ]
    for found in report.counterexamples:
        tokens = ", ".join(map(str, found.tokens[:_MOST_TOKENS]))
        more = ", …" if len(found.tokens) > _MOST_TOKENS else ""
        text = "" if found.text is None else f"{found.text!r}, "
        lines.append(
            f"{found.title}, {found.adapter or BASE_LABEL}: the smallest input that fails is"
            f" {text}{len(found.tokens)} of {found.length} tokens ({tokens}{more}), error"
            f" {found.error:.2g}"
        )
    return lines


def print_report(report: ParityReport, console: Console) -> None:
    """Print the table, the diagnosis, the failures, and the verdict."""
    from rich.table import Table

    header, *body = rows(report)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, no_wrap=True)
    for result, cells in zip(report.results, body, strict=True):
        verdict = _text(cells[-1], style=_COLORS[result.outcome])
        table.add_row(*map(_text, cells[:-1]), verdict)
    # Without a terminal there is no window to widen, so the table is not truncated.
    if console.is_terminal:
        console.print(table)
    else:
        console.print(table, width=max(console.width, 200), crop=False)
    for result in report.results:
        if result.outcome == "not run":
            console.print(_text(f"not run: {result.title}: {result.message}"), soft_wrap=True)
    for line in (*diagnosis_lines(report), *score_lines(report), *adapter_lines(report)):
        console.print(_text(line), soft_wrap=True)
    for line in report.failures:
        console.print(_text(f"FAILED: {line}", style="red"), soft_wrap=True)
    style = "bold green" if report.passed else "bold red"
    console.print(_text(headline(report), style=style), soft_wrap=True)


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(printable(text), style=style)


def _localization(localization: Localization) -> str:
    first = localization.first
    if first is None:
        return localization.message or "no single module diverges"
    text = f"{first.module} ({first.op}) is the first to diverge, relative error {first.share:.1g}"
    if localization.before is not None:
        text += f", after {localization.before.module} with {localization.before.share:.1g}"
    if localization.offenders:
        worst = ", ".join(step.module for step in localization.offenders[:_MOST_OFFENDERS])
        text += f"; the error grows most at {worst}"
    return text


def _row(result: Result, varied: bool) -> tuple[str, ...]:
    figures = result.figures
    variant = (str(result.variant or ""),) if varied else ()
    return (
        *(result.title, result.adapter_label, result.part, *variant),
        *("" if figures is None else show(figures) for show in _FIGURES.values()),
        "" if figures is None or result.effect is None else f"{result.effect:.2g}",
        result.outcome,
    )


def _known_share(value: float | None) -> str:
    return "" if value is None else share(value)
