# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Building blocks of the datasheet page: style, sections, tables, matrices and formatted numbers."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from mesh_transformer.reports.svg import element, image, rect, text

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1d1f21; --dim: #5f666d; --line: #d9d7d0; --bar: #1f6f5c; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181a; --ink: #e6e6e1; --dim: #9aa3a8; --line: #343a3e; --bar: #6fc3ab; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.dim, td.dim { color: var(--dim); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--dim); font-weight: 600; } th:first-child, td:first-child, .left { text-align: left; }
td:first-child { white-space: nowrap; }
tr.sum td { font-weight: 650; border-top: 2px solid var(--line); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 12.5px/1.45 ui-monospace, Menlo, monospace;
  margin: .3rem 0 .8rem; padding: .5rem .7rem; border: 1px solid var(--line);
  border-radius: .4rem; max-height: 24rem; overflow-y: auto; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; } svg .faint { fill: var(--dim); } svg .on { fill: var(--paper); }
svg .bar { fill: var(--bar); }
svg .cell { fill: var(--bar); stroke: var(--line); } details { margin: .2rem 0; } summary { cursor: pointer; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0; overflow-wrap: anywhere; } em { color: var(--dim); }
code { overflow-wrap: anywhere; }
"""
MB = 1e6
CELL = 46  # pixels: width of a matrix cell


def make_section(title: str, body: str) -> str:
    """Return a section; `body` is HTML, `title` is text."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def make_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] = (), *, left: bool = False
) -> str:
    """Return a table of text cells, aligned right except for the first column; with `left`, all cells are aligned left."""
    css = " class=left" if left else ""
    lines = ["<tr>" + "".join(f"<th{css}>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td{css}>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    if total:
        lines.append("<tr class=sum>" + "".join(f"<td{css}>{escape(cell)}</td>" for cell in total) + "</tr>")
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def format_size(count: float) -> str:
    """Return a number of bytes as text with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def format_count(count: int) -> str:
    """Return a count as text that fits a matrix cell of CELL pixels."""
    return f"{count:,}" if count < 10_000 else f"{count / 1000:.0f}k"


class Cell(NamedTuple):
    """One cell of a matrix; `opacity` is between 0 and 1."""

    opacity: float
    text: str
    tooltip: str


def draw_matrix(
    name: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Cell]]],
    *,
    height: int,
    names_right: bool = False,
) -> str:
    """Return a matrix as inline SVG, its cells `height` pixels high, with the names of the rows on one side."""
    left = 0 if names_right else 130
    top = 96  # space for the rotated column names
    right = left + CELL * len(columns)
    baseline = height // 2 + 5
    body = [
        element("text", escape(column), transform=f"translate({left + j * CELL + 26} {top - 6}) rotate(-45)")
        for j, column in enumerate(columns)
    ]
    for i, (row_name, cells) in enumerate(rows):
        y = top + i * height
        if names_right:
            body.append(text(right + 8, y + baseline, row_name))
        else:
            body.append(text(left - 6, y + baseline, row_name, anchor="end"))
        for j, cell in enumerate(cells):
            x = left + j * CELL
            body.append(rect(x, y, CELL, height, style="cell", opacity=cell.opacity, tip=cell.tooltip))
            if cell.text:
                style = "on" if cell.opacity > 0.6 else ""
                body.append(text(x + CELL / 2, y + baseline, cell.text, style=style, anchor="middle"))
    width = right + (438 if names_right else 90)
    return f"<div class=scroll>{image(width, top + height * len(rows) + 8, ''.join(body), label=name)}</div>"
