# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""HTML template of all report pages. A page is one self-contained file, whose only script is report.js."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from string import Template

THEME_BUTTON = "<button type=button id=theme>light / dark</button>"


def make_html_page(title: str, body: str, *, styles: str = "") -> str:
    """Return a page: a header with the title and a theme switch, and below the header `body`, which is HTML.

    `styles` is CSS to add to page.css. The title is escaped; the caller escapes the text in `body`.
    """
    script = read_package_file("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(read_package_file("page.html")).substitute(
        title=escape(title),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        styles=read_package_file("page.css") + styles,
        body=f"<header><h1>{escape(title)}</h1>{THEME_BUTTON}</header>{body}",
        script=script,
    )


def make_html_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, style: str = "") -> str:
    """Return a table of text cells that scrolls if it is wide; all text is escaped."""
    head = "".join(f"<th>{escape(cell)}" for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows)
    css = f" class={style}" if style else ""
    return f"<div class=numbers><table{css}><tr>{head}{body}</table></div>"


def make_details(summary: str, body: str, *, is_open: bool = False) -> str:
    """Return a collapsible section; `body` is HTML, and the summary is escaped."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{body}</details>"


def make_plots(plots: Sequence[str], heading: str = "") -> str:
    """Return a grid of figures under a heading, or "" without figures."""
    if not plots:
        return ""
    title = f"<h2>{escape(heading)}</h2>" if heading else ""
    return f'{title}<section class="plots">{"".join(plots)}</section>'


@cache
def read_package_file(name: str) -> str:
    """Return the text of a file of this package."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
