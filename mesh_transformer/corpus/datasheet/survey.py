# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Sections of the datasheet on content: topics, profanity, and words that co-occur with "he" and "she"."""

from typing import Any

from mesh_transformer.corpus.datasheet.html import Cell, draw_matrix, make_table
from mesh_transformer.corpus.survey import PAPER_WORDS, SAMPLE_CHARACTERS, SAMPLE_DOCUMENTS

ROWS = 15  # rows of the table of biased words


def make_topics(sheet: dict[str, Any]) -> str:
    """Return a matrix of topics and components, darker for a larger share."""
    topics = sheet["survey"]["topics"]
    if not topics["words"]:
        return "<p>Too few documents for topics.</p>"
    names = list(topics["shares"])
    rows = []
    for number, words in enumerate(topics["words"]):
        cells = []
        for name in names:
            share = topics["shares"][name][number]
            tooltip = f"{name}: {share:.1%} {', '.join(words[:3])}"
            cells.append(Cell(min(share**0.6, 1.0), f"{share:.0%}" if share >= 0.1 else "", tooltip))
        rows.append((", ".join(words), cells))
    note = (
        f"<p>Factors of tf-idf (NMF) over {SAMPLE_DOCUMENTS} documents of each component, the first "
        f"{SAMPLE_CHARACTERS:,} characters of each; columns add up to 100%, shares of at least 10% are printed.</p>"
    )
    return note + draw_matrix("topics", names, rows, height=24, names_right=True)


def make_profanity(sheet: dict[str, Any]) -> str:
    """Return a table of profane sentences by component."""
    rows = [
        [
            name,
            f"{counts['sentences']:,}",
            f"{counts['profane']:,}",
            f"{counts['profane'] / max(counts['sentences'], 1):.2%}",
        ]
        for name, counts in sheet["survey"]["profanity"].items()
    ]
    rows.sort(key=lambda row: -float(row[3].rstrip("%")))
    note = (
        f"<p>Sentences of the same {SAMPLE_DOCUMENTS} documents that profanity-check classifies as profane, as in The "
        "Pile's paper. The classifier was trained on English posts: in technical text it also marks terms such as killing a "
        "process or a slave device, and in other languages words that resemble English ones.</p>"
    )
    return note + make_table(["component", "sentences", "profane", "share"], rows)


def make_pronouns(sheet: dict[str, Any]) -> str:
    """Return tables of sentences with "he" and "she" by component, and of words with a bias to one of the two."""
    survey = sheet["survey"]["pronouns"]
    rows = [
        [name, f"{count['he']:,}", f"{count['she']:,}", f"{count['he'] / count['she']:.1f}" if count["she"] else ""]
        for name, count in survey["sentences"].items()
    ]
    sums = [sum(count[pronoun] for count in survey["sentences"].values()) for pronoun in ("he", "she")]
    total = ["all", f"{sums[0]:,}", f"{sums[1]:,}", f"{sums[0] / sums[1]:.1f}" if sums[1] else ""]
    pairs = [
        [*_bias_cells(he), *_bias_cells(she)] for he, she in zip(_pad(survey["he"]), _pad(survey["she"]), strict=True)
    ]
    named = [[*_bias_cells(entry), "he" if entry["word"] in PAPER_WORDS[:3] else "she"] for entry in survey["named"]]
    return (
        "<p>Sentences of all training text, each document once. Bias: difference of the rates at which a word occurs in "
        "sentences with he and with she, times the square root of its frequency in both; function words are excluded.</p>"
        + make_table(["component", "sentences with he", "with she", "he : she"], rows, total)
        + "<h3>Most biased words</h3>"
        + make_table(["to he", "with he", "with she", "bias", "to she", "with he", "with she", "bias"], pairs)
        + "<h3>Words reported in The Pile's paper</h3>"
        + make_table(["word", "with he", "with she", "bias", "bias in The Pile"], named)
    )


def _pad(entries: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    return [*entries, *[None] * (ROWS - len(entries))]


def _bias_cells(entry: dict[str, Any] | None) -> list[str]:
    """Return a word, its number of sentences with "he" and with "she", and its bias, as text cells."""
    return [entry["word"], f"{entry['he']:,}", f"{entry['she']:,}", f"{entry['lean']:+.2f}"] if entry else [""] * 4
