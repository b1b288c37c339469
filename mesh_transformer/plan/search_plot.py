# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Plot of a search as SVG: step time and memory of every candidate, with the memory limit and the Pareto frontier."""

from html import escape

from mesh_transformer.plan.fit import memory_use
from mesh_transformer.plan.hardware.chips import Chip
from mesh_transformer.plan.report import describe_mesh, format_ms
from mesh_transformer.plan.search import Candidate, SearchResult, find_frontier, step_seconds
from mesh_transformer.reports.svg import Axis, Frame, draw_grid, element, make_axis, text

FRAME = Frame(width=1080, height=520, left=70, right=320, top=56, bottom=52)
GIB = 2**30
LIST_STEP = 40  # height of a list entry next to the plot: two lines of text
STYLE = """
svg{background:#fff;color:#1b1f24;font:13px system-ui,sans-serif}.grid{stroke:#e3e6ea}.axis{fill:#57606a}
.estimate{fill:#c3c9d1}.fits{fill:#1f6feb}.over{fill:#cf222e}.limit{stroke:#cf222e;stroke-dasharray:6 4}
.frontier{fill:none;stroke:#1f6feb;stroke-width:2}.number{fill:#fff;font-size:11px;font-weight:600}text{fill:currentColor}.title{font-weight:600;font-size:15px}
@media (prefers-color-scheme:dark){svg{background:#0d1117;color:#e6edf3}.grid{stroke:#262c36}.estimate{fill:#484f58}
.fits{fill:#58a6ff}.frontier{stroke:#58a6ff}.over{fill:#ff7b72}.limit{stroke:#ff7b72}.axis{fill:#9198a1}}
"""


def draw_search(result: SearchResult, chip: Chip, title: str) -> str:
    """Return the SVG file as text. Compiled candidates are numbered."""
    dots = [(candidate.seconds * 1e3, candidate.estimate.peak_bytes / GIB) for candidate in result.considered]
    limit = chip.memory / GIB
    dots = [(x, y) for x, y in dots if y <= 3 * limit]
    compiled = [(candidate, *_coordinates(candidate, chip)) for candidate in result.compiled]
    xs = [x for x, _ in dots] + [x for _, x, _ in compiled]
    ys = [y for _, y in dots] + [y for _, _, y in compiled] + [limit]
    x_axis = make_axis(min(xs), max(xs), log=max(xs) > 8 * min(xs))
    y_axis = make_axis(0.0, max(ys))
    parts = [_draw_axes(x_axis, y_axis), f'<text class="title" x="{FRAME.left}" y="24">{escape(title)}</text>']
    parts.append(
        f'<text class="axis" x="{FRAME.left}" y="42">gray: estimates; blue: compiled and fits; red: compiled, too large; '
        "line: frontier</text>"
    )
    parts += [
        f'<circle class="estimate" cx="{FRAME.x(x_axis, x):.1f}" cy="{FRAME.y(y_axis, y):.1f}" r="2.5"/>'
        for x, y in dots
    ]
    y = FRAME.y(y_axis, limit)
    parts.append(f'<line class="limit" x1="{FRAME.left}" x2="{FRAME.x_end}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(f'<text x="{FRAME.x_end}" y="{y - 6:.1f}" text-anchor="end">usable {limit:.2f} GiB</text>')
    fitting = sorted(
        (x, y) for candidate, x, y in compiled if candidate.stats and memory_use(candidate.stats, chip).fits
    )
    line = [fitting[i] for i in find_frontier(fitting)]
    if len(line) > 1:
        path = " L".join(f"{FRAME.x(x_axis, x):.1f} {FRAME.y(y_axis, y):.1f}" for x, y in line)
        parts.append(f'<path class="frontier" d="M{path}"/>')
    parts += _draw_compiled(compiled, x_axis, y_axis, chip)
    body = f"<style>{STYLE}</style>{''.join(parts)}"
    dimensions = f'viewBox="0 0 {FRAME.width} {FRAME.height}" width="{FRAME.width}" height="{FRAME.height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {dimensions} role="img" aria-label="{escape(title)}">{body}</svg>\n'
    )


def _coordinates(candidate: Candidate, chip: Chip) -> tuple[float, float]:
    assert candidate.stats is not None
    return step_seconds(candidate, chip) * 1e3, memory_use(candidate.stats, chip).peak / GIB


def _draw_compiled(compiled: list[tuple[Candidate, float, float]], x_axis: Axis, y_axis: Axis, chip: Chip) -> list[str]:
    """Return the numbered dots of compiled candidates, the best drawn last, and the list that describes them."""
    parts = []
    for number, (candidate, x, y) in reversed(list(enumerate(compiled, start=1))):
        fits = candidate.stats is not None and memory_use(candidate.stats, chip).fits
        style, row = "fits" if fits else "over", FRAME.top + 12 + (number - 1) * LIST_STEP
        for px, py in ((FRAME.x(x_axis, x), FRAME.y(y_axis, y)), (FRAME.x_end + 34, row)):
            parts.append(f'<circle class="{style}" cx="{px:.1f}" cy="{py:.1f}" r="9"/>')
            parts.append(f'<text class="number" x="{px:.1f}" y="{py + 4:.1f}" text-anchor="middle">{number}</text>')
        words = f"{describe_mesh(candidate.mesh)}, {candidate.remat}, {candidate.grad_accum_steps}x"
        parts.append(f'<text x="{FRAME.x_end + 52}" y="{row + 4}">{escape(words)}</text>')
        figures = f"{y:.2f} GiB, {format_ms(x / 1e3)} ms"
        parts.append(f'<text class="axis" x="{FRAME.x_end + 52}" y="{row + 20}">{figures}</text>')
    return parts


def _draw_axes(x_axis: Axis, y_axis: Axis) -> str:
    """Return the grid with the titles of both axes."""
    x = (FRAME.left + FRAME.x_end) / 2
    y = (FRAME.top + FRAME.y_end) / 2
    rotate = f"translate(18 {y}) rotate(-90)"
    return (
        draw_grid(FRAME, x_axis, y_axis)
        + text(x, FRAME.height - 10, "step time in ms, mean of the two bounds", style="axis", anchor="middle")
        + element("text", "peak memory of a device in GiB", style="axis", transform=rotate, text_anchor="middle")
    )
