# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Line plots and heat maps as inline SVG: readable in light and dark, ticks as people choose them, values under the pointer."""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34
HEAT_COLUMNS, HEAT_ROWS = 80, 32  # of a heat map at most
CLIPPED = 8  # quarters of a doubling: a fourth and four times
DASHES = ("", " dashed", " dotted")  # for more lines than there are colours
MAX_POINTS = 1200  # of a series; more are thinned to the extremes of each stretch


class Series(NamedTuple):
    """Points of one line, x rising; values that are None or not finite are gaps."""

    name: str
    points: Sequence[tuple[float, float | None]]
    style: str  # CSS class: faint, main, accent, second, third, fourth; and behind it one of DASHES
    markers: bool = False


class Axis(NamedTuple):
    """The range of one direction and where its ticks are."""

    low: float
    high: float
    ticks: list[float]
    log: bool

    def fraction(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


def plot(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    log_x: bool = False,
    marks: Sequence[float] = (),
) -> str:
    """A figure with one plot; `marks` are steps to point out by a vertical line. Says so if there is nothing to draw.

    Values under the pointer are shown where the axis along is not logarithmic; there, points need a positive x.
    """
    series = [one._replace(points=_thin(_finite(one.points, positive=log))) for one in series]
    if log_x:
        series = [one._replace(points=[(x, y) for x, y in one.points if x > 0]) for one in series]
    drawn = [one for one in series if one.points]
    heading = f"<figcaption><b>{escape(title)}</b><span>{escape(unit)}</span></figcaption>"
    if not drawn:
        return f'<figure class="plot">{heading}<p class="nothing">nothing recorded</p></figure>'
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points if y is not None]
    across, up = make_axis(min(xs), max(xs), log=log_x), make_axis(min(ys), max(ys), log=log)
    across = across._replace(low=min(xs), high=max(xs)) if max(xs) > min(xs) else across
    body = [_draw_grid(across, up), *(_draw_mark(x, across) for x in marks if across.low <= x <= across.high)]
    body += [_draw_series(one, across, up) for one in drawn]
    keys = dict.fromkeys((one.style, one.name) for one in drawn)
    legend = "".join(f'<span class="key {style}">{escape(name)}</span>' for style, name in keys)
    data = {
        "x": [across.low, across.high],
        "series": [
            {"name": one.name, "points": [[x, round(float(y), 6)] for x, y in one.points if y is not None]}
            for one in drawn
        ],
    }
    pointed = "" if log_x else f"data-plot='{escape(json.dumps(data), quote=True)}'"
    summary = f"{title}, {unit}: from {format_number(drawn[0].points[0][1])} to {format_number(drawn[0].points[-1][1])}"
    return (
        f'<figure class="plot">{heading}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}" '
        f"{pointed}>{''.join(body)}"
        f'<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>'
        f'<div class="legend">{legend}<output></output></div></figure>'
    )


def drawable(value: Any) -> float | None:
    """A value as a number that fits on an axis: None for what is none, or beyond any axis; never denormal."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e60:
        return None
    return value if abs(value) > 1e-60 else 0


def heat_map(
    title: str, unit: str, steps: Sequence[float], rows: Sequence[Sequence[float | None]], *, row_name: str
) -> str:
    """A figure of multiples of an even share: a row for each of `rows`, whose values are at `steps`, the first row on top.

    Colours tell how many times more or less, by quarters of a doubling up to CLIPPED of them; nothing at all is the
    darkest of the low ones. Many steps and many rows are averaged.
    """
    heading = f"<figcaption><b>{escape(title)}</b><span>{escape(unit)}</span></figcaption>"
    cells = [_average_cells(rows, row, HEAT_ROWS, len(steps)) for row in _starts(len(rows), HEAT_ROWS)]
    if not any(value is not None for line in cells for value in line):
        return f'<figure class="plot">{heading}<p class="nothing">nothing recorded</p></figure>'
    width, height = (WIDTH - LEFT - RIGHT) / len(cells[0]), (HEIGHT - TOP - BOTTOM) / len(cells)
    levels: dict[int, list[str]] = {}
    for i, line in enumerate(cells):
        for j, value in enumerate(line):
            level = 0 if value is None else _find_level(value)
            if level:
                x, y = LEFT + j * width, TOP + i * height
                levels.setdefault(level, []).append(f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z")
    body = [
        f'<path class="{"more" if level > 0 else "less"}" fill-opacity="{abs(level) / CLIPPED:.3f}" d="{"".join(paths)}"/>'
        for level, paths in sorted(levels.items())
    ]
    every = math.ceil(len(rows) / len(cells))
    for i in range(0, len(cells), math.ceil(len(cells) / 8)):
        y = TOP + (i + 0.5) * height + 4
        body.append(f'<text x="{LEFT - 7}" y="{y:.1f}" text-anchor="end">{i * every}</text>')
    across = make_axis(min(steps), max(steps))
    across = across._replace(low=min(steps), high=max(steps)) if max(steps) > min(steps) else across
    body.append(_draw_ticks(across))
    frame = (
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>'
    )
    scale = "".join(
        f'<span class="heat {"more" if level > 0 else "less"}" style="--share:{abs(level) / CLIPPED:.3f}">{text}</span>'
        for level, text in ((-CLIPPED, "none, or a quarter"), (-CLIPPED // 2, "half"), (0, "even"), (CLIPPED // 2, "twice"),
                            (CLIPPED, "four times and more"))
    )  # fmt: skip
    summary = f"{title}, {unit}: {len(rows)} rows, the first {row_name} on top, at {len(steps)} steps"
    return (
        f'<figure class="plot">{heading}<svg class="map" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(summary)}">{frame}{"".join(body)}</svg><div class="legend">{scale}</div></figure>'
    )


def _starts(count: int, most: int) -> range:
    """Where each of at most `most` equal stretches of `count` things begins."""
    return range(0, count, max(math.ceil(count / most), 1))


def _average_cells(rows: Sequence[Sequence[float | None]], first: int, most: int, length: int) -> list[float | None]:
    """Of a stretch of rows that begins at `first`, its mean over each stretch of steps."""
    own = rows[first : first + max(math.ceil(len(rows) / most), 1)]
    averaged: list[float | None] = []
    for start in _starts(length, HEAT_COLUMNS):
        part = [v for row in own for v in row[start : start + math.ceil(length / HEAT_COLUMNS)] if v is not None]
        averaged.append(math.fsum(part) / len(part) if part else None)
    return averaged


def _find_level(value: float) -> int:
    """Quarters of a doubling away from 1, at most CLIPPED."""
    if value <= 0:
        return -CLIPPED
    return max(min(round(4 * math.log2(value)), CLIPPED), -CLIPPED)


def make_axis(low: float, high: float, *, log: bool = False) -> Axis:
    """A range that holds low to high with about five round ticks (powers of ten and their halves if `log`)."""
    if log:
        return _make_log_axis(low, high)
    if high - low <= abs(high) * 1e-9:
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad if low else 0.0, high + pad  # nothing at all is the lower end of what may be counted
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, [i * step for i in range(first, last + 1)], False)


def _make_log_axis(low: float, high: float) -> Axis:
    low, high = (low / 1.3, high * 1.3) if high / low < 1.3 else (low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = len(decades) <= 3
    ticks = [m * 10.0**d for d in decades for m in ((1, 2, 5) if few else (1,))]
    every = math.ceil(len(ticks) / 7)
    inside = [tick for tick in ticks if low / 1.05 <= tick <= high * 1.05]
    return Axis(low / 1.1, high * 1.1, inside[::every] or [low, high], True)


def format_number(value: float | None) -> str:
    """A tick as people write it: 1.2k, 3.4M, 5T, 6e+15, 0.05, 6e-05."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 1e15:
        return f"{value:.3g}"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{suffix}"
    return "0" if value == 0 else f"{value:.3g}"


def format_ticks(ticks: Sequence[float]) -> list[str]:
    """Ticks of one axis, with as many digits as it takes to tell them apart."""
    labels = [format_number(tick) for tick in ticks]
    for digits in range(4, 17):
        if len(set(labels)) == len(set(ticks)):
            break
        labels = [f"{tick:,.{digits}g}" for tick in ticks]
    return labels


def _draw_grid(across: Axis, up: Axis) -> str:
    parts = []
    for tick, label in zip(up.ticks, format_ticks(up.ticks), strict=True):
        y = _y(up, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    return "".join(parts) + _draw_ticks(across)


def _draw_ticks(across: Axis) -> str:
    parts = []
    for tick, label in zip(across.ticks, format_ticks(across.ticks), strict=True):
        if across.low <= tick <= across.high:
            x = _x(across, tick)
            anchor = "end" if x > WIDTH - RIGHT - 16 else "middle"
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="{anchor}">{label}</text>')
    return "".join(parts)


def _draw_mark(x: float, across: Axis) -> str:
    place = _x(across, x)
    return f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'


def _draw_series(one: Series, across: Axis, up: Axis) -> str:
    path, pen = [], "M"
    dots = []
    for x, y in one.points:
        if y is None:
            pen = "M"
            continue
        px, py = _x(across, x), _y(up, y)
        path.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L"
        if one.markers or len(one.points) == 1:
            dots.append(f'<circle class="{one.style}" cx="{px:.1f}" cy="{py:.1f}" r="3.2"/>')
    return f'<path class="{one.style}" d="{"".join(path)}"/>{"".join(dots)}'


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.fraction(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.fraction(value) * (HEIGHT - TOP - BOTTOM)


def _finite(points: Sequence[tuple[float, float | None]], *, positive: bool) -> list[tuple[float, float | None]]:
    def usable(y: float | None) -> bool:
        return y is not None and math.isfinite(y) and (y > 0 or not positive)

    kept = [(x, y if usable(y) else None) for x, y in points]
    while kept and kept[-1][1] is None:
        kept.pop()
    while kept and kept[0][1] is None:
        kept.pop(0)
    return kept


def _thin(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most about MAX_POINTS points: the lowest and the highest of every stretch, in order."""
    if len(points) <= MAX_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        part = [point for point in points[start : start + stretch] if point[1] is not None]
        if part:
            kept += sorted({min(part, key=lambda p: p[1] or 0.0), max(part, key=lambda p: p[1] or 0.0)})
    return kept
