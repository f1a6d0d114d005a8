"""The loss curve of a training run, as CSV and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy")


def write_curve(curve: Sequence[Mapping[str, float]], directory: Path) -> None:
    """Write `loss.csv` and `loss.png` with one row per step, with its evaluation if any."""
    with (directory / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(curve)
    _draw(curve, directory / "loss.png")


def _draw(curve: Sequence[Mapping[str, float]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trained = [row for row in curve if "loss" in row]
    steps, losses = [row["step"] for row in trained], [row["loss"] for row in trained]
    alone = "o" if len(losses) == 1 else None  # a line needs two steps
    axes.plot(steps, losses, color="#9bb7d4", linewidth=1, marker=alone, label="step")
    width = max(1, len(losses) // 10)
    if width > 1:
        smooth = [
            sum(losses[max(0, i - width + 1) : i + 1]) / min(i + 1, width)
            for i in range(len(losses))
        ]
        axes.plot(steps, smooth, color="#1f4e79", linewidth=2, label=f"mean of {width} steps")
    evaluated = [row for row in curve if "eval_loss" in row]
    if evaluated:
        values = [row["eval_loss"] for row in evaluated]
        axes.plot([row["step"] for row in evaluated], values, "o-", color="#b5482f", label="eval")
    if width > 1 or evaluated:
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    # Without the date and the library's version, equal curves give equal bytes.
    figure.savefig(file, dpi=120, metadata={"Software": None})
