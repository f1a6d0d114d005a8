"""The tables and the chart of bench_peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.timing.alternate import Ratio
from tools.timing.charts import bars, svg_axes

_SHOWN = ("first 512 base", "first 512 one", "step 128 base", "step 128 one", "eight")


def markdown(report: Mapping[str, Any]) -> str:
    """Return tables of milliseconds and of ratios with their goals, and what was not concluded."""
    lines = []
    for result in report["results"]:
        sides = result["milliseconds"]
        lines += [f"{result['precision']}, milliseconds:", ""]
        lines.append("| | " + " | ".join(sides) + " |")
        lines.append("|---|" + "---|" * len(sides))
        for what in next(iter(sides.values())):
            lines.append(_row(what, [own[what] for own in sides.values()]))
        for title, name in (("swap", "swap_ms"), ("load", "load_ms"), ("peak, MB", "peak_mb")):
            lines.append(_row(title, [result[name][side] for side in sides]))
        same = ", ".join(f"{side} {part:.0%}" for side, part in result["same_tokens"].items())
        lines += ["", f"Tokens equal to those of slots: {same}."]
        lines += [
            f"Where {side}'s differ first, the two tokens' logits differ by at most {gap:.4f}."
            for side, gap in result["gaps"].items()
        ]
        lines.append("")
        lines += ["| ours / theirs | | median (quartiles) | control | goal | met |"]
        lines.append("|---|---|---|---|---|---|")
        for row in result["ratios"]:
            found = Ratio(row["median"], row["low"], row["high"])
            control = Ratio(**result["control"][row["what"]])
            met = "yes" if found.median <= row["goal"] else "no"
            if not row["concluded"]:
                met = "not concluded"
            lines.append(
                f"| {row['what']} | {row['ours']} / {row['peer']} | {found} | {control} |"
                f" ≤ {row['goal']} | {met} |"
            )
        if result["not_concluded"]:
            why = "; ".join(result["not_concluded"])
            lines += ["", f"Nothing is concluded about {result['precision']}: {why}."]
        lines.append("")
    return "\n".join(lines)


def _row(title: str, values: Sequence[float]) -> str:
    return (
        f"| {title.replace('resident', 'resident, MB')} | "
        + " | ".join(f"{value:.1f}" for value in values)
        + " |"
    )


def draw(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw bars of every side, with a column for each precision and a row for each main figure."""
    size = (3.4 * len(results), 1.5 * len(_SHOWN))
    grid = svg_axes(file, len(_SHOWN), len(results), name="peers", font_size=8, figsize=size)
    with grid as axes:
        for column, result in zip(axes.T, results, strict=True):
            ours = {row["ours"] for row in result["ratios"]}
            for axis, what in zip(column, _SHOWN, strict=True):
                sides = {side: own[what] for side, own in result["milliseconds"].items()}
                del sides["control"]
                bars(
                    axis,
                    f"{result['precision']}, {what}",
                    sides,
                    others=set(sides) - ours,
                    digits=0,
                    padding=2,
                    margin=0.15,
                )
