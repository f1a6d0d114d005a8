"""The plots of the HTML report, as inline SVG.

Plots are as wide as their container: x is in percent and y in pixels, so that text and strokes keep
their size on a phone. Colors are classes of the page's stylesheet. Every plot has a caption in
words, and nothing is shown by color alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from markupsafe import Markup

if TYPE_CHECKING:
    from loradeploy.parity.report.results import Heatmap, Localization, Step

_BAR: Final = 16  # px
_HISTOGRAM: Final = 56
_LAYERS: Final = 240
_AXIS: Final = 18
_CELL: Final = 15
_TICKS: Final = 6
# With more rows or columns than this, neighbors are merged into the worst of them.
_MOST_ROWS: Final = 96
_MOST_COLUMNS: Final = 96
_MOST_LABELS: Final = 8
HEAT: Final = 7  # shades, from h0 to h6
_NO_NUMBER: Final = "not finite"


@dataclass(frozen=True)
class LogScale:
    """A logarithmic scale: maps 10^low to 10^high to 0 to 100 percent."""

    low: int
    high: int

    @classmethod
    def over(cls, values: Iterable[float | None]) -> LogScale:
        """Return the scale that contains all finite positive `values`."""
        logs = [math.log10(v) for v in values if v is not None and math.isfinite(v) and v > 0]
        if not logs:
            return cls(-6, 0)
        low, high = math.floor(min(logs)), math.ceil(max(logs))
        return cls(low, max(high, low + 1))

    def at(self, value: float) -> float:
        """Return the position of `value` in percent: 0 for zero, 100 if it is not finite."""
        if not math.isfinite(value):
            return 100.0
        if value <= 0:
            return 0.0
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)

    @property
    def ticks(self) -> range:
        """The exponents that get a grid line, about seven at most."""
        return range(self.low, self.high + 1, max(1, math.ceil((self.high - self.low) / _TICKS)))


def number(value: float | None) -> str:
    """Format a number with two digits; "–" for None, and words for NaN and infinity.

    Numbers below 0.01 have an exponent, so that their sizes can be compared at a glance.
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return _NO_NUMBER
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.2g}"


def error_bar(
    value: float, limit: float | None, effect: float | None, scale: LogScale, *, passed: bool
) -> Markup:
    """Draw an error as a bar, its limit as a line, the adapter's effect as a diamond."""
    caption = f"error {number(value)}"
    parts = [_track(), _rect(0, scale.at(value), 4, 8, "ok" if passed else "bad")]
    if effect:
        caption += f", adapter effect {number(effect)}"
        parts.append(_diamond(scale.at(effect)))
    if limit is not None:
        caption += f", limit {number(limit)}"
        parts.append(_line(scale.at(limit), 0, scale.at(limit), _BAR, "limit"))
    return _svg(caption, _BAR, parts)


def axis(scale: LogScale) -> Markup:
    """Draw the labels of the powers of ten below a column of bars."""
    parts = []
    for exponent in scale.ticks:
        x = scale.at(10.0**exponent)
        anchor = "start" if x < 4 else "end" if x > 96 else "middle"
        parts.append(_text(x, 13, f"1e{exponent}", "tick", anchor))
    return _svg(f"logarithmic axis from 1e{scale.low} to 1e{scale.high}", _AXIS, parts)


def share_bar(share: float, *, passed: bool) -> Markup:
    """Draw a share as a bar from 0 to 100 percent."""
    length = round(100 * min(1.0, max(0.0, share)), 2) if math.isfinite(share) else 0.0
    bar = _rect(0, length, 4, 8, "ok" if passed else "bad")
    return _svg(f"{length:g} per cent", _BAR, [_track(), bar])


def histogram(distribution: Sequence[tuple[float, int]], scale: LogScale) -> Markup:
    """Draw a histogram of errors, with a bar for every half decade.

    `distribution`: upper edges and counts (`metrics.Figures`).
    """
    total = sum(count for _, count in distribution)
    most = max((count for edge, count in distribution if edge > 0), default=0)
    parts = [_line(0, _HISTOGRAM - 0.5, 100, _HISTOGRAM - 0.5, "grid")]
    for edge, count in distribution:
        if edge > 0 and count:
            left, right = scale.at(edge / math.sqrt(10)), scale.at(edge)
            height = max(1.5, (_HISTOGRAM - 4) * count / most)
            caption = f"{100 * count / total:.2g} % up to {number(edge)}"
            width = max(0.6, right - left - 0.4)
            bar = _rect(left, width, _HISTOGRAM - height, height, "bar", caption)
            parts.append(bar)
    peak = max(((count, edge) for edge, count in distribution), default=(0, 0.0))[1]
    caption = f"{total} values, most of them with an error of about {number(peak)}"
    return _svg(
        caption if peak else f"{total} values, most of them without an error", _HISTOGRAM, parts
    )


def error_by_layer(found: Localization) -> Markup:
    """Draw the relative error of every module, in order of execution, on a logarithmic scale."""
    steps = found.steps
    scale = LogScale.over(step.share for step in steps)
    bottom = _LAYERS - _AXIS
    parts = [*_bands(steps, bottom)]
    for exponent in scale.ticks:
        y = _up(scale, 10.0**exponent, bottom)
        parts += [_line(0, y, 100, y, "grid"), _text(0, y - 3, f"1e{exponent}", "tick", "start")]
    points = [(_along(i, len(steps)), _up(scale, s.share, bottom)) for i, s in enumerate(steps)]
    parts += [
        _line(x, y, right, below, "path") for (x, y), (right, below) in itertools.pairwise(points)
    ]
    first = None if found.first is None else found.first.module
    for step, (x, y) in zip(steps, points, strict=True):
        is_first = step.module == first
        if is_first:
            parts.append(_line(x, 0, x, bottom, "first"))
            anchor = "start" if x < 50 else "end"
            parts.append(_text(x, 12, " ✕ first to diverge ", "first-label", anchor))
        caption = f"{step.module} ({step.op}): {number(step.share)}"
        parts.append(_point(x, y, 5 if is_first else 3, "bad" if is_first else "dot", caption))
    caption = f"relative error of {len(steps)} modules in the order of execution"
    if first is not None:
        caption += f"; {first} is the first to diverge"
    return _svg(caption, _LAYERS, parts)


def heatmap_labels(modules: Sequence[str]) -> Markup:
    """Draw the names of a heatmap's rows; long names are shortened to their distinctive ends."""
    parts = [
        _text(100, _CELL * row + 11, name if len(name) < 25 else f"…{name[-23:]}", "tick", "end")
        for row, name in enumerate(modules)
    ]
    return _svg("modules", _CELL * len(modules) + _AXIS, parts)


def heatmap_cells(heatmap: Heatmap) -> Markup:
    """Draw relative errors by module and position: darker is larger, hatched is not finite."""
    scale = heat_scale(heatmap)
    columns = max(1, len(heatmap.positions))
    width = 100 / columns
    parts = []
    for row, (module, values) in enumerate(zip(heatmap.modules, heatmap.values, strict=True)):
        for column, (position, value) in enumerate(zip(heatmap.positions, values, strict=True)):
            caption = f"{module}, position {position}: {number(value)}"
            style = f"h{shade(value, scale)}" if math.isfinite(value) else "hatched"
            left = column * width
            parts.append(_rect(left, width, row * _CELL, _CELL - 1, style, caption))
    bottom = _CELL * len(heatmap.modules) + 13
    step = max(1, math.ceil(columns / _MOST_LABELS))
    for column in range(0, columns, step):
        x = (column + 0.5) * width
        parts.append(_text(x, bottom, str(heatmap.positions[column]), "tick", "middle"))
    caption = f"heatmap of {len(heatmap.modules)} modules by {columns} positions"
    return _svg(caption, _CELL * len(heatmap.modules) + _AXIS, parts)


def heat_scale(heatmap: Heatmap) -> LogScale:
    """Return the scale of the heatmap's shades."""
    return LogScale.over(value for row in heatmap.values for value in row)


def shade(value: float, scale: LogScale) -> int:
    """Return the shade of a value, from 0 to HEAT − 1."""
    return min(HEAT - 1, int(scale.at(value) / 100 * HEAT))


def shade_edges(scale: LogScale) -> list[tuple[int, float]]:
    """Return every shade and the lowest value that has it."""
    span = scale.high - scale.low
    return [(step, 10 ** (scale.low + span * step / HEAT)) for step in range(HEAT)]


def condensed(heatmap: Heatmap) -> Heatmap:
    """Reduce a heatmap to a readable size: neighboring cells are merged into the worst of them."""
    rows = math.ceil(len(heatmap.modules) / _MOST_ROWS) or 1
    columns = math.ceil(len(heatmap.positions) / _MOST_COLUMNS) or 1
    if rows == columns == 1:
        return heatmap
    values = tuple(
        tuple(
            _worst(
                value
                for line in heatmap.values[row : row + rows]
                for value in line[column : column + columns]
            )
            for column in range(0, len(heatmap.positions), columns)
        )
        for row in range(0, len(heatmap.modules), rows)
    )
    return type(heatmap)(heatmap.modules[::rows], heatmap.positions[::columns], values)


def interval(low: float, value: float, high: float, limit: float, *, passed: bool) -> Markup:
    """Draw a difference and its confidence interval around zero, with dashed limits."""
    reach = 1.1 * max((abs(v) for v in (low, value, high, limit) if math.isfinite(v)), default=1.0)

    def at(number_: float) -> float:
        return round(50 + 50 * max(-1.0, min(1.0, number_ / (reach or 1.0))), 2)

    style = "ok" if passed else "bad"
    parts = [_track(), _line(50, 0, 50, _BAR, "zero")]
    parts += [_line(at(edge), 0, at(edge), _BAR, "limit") for edge in (-limit, limit)]
    if all(map(math.isfinite, (low, value, high))):
        parts.append(_rect(at(low), max(0.5, at(high) - at(low)), 6, 4, style))
        parts.append(_point(at(value), 8, 4, style, number(value)))
    caption = f"difference {number(value)}, between {number(low)} and {number(high)}"
    return _svg(f"{caption}, limit {number(limit)}", _BAR, parts)


# -- parts -----------------------------------------------------------------------------------------


def _bands(steps: Sequence[Step], bottom: int) -> Iterable[Markup]:
    """Shade every other layer, and put the layers' numbers below as far as there is room."""
    layers = list(dict.fromkeys(step.layer for step in steps if step.layer is not None))
    every = max(1, math.ceil(len(layers) / _MOST_LABELS))
    half = 50 / max(1, len(steps))
    for index, layer in enumerate(layers):
        own = [index for index, step in enumerate(steps) if step.layer == layer]
        left = _along(own[0], len(steps)) - half
        right = _along(own[-1], len(steps)) + half
        if index % 2 == 0:
            yield _rect(left, right - left, 0, bottom, "band")
        if index % every == 0:
            text = f"layer {layer}" if index == 0 else str(layer)
            yield _text((left + right) / 2, bottom + 13, text, "tick", "middle")


def _along(index: int, count: int) -> float:
    """Return the x of a step in percent; the axis labels have room on the left."""
    return round(9 + 90 * (index + 0.5) / max(1, count), 2)


def _up(scale: LogScale, value: float, height: int) -> float:
    return round(height - 6 - (height - 30) * scale.at(value) / 100, 1)


def _worst(values: Iterable[float]) -> float:
    return max(values, key=lambda value: (not math.isfinite(value), value))


def _svg(caption: str, height: int, parts: Iterable[Markup]) -> Markup:
    body = Markup("").join(parts)
    head = Markup('<svg role="img" aria-label="{}" width="100%" height="{}"><title>{}</title>')
    return head.format(caption, height, caption) + body + Markup("</svg>")


def _track() -> Markup:
    return _rect(0, 100, 4, 8, "track")


def _rect(
    x: float, width: float, y: float, height: float, style: str, caption: str | None = None
) -> Markup:
    title = Markup("") if caption is None else Markup("<title>{}</title>").format(caption)
    return Markup(
        '<rect class="{}" x="{:.4g}%" width="{:.4g}%" y="{:.4g}" height="{:.4g}">{}</rect>'
    ).format(style, x, width, y, height, title)


def _line(x: float, y: float, right: float, below: float, style: str) -> Markup:
    return Markup('<line class="{}" x1="{}%" y1="{}" x2="{}%" y2="{}"></line>').format(
        style, x, y, right, below
    )


def _point(x: float, y: float, radius: int, style: str, caption: str) -> Markup:
    return Markup('<circle class="{}" cx="{}%" cy="{}" r="{}"><title>{}</title></circle>').format(
        style, x, y, radius, caption
    )


def _diamond(x: float) -> Markup:
    """Draw a diamond in an inner SVG, since the coordinates of a path cannot be percentages."""
    return Markup(
        '<svg x="{}%" y="8" overflow="visible"><path class="effect" d="M0-6L6 0L0 6L-6 0Z"></path>'
        "</svg>"
    ).format(x)


def _text(x: float, y: float, text: str, style: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.4g}%" y="{}" text-anchor="{}">{}</text>').format(
        style, x, y, anchor, text
    )
