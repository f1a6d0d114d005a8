"""Reproducible SVG charts, and bars of milliseconds."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loradeploy.files import atomic_file


@contextmanager
def svg_axes(
    file: Path,
    rows: int,
    columns: int = 1,
    *,
    name: str,
    font_size: int,
    figsize: tuple[float, float],
    heights: list[int] | None = None,
    bottom: float = 0.0,
) -> Iterator[Any]:
    """Yield the axes [rows, columns] of a figure that is written to `file` after the block.

    `name`: seed of the ids in the SVG. `heights`: relative heights of the rows. `bottom`: the part
    of the figure that is left free below the axes.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": name, "font.size": font_size})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=figsize, height_ratios=heights, squeeze=False
    )
    yield axes
    figure.tight_layout(rect=(0, bottom, 1, 1))
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)


def bars(
    axis: Any,
    title: str,
    milliseconds: Mapping[str, float],
    *,
    others: Container[str],
    digits: int,
    padding: float,
    margin: float,
) -> None:
    """Draw a bar for each side; the sides in `others`, other engines, have another color."""
    colors = ["#c44e52" if side in others else "#4c72b0" for side in milliseconds]
    drawn = axis.barh(list(milliseconds), list(milliseconds.values()), color=colors)
    labels = [f"{value:.{digits}f}" for value in milliseconds.values()]
    axis.bar_label(drawn, labels, padding=padding)
    axis.invert_yaxis()
    axis.set_title(f"{title}: ms", loc="left", fontsize="medium")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=margin)
