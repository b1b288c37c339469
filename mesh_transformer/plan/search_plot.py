# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A search as one SVG file: step time against memory of every candidate, the compiled ones numbered, the limit drawn."""

from html import escape

from mesh_transformer.plan.fit import memory_use
from mesh_transformer.plan.hardware.chips import Chip
from mesh_transformer.plan.report import describe_mesh, format_ms
from mesh_transformer.plan.search import Candidate, SearchResult, find_frontier, step_seconds
from mesh_transformer.reports.svg import Axis, format_ticks, make_axis

WIDTH, HEIGHT = 1080, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 320, 56, 52
GIB = 2**30
LINE = 40  # of the list beside the plot: two rows of text
STYLE = """
svg{background:#fff;color:#1b1f24;font:13px system-ui,sans-serif}.grid{stroke:#e3e6ea}.axis{fill:#57606a}
.guess{fill:#c3c9d1}.fits{fill:#1f6feb}.over{fill:#cf222e}.limit{stroke:#cf222e;stroke-dasharray:6 4}
.frontier{fill:none;stroke:#1f6feb;stroke-width:2}.number{fill:#fff;font-size:11px;font-weight:600}text{fill:currentColor}.title{font-weight:600;font-size:15px}
@media (prefers-color-scheme:dark){svg{background:#0d1117;color:#e6edf3}.grid{stroke:#262c36}.guess{fill:#484f58}
.fits{fill:#58a6ff}.frontier{stroke:#58a6ff}.over{fill:#ff7b72}.limit{stroke:#ff7b72}.axis{fill:#9198a1}}
"""


def draw_search(found: SearchResult, chip: Chip, title: str) -> str:
    """The SVG text."""
    dots = [(one.seconds * 1e3, one.estimate.peak_bytes / GIB) for one in found.considered]
    limit = chip.memory / GIB
    dots = [(x, y) for x, y in dots if y <= 3 * limit]
    compiled = [(one, *_place(one, chip)) for one in found.compiled]
    xs = [x for x, _ in dots] + [x for _, x, _ in compiled]
    ys = [y for _, y in dots] + [y for _, _, y in compiled] + [limit]
    across = make_axis(min(xs), max(xs), log=max(xs) > 8 * min(xs))
    up = make_axis(0.0, max(ys))
    parts = [_draw_grid(across, up), f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>']
    parts.append(
        f'<text class="axis" x="{LEFT}" y="42">grey: estimates; blue: compiled and fits; red: compiled, too large; '
        "line: frontier</text>"
    )
    parts += [f'<circle class="guess" cx="{_x(across, x):.1f}" cy="{_y(up, y):.1f}" r="2.5"/>' for x, y in dots]
    y = _y(up, limit)
    parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{y - 6:.1f}" text-anchor="end">usable {limit:.2f} GiB</text>')
    fitting = sorted((x, y) for one, x, y in compiled if one.stats and memory_use(one.stats, chip).fits)
    line = [fitting[i] for i in find_frontier(fitting)]
    if len(line) > 1:
        path = " L".join(f"{_x(across, x):.1f} {_y(up, y):.1f}" for x, y in line)
        parts.append(f'<path class="frontier" d="M{path}"/>')
    parts += _draw_compiled(compiled, across, up, chip)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(title)}"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _place(one: Candidate, chip: Chip) -> tuple[float, float]:
    assert one.stats is not None
    return step_seconds(one, chip) * 1e3, memory_use(one.stats, chip).peak / GIB


def _draw_compiled(compiled: list[tuple[Candidate, float, float]], across: Axis, up: Axis, chip: Chip) -> list[str]:
    """Numbered dots, the best last and on top, and the list that names them."""
    parts = []
    for number, (one, x, y) in reversed(list(enumerate(compiled, start=1))):
        fits = one.stats is not None and memory_use(one.stats, chip).fits
        style, row = "fits" if fits else "over", TOP + 12 + (number - 1) * LINE
        for px, py in ((_x(across, x), _y(up, y)), (WIDTH - RIGHT + 34, row)):
            parts.append(f'<circle class="{style}" cx="{px:.1f}" cy="{py:.1f}" r="9"/>')
            parts.append(f'<text class="number" x="{px:.1f}" y="{py + 4:.1f}" text-anchor="middle">{number}</text>')
        words = f"{describe_mesh(one.mesh)}, {one.remat}, {one.grad_accum_steps}x"
        parts.append(f'<text x="{WIDTH - RIGHT + 52}" y="{row + 4}">{escape(words)}</text>')
        figures = f"{y:.2f} GiB, {format_ms(x / 1e3)} ms"
        parts.append(f'<text class="axis" x="{WIDTH - RIGHT + 52}" y="{row + 20}">{figures}</text>')
    return parts


def _draw_grid(across: Axis, up: Axis) -> str:
    parts = []
    for tick, label in zip(up.ticks, format_ticks(up.ticks), strict=True):
        y = _y(up, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick, label in zip(across.ticks, format_ticks(across.ticks), strict=True):
        if across.low <= tick <= across.high:
            x = _x(across, tick)
            parts.append(
                f'<text class="axis" x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{label}</text>'
            )
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
        "milliseconds of a step, middle of the two bounds</text>"
        f'<text class="axis" transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        "peak GiB of a device</text>"
    )
    return "".join(parts)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.fraction(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.fraction(value) * (HEIGHT - TOP - BOTTOM)
