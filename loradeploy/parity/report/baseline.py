"""Compares a report with an earlier one (the baseline) and lists regressions.

A figure can be a regression although it is within its limit. It is one if it is more than `FACTOR`
times its baseline and above a floor that is a share of its limit. Rounding errors vary between
correct runs: kernels differ by processor and release, and so does the order of sums. On
SmolLM2-135M the largest error differs by 6 % between onnxruntime's optimization levels, does not
differ between numbers of threads, and differs by 40 % between two correct graphs of one adapter
(side inputs and merged); `FACTOR` is above all of these, and squared for figures that are quadratic
in the error. An error below the floor is less than a tenth of its limit, where changes by a factor
mean nothing.

An agreement (top-1, greedy) is a regression if more than `FACTOR` times as many positions disagree,
and by more than `AGREEMENT_FLOOR` or one position, which may be a tie. A score is a regression if
its difference from the reference is outside the baseline's confidence interval.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.files.digest import short
from loradeploy.errors import UsageError
from loradeploy.files import read_json
from loradeploy.parity.report.results import (
    BASE_LABEL,
    FORMAT,
    LOWER_IS_BETTER,
    SCHEMA_VERSION,
    ParityReport,
    Regression,
)
from loradeploy.parity.report.shares import share

FACTOR: Final = 1.5
_QUADRATIC: Final = ("kl", "cosine_distance")
FLOOR: Final = 0.1  # of the figure's limit
AGREEMENT_FLOOR: Final = 0.01

# The facts that must be equal for two reports to be comparable.
_ALIKE: Final = ("task", "mode", "precision")
_AGREEMENTS: Final = {"top1": "top-1", "greedy": "greedy"}

Key = tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """The compared part of a result: `figures` and `limits` by metric, `shares` by name."""

    where: str
    outcome: str
    message: str | None
    positions: int
    figures: Mapping[str, float]
    limits: Mapping[str, float]
    shares: Mapping[str, float]


@dataclass(frozen=True)
class _Score:
    where: str
    metric: str
    difference: float
    low: float
    high: float
    value: float


@dataclass(frozen=True)
class Baseline:
    """An earlier report, read and checked."""

    path: str
    facts: Mapping[str, Any]
    prompts: int
    mutation_score: float | None
    results: Mapping[Key, _Entry]
    adapters: tuple[str, ...]
    scores: Mapping[Key, _Score]


def read_baseline(file: str | os.PathLike[str]) -> Baseline:
    """Read the report in the JSON file `file`, to compare a later one with it.

    Raises:
        UsageError: the file is missing, too large, not a parity report, or of another schema
            version.
    """
    path = Path(file)
    values = read_json(path, error=UsageError)
    if values.get("format") != FORMAT:
        raise UsageError(
            f"{path} is not a parity report: give the .json report of an earlier check"
        )
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema version {version!r}, this loradeploy compares {SCHEMA_VERSION}:"
            " make the baseline again"
        )
    try:
        return _baseline(os.fspath(file), values)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UsageError(
            f"{path} is a malformed parity report ({type(problem).__name__}: {problem}): make the"
            " baseline again"
        ) from None


def check_comparable(
    baseline: Baseline, *, base: str, base_digest: str | None, **now: str | None
) -> None:
    """Raise UsageError unless base, task, mode and precision (in `now`) are the baseline's."""
    before = baseline.facts
    differ = [name for name in _ALIKE if before[name] != now[name]]
    if differ:
        name = differ[0]
        raise UsageError(
            f"{baseline.path} is not comparable: its {name} is {before[name]}, not {now[name]}"
        )
    digest = before["base_digest"]
    if digest is not None and base_digest is not None:
        if digest != base_digest:
            raise UsageError(
                f"{baseline.path} is not comparable: it is against another reference (digest"
                f" {short(digest)}, now {short(base_digest)}); make the baseline again"
            )
    elif before["base"] != base:
        raise UsageError(
            f"{baseline.path} is not comparable: it is against {before['base']}, not {base}"
        )


def compare_with_baseline(report: ParityReport, baseline: Baseline) -> ParityReport:
    """Return `report` with its regressions since `baseline`, each of which is a failure.

    Raises:
        UsageError: the baseline is not comparable.
    """
    check_comparable(
        baseline,
        base=report.base,
        base_digest=report.base_digest,
        task=report.task,
        mode=report.mode,
        precision=report.precision,
    )
    now = _baseline("", report.to_json())
    found = tuple(_regressions(baseline, now))
    return dataclasses.replace(report, regressions=found, baseline=baseline.path)


def _regressions(before: Baseline, now: Baseline) -> Iterator[Regression]:
    if now.prompts < before.prompts:
        yield _fewer("inputs", "prompts", before.prompts, now.prompts)
    for name in before.adapters:
        if name not in now.adapters:
            yield Regression(name, "adapter", "compared", "missing", "it was compared before")
    for key, entry in before.results.items():
        if entry.outcome == "passed":
            yield from _result_regressions(entry, now.results.get(key))
    for key, score in before.scores.items():
        yield from _score_regressions(score, now.scores.get(key))
    if before.mutation_score is not None and (now.mutation_score or 0.0) < before.mutation_score:
        caught = "not run" if now.mutation_score is None else now.mutation_score
        yield Regression(
            "controls",
            "mutation score",
            before.mutation_score,
            caught,
            f"{share(before.mutation_score)} of the mistakes were caught before, now:"
            f" {caught if isinstance(caught, str) else share(caught)}",
        )


def _result_regressions(before: _Entry, now: _Entry | None) -> Iterator[Regression]:
    outcome = "missing" if now is None else now.outcome
    if now is None or outcome != "passed":
        reason = "" if now is None or now.message is None else f": {now.message}"
        yield Regression(
            before.where, "outcome", "passed", outcome, f"passed before, now {outcome}{reason}"
        )
        return
    if now.positions < before.positions:
        yield _fewer(before.where, "positions", before.positions, now.positions)
    for metric, value in before.figures.items():
        later = now.figures.get(metric, math.nan)
        floor = FLOOR * now.limits.get(metric, 0.0)
        factor = FACTOR**2 if metric in _QUADRATIC else FACTOR
        if not later <= max(factor * value, floor):
            yield Regression(
                before.where,
                metric,
                value,
                later,
                f"{metric} was {value:.2g}, now {later:.2g}: more than {factor:.3g} times as much"
                f" and above {floor:.2g}",
            )
    for name, earlier in before.shares.items():
        later = now.shares.get(name, 0.0)
        tie = max(AGREEMENT_FLOOR, 1.0 / max(1, now.positions))
        lost, was_lost = 1.0 - later, 1.0 - earlier
        if lost > FACTOR * was_lost and lost - was_lost > tie:
            yield Regression(
                before.where,
                name,
                earlier,
                later,
                f"{_AGREEMENTS[name]} agreement was {share(earlier)}, now {share(later)}",
            )


def _score_regressions(before: _Score, now: _Score | None) -> Iterator[Regression]:
    if now is None:
        yield Regression(
            before.where, before.metric, before.value, "missing", f"{before.metric} is not scored"
        )
        return
    higher = before.metric not in LOWER_IS_BETTER
    kept = now.difference >= before.low if higher else now.difference <= before.high
    if not kept:  # NaN is not kept either
        yield Regression(
            before.where,
            before.metric,
            before.value,
            now.value,
            f"{before.metric} is {now.difference:+.2g} from the reference, before"
            f" {before.difference:+.2g} ({before.low:+.2g} to {before.high:+.2g})",
        )


def _fewer(where: str, what: str, before: int, now: int) -> Regression:
    return Regression(where, what, before, now, f"{now} {what} were compared, {before} before")


# -- reading ---------------------------------------------------------------------------------------


def _baseline(path: str, values: Mapping[str, Any]) -> Baseline:
    for name in (*_ALIKE, "base"):
        if name != "task" or values[name] is not None:  # two models have none
            _text(values, name)
    return Baseline(
        path=path,
        facts={name: values[name] for name in (*_ALIKE, "base", "base_digest")},
        prompts=int(values["inputs"]["prompts"]),
        mutation_score=_optional(values.get("mutation_score")),
        results={_key(entry): _entry(entry) for entry in values["results"]},
        adapters=tuple(_text(facts, "name") for facts in values["adapters"]),
        scores={(*_key(s), _text(s, "metric")): _score(s) for s in values["scores"]},
    )


def _key(entry: Mapping[str, Any]) -> Key:
    """Return the key that identifies a result, or a score, within its report."""
    variant = entry.get("variant") or {}
    parts = [entry["backend"], entry["adapter"], _part(entry), *map(variant.get, _VARIANT)]
    return tuple("" if part is None else str(part) for part in parts)


_VARIANT: Final = ("provider", "optimization")


def _entry(entry: Mapping[str, Any]) -> _Entry:
    figures = entry["figures"] or {}
    checks = [check for check in entry["checks"] if check["value"] is not None]
    shares = {name: _optional(figures.get(name)) for name in _AGREEMENTS}
    return _Entry(
        where=_where(entry),
        outcome=_text(entry, "outcome"),
        message=entry.get("message"),
        positions=int(figures.get("positions", 0)),
        figures={_text(check, "metric"): float(check["value"]) for check in checks},
        limits={_text(check, "metric"): _optional(check["limit"]) or 0.0 for check in checks},
        shares={name: share for name, share in shares.items() if share is not None},
    )


def _score(score: Mapping[str, Any]) -> _Score:
    names = ("difference", "low", "high", "value")
    numbers = {name: math.nan if score[name] is None else float(score[name]) for name in names}
    return _Score(_where(score), _text(score, "metric"), **numbers)


def _where(entry: Mapping[str, Any]) -> str:
    not_run = "phase" in entry and entry["phase"] is None  # a score has no phase, but an adapter
    adapter = "" if not_run else entry["adapter"] or BASE_LABEL
    variant = ", ".join(filter(None, map((entry.get("variant") or {}).get, _VARIANT)))
    return ", ".join(filter(None, (entry["title"], adapter, _part(entry), variant)))


def _part(entry: Mapping[str, Any]) -> str | None:
    """Return the phase, or the aspect if two models were compared."""
    return entry.get("phase") or entry.get("aspect")


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, no text")
    return value


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)
