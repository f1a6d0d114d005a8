"""The report of bench_serve: figures of all sides, ratios compared with goals, and tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from tools.bench_serve.sides import LAST, RunReport, percentiles
from tools.timing.alternate import BUSY, NOISE, Ratio, ratio

# Other engines, whose rounding differs: the part of equal texts is only reported.
_PEERS: Final = ("genai", "OpenVINO GenAI", "llama.cpp")


@dataclass(frozen=True)
class Goal:
    """The least ratio that is required: tokens/s of `side` over those of `over`."""

    side: str
    over: str
    least: float


GOALS: Final = (
    Goal("engine", "genai", 3.0),
    Goal("engine", "OpenVINO GenAI", 2.0),
    Goal("engine", "llama.cpp", 2.0),
    Goal("engine", "one adapter", 0.85),
    Goal("http", "engine", 0.9),
    Goal("thousand", "eight small", 0.7),
)


def summary(
    name: str, runs: Mapping[str, Sequence[RunReport]], busiest: float | None
) -> dict[str, Any]:
    """Return figures of all sides, ratios of tokens/s, and reasons why they are not conclusive."""
    speeds = {side: [run.speed for run in own] for side, own in runs.items()}
    economies = {side: [run.economy or 0.0 for run in own] for side, own in runs.items()}
    problems = []
    if busiest is None or busiest > BUSY:
        shown = "unknown" if busiest is None else f"{busiest:.0%} of the processors"
        problems.append(f"the machine has other work ({shown})")
    control = control_by_processor = None
    if {"engine", "control"} <= speeds.keys():
        control = ratio(speeds["control"], speeds["engine"])
        control_by_processor = ratio(economies["control"], economies["engine"])
        if max(abs(control.low - 1), abs(control.high - 1)) > NOISE:
            problems.append(f"the control is {control}")
    else:
        problems.append("there is no control")
    same = {}
    for side in ("control", "http", *_PEERS):
        if side in runs and "engine" in runs:
            pairs = list(zip(runs[side][LAST].texts, runs["engine"][LAST].texts, strict=True))
            same[side] = sum(a == b for a, b in pairs) / len(pairs)
            if side not in _PEERS and same[side] < 1:
                problems.append(f"{side} gives other texts than the engine")
    ratios = []
    for goal in GOALS:
        if {goal.side, goal.over} <= speeds.keys():
            found = ratio(speeds[goal.side], speeds[goal.over])
            met = None if problems else found.median >= goal.least
            by_processor = ratio(economies[goal.side], economies[goal.over])
            ratios.append(
                {
                    **asdict(goal),
                    "ratio": asdict(found),
                    "of_processor_time": asdict(by_processor),
                    "met": met,
                }
            )
    sides = {
        side: {
            "tokens_per_second": statistics.median(speeds[side]),
            "tokens_per_processor_second": statistics.median(economies[side]),
            "first_token_ms": _percentiles([s for run in own for s in run.first]),
            "inter_token_ms": _percentiles([s for run in own for s in run.between]),
            "outside_of_the_graph": statistics.median(known) if known else None,
        }
        for side, own in runs.items()
        for known in [[run.outside for run in own if run.outside is not None]]
    }
    return {
        "bundle": name,
        "sides": sides,
        "control": None if control is None else asdict(control),
        "control_of_processor_time": (
            None if control_by_processor is None else asdict(control_by_processor)
        ),
        "same_texts": same,
        "ratios": ratios,
        "busiest": busiest,
        "not_concluded": problems,
    }


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the report as tables."""
    head = "| bundle | side | tokens/s | tokens/processor s | first token p50 / p99, ms |"
    lines = [
        f"{head} between tokens p50 / p99, ms | outside of the graph |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        for side, own in report["sides"].items():
            outside = own["outside_of_the_graph"]
            lines.append(
                f"| {report['bundle']} | {side} | {own['tokens_per_second']:.1f} |"
                f" {own['tokens_per_processor_second']:.1f} |"
                f" {_shown(own['first_token_ms'])} | {_shown(own['inter_token_ms'])} |"
                f" {'–' if outside is None else f'{outside:.0%}'} |"
            )
    lines += ["", "| bundle | ratio | of tokens/s | of tokens/processor s | goal | met |"]
    lines.append("|---|---|---|---|---|---|")
    for report in reports:
        if report["control"] is not None:
            lines.append(
                f"| {report['bundle']} | control | {Ratio(**report['control'])} |"
                f" {Ratio(**report['control_of_processor_time'])} | 1 | |"
            )
        for row in report["ratios"]:
            met = {None: "not concluded", True: "yes", False: "no"}[row["met"]]
            lines.append(
                f"| {report['bundle']} | {row['side']} / {row['over']} | {Ratio(**row['ratio'])} |"
                f" {Ratio(**row['of_processor_time'])} | ≥ {row['least']} | {met} |"
            )
        same = ", ".join(f"{side} {part:.0%}" for side, part in report["same_texts"].items())
        lines += ["", f"{report['bundle']}: texts equal to the engine's: {same}."]
        if report["not_concluded"]:
            why = "; ".join(report["not_concluded"])
            lines.append(f"Nothing is concluded about {report['bundle']}: {why}.")
    return "\n".join(lines) + "\n"


def _percentiles(seconds: Sequence[float]) -> tuple[float, float] | None:
    """Return p50 and p99 in milliseconds; None for a side that returns whole texts."""
    return percentiles(seconds) if seconds else None


def _shown(milliseconds: tuple[float, float] | None) -> str:
    return "–" if milliseconds is None else f"{milliseconds[0]:.0f} / {milliseconds[1]:.0f}"
