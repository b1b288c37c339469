# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""SVG for HTML pages: line plots, heat maps, and the elements, axes and grids of other figures.

Plots are readable in light and dark themes. Their colors come from the classes of page.css, and values under the pointer
are shown by report.js.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

HEAT_COLUMNS = 80  # maximum columns of a heat map; more steps are averaged
HEAT_ROWS = 32  # maximum rows of a heat map; more rows are averaged
MAX_HEAT_LEVEL = 8  # quarters of a doubling: four times an even load; its negative is a quarter of an even load
HEAT_LEGEND = (  # level, label
    (-MAX_HEAT_LEVEL, "none, or a quarter"),
    (-MAX_HEAT_LEVEL // 2, "half"),
    (0, "even"),
    (MAX_HEAT_LEVEL // 2, "twice"),
    (MAX_HEAT_LEVEL, "four times and more"),
)
STYLES = ("main", "accent", "second", "third", "fourth")  # CSS classes, each with one color
DASHES = ("", " dashed", " dotted")  # CSS classes that distinguish more lines than there are colors
MAX_POINTS = 1200  # maximum points of a series; longer series are downsampled

Point = tuple[float, float | None]
Points = Sequence[Point]


class Series(NamedTuple):
    """Points of one line, in order of x; None and values that are not finite are gaps."""

    name: str
    points: Points
    style: str  # CSS class: "faint" or an item of STYLES, optionally followed by an item of DASHES
    markers: bool = False


class Axis(NamedTuple):
    """Range and ticks of one axis."""

    low: float
    high: float
    ticks: list[float]
    log: bool

    def fraction(self, value: float) -> float:
        """Return the position of a value: 0 at the low end, 1 at the high end."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


class Frame(NamedTuple):
    """Size and margins of a plot, in SVG units."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    @property
    def x_end(self) -> int:
        """Right end of the plotting area."""
        return self.width - self.right

    @property
    def y_end(self) -> int:
        """Lower end of the plotting area."""
        return self.height - self.bottom

    def x(self, axis: Axis, value: float) -> float:
        """Return the horizontal coordinate of a value."""
        return self.left + axis.fraction(value) * (self.x_end - self.left)

    def y(self, axis: Axis, value: float) -> float:
        """Return the vertical coordinate of a value."""
        return self.y_end - axis.fraction(value) * (self.y_end - self.top)


FRAME = Frame(width=640, height=260, left=58, right=14, top=12, bottom=34)  # report.js has the same numbers


def element(tag: str, content: str = "", *, style: str = "", **attributes: Any) -> str:
    """Return an SVG element. `style` is its CSS class; an underscore in an attribute's name stands for a hyphen.

    Floats are written with one decimal. `content` is inserted unescaped: escape text first.
    """
    named = {"class": style} if style else {}
    named |= {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    written = "".join(
        f' {name}="{f"{value:.1f}" if isinstance(value, float) else escape(str(value))}"'
        for name, value in named.items()
    )
    return f"<{tag}{written}>{content}</{tag}>" if content else f"<{tag}{written}/>"


def text(x: float, y: float, content: str, *, style: str = "", anchor: str = "") -> str:
    """Return a text element; `content` is escaped. `anchor` is middle or end (default: start)."""
    return element("text", escape(content), style=style, x=x, y=y, **({"text_anchor": anchor} if anchor else {}))


def rect(x: float, y: float, width: float, height: float, *, style: str, opacity: float = 1.0, tip: str = "") -> str:
    """Return a filled rectangle; `tip` is shown under the pointer."""
    shown = {} if opacity == 1.0 else {"fill_opacity": f"{opacity:.2f}"}
    content = f"<title>{escape(tip)}</title>" if tip else ""
    return element("rect", content, style=style, x=x, y=y, width=width, height=height, **shown)


def image(width: float, height: float, body: str, *, label: str = "") -> str:
    """Return an inline SVG image of a fixed size."""
    return element("svg", body, role="img", **({"aria_label": label} if label else {}), width=width, height=height)


def plot(
    title: str,
    subtitle: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    log_x: bool = False,
    marks: Sequence[float] = (),
) -> str:
    """Return a figure with one line plot, or with the text "nothing recorded" if there are no points.

    `marks` are x values to highlight by a vertical line. With `log_x`, points need a positive x, and values under the
    pointer are not shown.
    """
    series = [s._replace(points=downsample(_drop_unusable(s.points, positive=log), MAX_POINTS)) for s in series]
    if log_x:
        series = [s._replace(points=[(x, y) for x, y in s.points if x > 0]) for s in series]
    drawn = [s for s in series if s.points]
    if not drawn:
        return _figure(title, subtitle, '<p class="nothing">nothing recorded</p>')
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points if y is not None]
    x_axis = _fitted_axis(xs, log=log_x)
    y_axis = make_axis(min(ys), max(ys), log=log)
    body = [draw_grid(FRAME, x_axis, y_axis), *(_draw_mark(x, x_axis) for x in marks if x_axis.low <= x <= x_axis.high)]
    body += [_draw_series(s, x_axis, y_axis) for s in drawn]
    body.append(element("line", style="pointer", y1=FRAME.top, y2=FRAME.y_end, x1="-9", x2="-9"))
    first, last = drawn[0].points[0][1], drawn[0].points[-1][1]
    label = f"{title}, {subtitle}: from {format_number(first)} to {format_number(last)}"
    data = "" if log_x else f"data-plot='{escape(json.dumps(_pointer_data(drawn, x_axis)), quote=True)}'"
    keys = dict.fromkeys((s.style, s.name) for s in drawn)
    legend = "".join(f'<span class="key {style}">{escape(name)}</span>' for style, name in keys)
    return _figure(
        title,
        subtitle,
        f'<svg viewBox="0 0 {FRAME.width} {FRAME.height}" role="img" aria-label="{escape(label)}" {data}>{"".join(body)}'
        f'</svg><div class="legend">{legend}<output></output></div>',
    )


def _figure(title: str, subtitle: str, body: str) -> str:
    caption = f"<figcaption><b>{escape(title)}</b><span>{escape(subtitle)}</span></figcaption>"
    return f'<figure class="plot">{caption}{body}</figure>'


def _pointer_data(drawn: Sequence[Series], x_axis: Axis) -> dict[str, Any]:
    """Return the points as report.js needs them to show values under the pointer."""
    return {
        "x": [x_axis.low, x_axis.high],
        "series": [
            {"name": s.name, "points": [[x, round(float(y), 6)] for x, y in s.points if y is not None]} for s in drawn
        ],
    }


def drawable(value: Any) -> float | None:
    """Return a value that can be drawn, or None for any other value, such as infinity. Absolute values up to 1e-60 become 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e60:
        return None
    return value if abs(value) > 1e-60 else 0


def heat_map(
    title: str, subtitle: str, steps: Sequence[float], rows: Sequence[Sequence[float | None]], *, row_name: str
) -> str:
    """Return a figure of multiples of an even load: each item of `rows` is a row, with a value at each of `steps`.

    Colors show the multiple as a level, in quarters of a doubling and at most MAX_HEAT_LEVEL; zero has the lowest level. Many
    steps and many rows are averaged.
    """
    cells = [_average_cells(rows, first, len(steps)) for first in _bin_starts(len(rows), HEAT_ROWS)]
    if not any(value is not None for line in cells for value in line):
        return _figure(title, subtitle, '<p class="nothing">nothing recorded</p>')
    width = (FRAME.x_end - FRAME.left) / len(cells[0])
    height = (FRAME.y_end - FRAME.top) / len(cells)
    body = [
        f'<rect class="frame" x="{FRAME.left}" y="{FRAME.top}" width="{FRAME.x_end - FRAME.left}" '
        f'height="{FRAME.y_end - FRAME.top}"/>',
        *_draw_levels(cells, width, height),
    ]
    rows_per_cell = math.ceil(len(rows) / len(cells))
    for i in range(0, len(cells), math.ceil(len(cells) / 8)):
        y = FRAME.top + (i + 0.5) * height + 4
        body.append(text(FRAME.left - 7, y, str(i * rows_per_cell), anchor="end"))
    body.append(_draw_x_ticks(FRAME, _fitted_axis(steps)))
    scale = "".join(
        f'<span class="heat {"more" if level > 0 else "less"}" style="--share:{abs(level) / MAX_HEAT_LEVEL:.3f}">{label}</span>'
        for level, label in HEAT_LEGEND
    )
    label = f"{title}, {subtitle}: {len(rows)} rows, the first {row_name} on top, at {len(steps)} steps"
    return _figure(
        title,
        subtitle,
        f'<svg class="map" viewBox="0 0 {FRAME.width} {FRAME.height}" role="img" aria-label="{escape(label)}">'
        f'{"".join(body)}</svg><div class="legend">{scale}</div>',
    )


def _draw_levels(cells: Sequence[Sequence[float | None]], width: float, height: float) -> list[str]:
    """Return one path per level with all cells of the level; cells with an even or missing value stay blank."""
    levels: dict[int, list[str]] = {}
    for i, line in enumerate(cells):
        for j, value in enumerate(line):
            level = 0 if value is None else _heat_level(value)
            if level:
                x = FRAME.left + j * width
                y = FRAME.top + i * height
                levels.setdefault(level, []).append(f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z")
    return [
        f'<path class="{"more" if level > 0 else "less"}" fill-opacity="{abs(level) / MAX_HEAT_LEVEL:.3f}" '
        f'd="{"".join(paths)}"/>'
        for level, paths in sorted(levels.items())
    ]


def _bin_starts(count: int, max_bins: int) -> range:
    """Return the first index of each bin if `count` items are divided into at most `max_bins` equal bins."""
    return range(0, count, max(math.ceil(count / max_bins), 1))


def _average_cells(rows: Sequence[Sequence[float | None]], first: int, n_steps: int) -> list[float | None]:
    """Return the mean over the bin of rows that begins at row `first`, for each bin of steps."""
    bin_rows = rows[first : first + max(math.ceil(len(rows) / HEAT_ROWS), 1)]
    averaged: list[float | None] = []
    for start in _bin_starts(n_steps, HEAT_COLUMNS):
        part = [v for row in bin_rows for v in row[start : start + math.ceil(n_steps / HEAT_COLUMNS)] if v is not None]
        averaged.append(math.fsum(part) / len(part) if part else None)
    return averaged


def _heat_level(value: float) -> int:
    """Return log2(value) in quarters, limited to -MAX_HEAT_LEVEL to MAX_HEAT_LEVEL."""
    if value <= 0:
        return -MAX_HEAT_LEVEL
    return max(min(round(4 * math.log2(value)), MAX_HEAT_LEVEL), -MAX_HEAT_LEVEL)


def make_axis(low: float, high: float, *, log: bool = False) -> Axis:
    """Return an axis that includes `low` and `high`, with about five round ticks (1, 2 and 5 times powers of ten if `log`)."""
    if log:
        return _make_log_axis(low, high)
    if high - low <= abs(high) * 1e-9:
        pad = abs(high) * 0.1 or 1.0
        low = low - pad if low else 0.0  # counts begin at zero
        high += pad
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 6)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, [i * step for i in range(first, last + 1)], False)


def _make_log_axis(low: float, high: float) -> Axis:
    if high / low < 1.3:
        low /= 1.3
        high *= 1.3
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 3 else (1,)
    ticks = [m * 10.0**d for d in decades for m in factors]
    stride = math.ceil(len(ticks) / 7)
    inside = [tick for tick in ticks if low / 1.05 <= tick <= high * 1.05]
    return Axis(low / 1.1, high * 1.1, inside[::stride] or [low, high], True)


def _fitted_axis(values: Sequence[float], *, log: bool = False) -> Axis:
    """Return an axis that ends at the smallest and largest value, not at a tick."""
    low = min(values)
    high = max(values)
    axis = make_axis(low, high, log=log)
    return axis._replace(low=low, high=high) if high > low else axis


def format_number(value: float | None) -> str:
    """Return a short text of a number: 1.2k, 3.4M, 5T, 6e+15, 0.05, 6e-05; "-" for None."""
    if value is None:
        return "-"
    magnitude = abs(value)
    if magnitude >= 1e15:
        return f"{value:.3g}"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if magnitude >= limit:
            return f"{value / limit:.4g}{suffix}"
    return "0" if value == 0 else f"{value:.3g}"


def format_ticks(ticks: Sequence[float]) -> list[str]:
    """Return the labels of an axis, with as many digits as are needed to make them distinct."""
    labels = [format_number(tick) for tick in ticks]
    for digits in range(4, 17):
        if len(set(labels)) == len(set(ticks)):
            break
        labels = [f"{tick:,.{digits}g}" for tick in ticks]
    return labels


def draw_grid(frame: Frame, x_axis: Axis, y_axis: Axis) -> str:
    """Return the horizontal grid lines and the tick labels of both axes."""
    parts = []
    for tick, label in zip(y_axis.ticks, format_ticks(y_axis.ticks), strict=True):
        y = frame.y(y_axis, tick)
        parts.append(element("line", style="grid", x1=frame.left, x2=frame.x_end, y1=y, y2=y))
        parts.append(text(frame.left - 7, y + 4, label, style="axis", anchor="end"))
    return "".join(parts) + _draw_x_ticks(frame, x_axis)


def _draw_x_ticks(frame: Frame, x_axis: Axis) -> str:
    parts = []
    for tick, label in zip(x_axis.ticks, format_ticks(x_axis.ticks), strict=True):
        if x_axis.low <= tick <= x_axis.high:
            x = frame.x(x_axis, tick)
            anchor = "end" if x > frame.x_end - 16 else "middle"
            parts.append(text(x, frame.y_end + 18, label, style="axis", anchor=anchor))
    return "".join(parts)


def _draw_mark(value: float, x_axis: Axis) -> str:
    x = FRAME.x(x_axis, value)
    return element("line", style="mark", x1=x, x2=x, y1=FRAME.top, y2=FRAME.y_end)


def _draw_series(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    path = []
    dots = []
    command = "M"
    for x, y in series.points:
        if y is None:
            command = "M"
            continue
        px = FRAME.x(x_axis, x)
        py = FRAME.y(y_axis, y)
        path.append(f"{command}{px:.1f} {py:.1f}")
        command = "L"
        if series.markers or len(series.points) == 1:
            dots.append(element("circle", style=series.style, cx=px, cy=py, r=3.2))
    return f'<path class="{series.style}" d="{"".join(path)}"/>{"".join(dots)}'


def _drop_unusable(points: Points, *, positive: bool) -> list[Point]:
    """Return points with None for values that cannot be drawn, without such points at both ends."""

    def is_usable(y: float | None) -> bool:
        return y is not None and math.isfinite(y) and (y > 0 or not positive)

    usable = [(x, y if is_usable(y) else None) for x, y in points]
    while usable and usable[-1][1] is None:
        usable.pop()
    while usable and usable[0][1] is None:
        usable.pop(0)
    return usable


def downsample(points: Points, count: int) -> list[Point]:
    """Return about `count` points: the lowest and highest of each bin, gaps, and the first and last point."""
    if len(points) <= count:
        return list(points)
    bin_size = math.ceil(2 * len(points) / count)
    selected = [points[0]]
    for start in range(1, len(points) - 1, bin_size):
        part = points[start : min(start + bin_size, len(points) - 1)]
        valued = [(y, x) for x, y in part if y is not None]
        selected += sorted({(x, y) for y, x in (min(valued), max(valued))}) if valued else [part[0]]
    return [*selected, points[-1]]
