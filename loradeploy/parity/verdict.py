"""Figures held against the tolerances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loradeploy.parity.report.results import Check
from loradeploy.parity.tolerances import METRICS, Limit

if TYPE_CHECKING:
    from loradeploy.parity.metrics import Figures

_LISTED = 3


def judge(
    figures: Figures, limits: Mapping[str, Limit], *, effect: float | None
) -> tuple[Check, ...]:
    """Every figure that there is against its limit.

    `effect`: the adapter's largest effect; None for the base and for an adapter without one, where
    there is nothing to compare the error with.
    """
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


def failure(figures: Figures, checks: tuple[Check, ...]) -> str | None:
    """Why the figures fail, in one line; None where they pass."""
    if figures.not_finite:
        return f"{figures.not_finite} of {figures.positions} positions hold NaN or infinite values"
    if not figures.positions:
        return "no positions were compared"
    failed = [check for check in checks if not check.passed]
    if not failed:
        return None
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
            f"; first other token at prompt {first.case + 1}, {step}{at}:"
            f" {first.actual} for {first.expected} (margin {first.margin:.2g})"
        )
    return listed + where
