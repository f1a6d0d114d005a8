"""The report as one self-contained HTML page: no network access, no script, no other files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.parity.figures.tolerances import METRICS
from loradeploy.parity.report.results import BASE_LABEL
from loradeploy.parity.report.shares import share
from loradeploy.printable import printable

if TYPE_CHECKING:
    from loradeploy.parity.figures.metrics import Figures
    from loradeploy.parity.report.results import Check, ParityReport, Result

TEMPLATE: Final = Path(__file__).with_name("report.html.jinja")
# Fields of `Figures` that have their own section, and are not in the list of figures.
_OWN_PLACE: Final = ("worst", "first_divergence", "distribution")
_MOST_FAILURES: Final = 5  # shown at the top; the others are folded away
_FEW_RESULTS: Final = 15  # with at most this many, passed results are not folded away


@dataclass(frozen=True)
class Worst:
    """The worst figures of a backend with one adapter, over all phases and variants.

    `limit`: the limit of `max_abs`, None if it was not checked.
    """

    title: str
    adapter: str
    passed: bool
    max_abs: float
    limit: float | None
    effect: float | None
    top1: float | None
    greedy: float | None

    @property
    def agrees(self) -> bool:
        """Whether the same token or label has the largest value at every position."""
        return self.top1 == 1 and self.greedy in (None, 1)


@dataclass(frozen=True)
class MetricRow:
    """A metric over all results: its lowest and highest limit, and the worst value."""

    title: str
    meaning: str
    low: float
    high: float
    worst: float
    failed: int
    reasons: tuple[str, ...]


def html(report: ParityReport) -> str:
    """Return the report as an HTML page. All values are escaped, since names come from users."""
    from jinja2 import Environment, StrictUndefined

    from loradeploy.parity.report import plots
    from loradeploy.parity.report.table import has_variants, headline, inputs_line

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=plots.number, share=share)
    worst = worst_by_backend(report)
    spread = distributions(report)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        headline=headline(report),
        inputs_line=inputs_line(report),
        plots=plots,
        base=BASE_LABEL,
        counts=Counter(result.outcome for result in report.results),
        most=_MOST_FAILURES,
        few=_FEW_RESULTS,
        worst=worst,
        scale=plots.LogScale.over(
            value
            for row in worst
            for value in (row.max_abs / 10, row.max_abs, row.limit, row.effect)
        ),
        spread=spread,
        spread_scale=plots.LogScale.over(
            value for _, rows in spread for edge, _ in rows for value in (edge, edge / 3)
        ),
        groups=groups(report),
        not_run=[result for result in report.results if result.outcome == "not run"],
        metrics=metric_rows(report),
        divergences=divergences(report),
        figures_of=figures_of,
        several_variants=has_variants(report),
        symbols={"passed": "✓", "failed": "✕", "not run": "–"},
    )
    return printable(page, lines=True)


def groups(report: ParityReport) -> list[tuple[str, list[Result]]]:
    """Group the results that ran by adapter, in order."""
    found: dict[str, list[Result]] = {}
    for result in report.results:
        if result.outcome != "not run":
            found.setdefault(result.adapter_label or result.title, []).append(result)
    return list(found.items())


def worst_by_backend(report: ParityReport) -> list[Worst]:
    """Return a row for every backend with every adapter, over all phases and variants."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in report.results:
        if result.figures is not None:
            found.setdefault((result.title, result.adapter_label), []).append(result)
    rows = []
    for (title, adapter), results in found.items():
        at = max(results, key=lambda result: _figures(result).max_abs)
        figures = [_figures(result) for result in results]
        rows.append(
            Worst(
                title=title,
                adapter=adapter,
                passed=all(result.outcome == "passed" for result in results),
                max_abs=_figures(at).max_abs,
                limit=next((c.limit for c in at.checks if c.metric == "max_abs"), None),
                effect=at.effect,
                top1=_least(own.top1 for own in figures),
                greedy=_least(own.greedy for own in figures),
            )
        )
    return rows


def distributions(report: ParityReport) -> list[tuple[str, list[tuple[float, int]]]]:
    """Return the distribution of each backend's absolute errors over all adapters and phases."""
    found: dict[str, Counter[float]] = {}
    for result in report.results:
        if result.figures is not None and result.figures.distribution:
            found.setdefault(result.title, Counter()).update(dict(result.figures.distribution))
    return [(title, sorted(counts.items())) for title, counts in found.items()]


def metric_rows(report: ParityReport) -> list[MetricRow]:
    """Return a row for every metric that was checked."""
    meanings = {metric.name: metric.meaning for metric in METRICS}
    found: dict[str, list[Check]] = {}
    for result in report.results:
        for check in result.checks:
            found.setdefault(check.metric, []).append(check)
    return [
        MetricRow(
            title=checks[0].title,
            meaning=meanings.get(name, ""),
            low=min(check.limit for check in checks),
            high=max(check.limit for check in checks),
            worst=max(check.value for check in checks),
            failed=sum(not check.passed for check in checks),
            reasons=tuple(dict.fromkeys(check.reason for check in checks)),
        )
        for name, checks in found.items()
    ]


def divergences(report: ParityReport) -> list[tuple[Result, bool]]:
    """Return the results in which another token was chosen, and whether each was only a tie.

    There is one for each backend and adapter: the one with the largest margin.
    """
    found: dict[tuple[str, str], Result] = {}
    for result in sorted(report.results, key=_margin, reverse=True):
        if result.figures is not None and result.figures.first_divergence is not None:
            found.setdefault((result.title, result.adapter_label), result)
    return [
        (result, all(check.passed for check in result.checks if check.metric == "margin"))
        for result in found.values()
    ]


def figures_of(result: Result) -> list[tuple[str, Any]]:
    """Return the figures of a result by name, without those that have their own section."""
    if result.figures is None:
        return []
    return [
        (f.name.replace("_", " "), getattr(result.figures, f.name))
        for f in dataclasses.fields(result.figures)
        if f.name not in _OWN_PLACE and getattr(result.figures, f.name) is not None
    ]


def _margin(result: Result) -> float:
    return 0.0 if result.figures is None else result.figures.margin


def _figures(result: Result) -> Figures:
    assert result.figures is not None
    return result.figures


def _least(values: Iterable[float | None]) -> float | None:
    known: Sequence[float] = [value for value in values if value is not None]
    return min(known, default=None)
