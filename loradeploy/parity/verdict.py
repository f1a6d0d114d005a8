"""The verdict on one comparison: each figure checked against its limit, and why it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loradeploy.parity.figures.tolerances import METRICS, Limit
from loradeploy.parity.report.results import (
    Check,
    Result,
    Variant,
    no_more_than_rounding,
    outcome_of,
)

if TYPE_CHECKING:
    from loradeploy.parity.figures.metrics import Figures

_LISTED = 3


@dataclass(frozen=True)
class Verdict:
    """The figures of a comparison and their checks. `failure`: one line; None if it passed."""

    figures: Figures
    checks: tuple[Check, ...]
    failure: str | None

    @property
    def passed(self) -> bool:
        """Whether positions were compared and every figure is within its limit."""
        return self.failure is None

    def result(
        self,
        *,
        backend: str,
        title: str,
        adapter: str | None = None,
        phase: str | None = None,
        aspect: str | None = None,
        problem: str | None = None,
        remark: str | None = None,
        effect: float | None = None,
        seconds: float = 0.0,
        variant: Variant | None = None,
    ) -> Result:
        """Return the verdict as an entry of a report.

        `problem`: a reason to fail regardless of the figures. `remark`: the message if it passes.
        Without compared positions, the entry has no figures.
        """
        failure = self.failure if problem is None else problem
        compared = self.figures.positions > 0
        return Result(
            backend=backend,
            title=title,
            adapter=adapter,
            phase=phase,
            aspect=aspect,
            outcome=outcome_of(failure),
            message=remark if failure is None else failure,
            figures=self.figures if compared else None,
            checks=self.checks if compared else (),
            effect=effect,
            seconds=round(seconds, 3),
            variant=variant,
        )


def judge(figures: Figures, limits: Mapping[str, Limit], *, effect: float | None) -> Verdict:
    """Check every figure that was computed against its limit.

    `effect`: the adapter's largest effect; None for the base and for an adapter without an effect,
    where the error has nothing to be compared with.
    """
    checks = _checks(figures, limits, effect)
    return Verdict(figures, checks, _failure(figures, checks, effect))


def _checks(
    figures: Figures, limits: Mapping[str, Limit], effect: float | None
) -> tuple[Check, ...]:
    values = {
        "max_abs": figures.max_abs,
        "p99_abs": figures.p99_abs,
        "mean_abs": figures.mean_abs,
        "max_rel": figures.max_rel,
        "cosine_distance": figures.cosine_distance,
        "kl": figures.kl,
        "margin": None if figures.top1 is None else figures.margin,
        "effect_share": figures.max_abs / effect if effect else None,
    }
    checks = []
    for metric in METRICS:
        value, limit = values[metric.name], limits[metric.name]
        if value is not None:
            passed = value <= limit.value
            checks.append(
                Check(metric.name, metric.title, value, limit.value, passed, limit.reason)
            )
    return tuple(checks)


def _failure(figures: Figures, checks: tuple[Check, ...], effect: float | None) -> str | None:
    if figures.not_finite:
        return f"{figures.not_finite} of {figures.positions} positions have NaN or infinite values"
    if not figures.positions:
        return "no positions were compared"
    failed = [check for check in checks if not check.passed]
    if not failed:
        return None
    if effect and [check.metric for check in failed] == ["effect_share"]:
        (share,) = failed
        small = no_more_than_rounding(checks, effect)
        return (
            f"the error of {figures.max_abs:.2g} can be rounding, but it is not far below the"
            f" adapter's effect of {effect:.2g} ({share.title} {share.value:.2g} >"
            f" {share.limit:.2g}): it proves nothing about"
            f" {'an adapter that is nearly untrained' if small else 'the adapter'}"
        )
    listed = ", ".join(
        f"{check.title} {check.value:.2g} > {check.limit:.2g}" for check in failed[:_LISTED]
    )
    if len(failed) > _LISTED:
        listed += f" and {len(failed) - _LISTED} more"
    where = ""
    if figures.worst is not None:
        worst = figures.worst
        where = f"; worst at prompt {worst.case + 1}, position {worst.position}"
    first = figures.first_divergence
    if first is not None and any(check.metric == "margin" for check in failed):
        step = f"generated token {first.step + 1}" if first.step is not None else "position"
        at = "" if first.step is not None else f" {first.position}"
        where += (
            f"; first different token at prompt {first.case + 1}, {step}{at}:"
            f" {first.actual} instead of {first.expected} (margin {first.margin:.2g})"
        )
    return listed + where
