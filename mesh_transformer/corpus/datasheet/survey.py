# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Sections of the datasheet on what the text speaks of: a picture of topics, tables of profanity and of he and she."""

from html import escape
from typing import Any

from mesh_transformer.corpus.datasheet.html import make_table
from mesh_transformer.corpus.survey import CHARACTERS, NAMED, SAMPLE


def show_topics(sheet: dict[str, Any]) -> str:
    """A row for every topic, a column for every component, darker for a larger share."""
    found = sheet["survey"]["topics"]
    if not found["words"]:
        return "<p>Too few documents for topics.</p>"
    names, side, top, right = list(found["shares"]), 46, 96, 46 * len(found["shares"]) + 8
    body = [
        f'<text transform="translate({i * side + 26} {top - 6}) rotate(-45)">{escape(name)}</text>'
        for i, name in enumerate(names)
    ]
    for row, words in enumerate(found["words"]):
        y = top + row * 24
        for i, name in enumerate(names):
            share = found["shares"][name][row]
            tip = f"<title>{escape(name)}: {share:.1%} {escape(', '.join(words[:3]))}</title>"
            opacity = min(share**0.6, 1.0)
            body.append(
                f'<rect class="cell" x="{i * side}" y="{y}" width="{side}" height="24" fill-opacity="{opacity:.2f}">{tip}</rect>'
            )
            if share >= 0.1:
                css = ' class="on"' if opacity > 0.6 else ""
                body.append(f'<text{css} x="{i * side + 23}" y="{y + 16}" text-anchor="middle">{share:.0%}</text>')
        body.append(f'<text x="{right}" y="{y + 16}">{escape(", ".join(words))}</text>')
    width, height = right + 430, top + 24 * len(found["words"]) + 4
    picture = f'<svg role="img" aria-label="topics" width="{width}" height="{height}">{"".join(body)}</svg>'
    note = (
        f"<p>Factors of tf-idf (NMF) over {SAMPLE} documents of each component, the first {CHARACTERS:,} characters of each; "
        "a column adds up to 100%, shares of a tenth or more are written out.</p>"
    )
    return f"{note}<div class=scroll>{picture}</div>"


def show_profanity(sheet: dict[str, Any]) -> str:
    """Share of profane sentences by component."""
    rows = [
        [
            name,
            f"{found['sentences']:,}",
            f"{found['profane']:,}",
            f"{found['profane'] / max(found['sentences'], 1):.2%}",
        ]
        for name, found in sheet["survey"]["profanity"].items()
    ]
    rows.sort(key=lambda row: -float(row[3].rstrip("%")))
    note = (
        f"<p>Sentences of the same {SAMPLE} documents that profanity-check takes for profane, as in The Pile's paper. It was "
        "trained on English posts: of text on computers it also marks what kills a process or names a slave device, and in other "
        "languages whatever looks like an English word it knows.</p>"
    )
    return note + make_table(["component", "sentences", "profane", "share"], rows)


def show_pronouns(sheet: dict[str, Any]) -> str:
    """Sentences with he and she by component, and the words that lean to either."""
    found = sheet["survey"]["pronouns"]
    rows = [
        [name, f"{count['he']:,}", f"{count['she']:,}", f"{count['he'] / count['she']:.1f}" if count["she"] else ""]
        for name, count in found["sentences"].items()
    ]
    sums = [sum(count[one] for count in found["sentences"].values()) for one in ("he", "she")]
    total = ["all", f"{sums[0]:,}", f"{sums[1]:,}", f"{sums[0] / sums[1]:.1f}" if sums[1] else ""]
    pairs = [
        [cell for one in (he, she) for cell in _lean_cells(one)]
        for he, she in zip(_pad(found["he"]), _pad(found["she"]), strict=True)
    ]
    named = [
        [*_lean_cells(row), "he" if row["word"] in NAMED[:3] else "she"]
        for row in found["named"]
    ]  # fmt: skip
    return (
        "<p>Sentences of all training text, each document once. Leaning: difference of the rates at which a word stands in "
        "sentences with he and with she, times the square root of its frequency in these; function words left out.</p>"
        + make_table(["component", "sentences with he", "with she", "he : she"], rows, total)
        + "<h3>Words that lean most</h3>"
        + make_table(["to he", "with he", "with she", "leaning", "to she", "with he", "with she", "leaning"], pairs)
        + "<h3>Words that The Pile's paper names</h3>"
        + make_table(["word", "with he", "with she", "leaning", "in The Pile nearer to"], named)
    )


def _pad(rows: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    return [*rows, *[None] * (15 - len(rows))]


def _lean_cells(row: dict[str, Any] | None) -> list[str]:
    return [row["word"], f"{row['he']:,}", f"{row['she']:,}", f"{row['lean']:+.2f}"] if row else [""] * 4
