"""The loss curve of a training run, as CSV and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

_COLUMNS = ("step", "loss", "learning_rate", "grad_norm")


def write_curve(curve: Sequence[Mapping[str, float]], directory: Path) -> None:
    """Write `loss.csv` and `loss.png`; the figures of a step are a row."""
    with (directory / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(curve)
    _draw(curve, directory / "loss.png")


def _draw(curve: Sequence[Mapping[str, float]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [row["step"] for row in curve], [row["loss"] for row in curve]
    axes.plot(steps, losses, color="#9bb7d4", linewidth=1, label="step")
    width = max(1, len(losses) // 10)
    if width > 1:
        smooth = [
            sum(losses[max(0, i - width + 1) : i + 1]) / min(i + 1, width)
            for i in range(len(losses))
        ]
        axes.plot(steps, smooth, color="#1f4e79", linewidth=2, label=f"mean of {width} steps")
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="training loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    # Without the date and the library's version the same curve gives the same bytes.
    figure.savefig(file, dpi=120, metadata={"Software": None})
