# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The datasheet as a self-contained HTML page: tables, and charts as inline SVG."""

import json
from html import escape
from typing import Any

from mesh_transformer.corpus.datasheet.html import (
    CELL,
    MB,
    STYLE,
    Cell,
    draw_matrix,
    format_count,
    format_size,
    make_section,
    make_table,
)
from mesh_transformer.corpus.datasheet.survey import make_profanity, make_pronouns, make_topics
from mesh_transformer.reports.svg import image, rect, text


def make_page(sheet: dict[str, Any]) -> str:
    """Return the page of a datasheet that describe_corpus or read_datasheet returned."""
    sections = [
        f"<h1>{escape(sheet['name'])}</h1><p>{escape(sheet['about'])}</p>",
        f"<p class=dim>digest <code>{sheet['digest']}</code></p>",
        make_section("Composition", _composition(sheet)),
        make_section("Filters and deduplication", _removals(sheet)),
        make_section("Duplicates", _duplicates(sheet)),
        make_section("Document lengths", _lengths(sheet)),
        make_section("Languages", _languages(sheet)),
        make_section("Topics", make_topics(sheet)),
        make_section("Profanity", make_profanity(sheet)),
        make_section("He and she", make_pronouns(sheet)),
        make_section("Skipped documents", _skipped(sheet)),
        make_section("Training and held-out text", _split(sheet)),
        make_section("Gaps and biases", _gaps(sheet)),
        make_section("Licenses, consent and origin", _licenses(sheet)),
        make_section("Questions and answers", _answers(sheet)),
        make_section("Samples of removed documents", _samples(sheet)),
        make_section("Inputs and outputs", _outputs(sheet)),
        make_section("Recipe", f"<pre>{escape(json.dumps(sheet['recipe'], indent=1, ensure_ascii=False))}</pre>"),
    ]
    title = f"{escape(sheet['name'])}: datasheet"
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style><main>{''.join(sections)}</main></html>\n"
    )


def _composition(sheet: dict[str, Any]) -> str:
    parts = sheet["components"]
    head = [
        "component",
        "raw MB",
        "retained MB",
        "weight",
        "epochs",
        "effective MB",
        "documents",
        "mean document",
        "tokens per byte",
    ]
    published = any(part["published"] for part in parts.values())
    head += ["published: GiB", "weight", "epochs"] * published
    rows = []
    for name, part in sorted(parts.items(), key=lambda item: -item[1]["weight"]):
        row = [
            name,
            f"{part['raw_bytes'] / MB:.1f}",
            f"{part['train_bytes'] / MB:.1f}",
            f"{part['weight']:.2%}",
            f"{part['epochs']:.2f}",
            f"{part['effective_bytes'] / MB:.1f}",
            f"{part['train_documents']:,}",
            format_size(part["mean_document_bytes"]),
            f"{part['tokens_per_byte']:.4f}",
        ]
        if published:
            published_figures = part["published"] or {}
            row += [str(published_figures.get(key, "")) for key in ("raw_gib", "weight", "epochs")]
        rows.append(row)
    retained = sum(part["train_bytes"] for part in parts.values())
    documents = sum(part["train_documents"] for part in parts.values())
    total = [
        "all",
        f"{sum(part['raw_bytes'] for part in parts.values()) / MB:.1f}",
        f"{retained / MB:.1f}",
        "100.00%",
        "",
        f"{sum(part['effective_bytes'] for part in parts.values()) / MB:.1f}",
        f"{documents:,}",
        format_size(retained / max(documents, 1)),
        f"{sum(part['tokens'] for part in parts.values()) / max(retained, 1):.4f}",
        *[""] * 3 * published,
    ]
    note = (
        "<p>Raw: text of all readable documents. Retained: training text after filters, deduplication and line removal. "
        f"Effective: retained text times epochs, as in the mixture. Tokenizer: {escape(sheet['tokenizer'])}.</p>"
    )
    missing = "".join(f"<li>{escape(name)}: {escape(origin)}</li>" for name, origin in sheet["missing"].items())
    if missing:
        missing = f"<p>Optional components without files, with their origin:</p><ul>{missing}</ul>"
    return note + make_table(head, rows, total) + missing


def _removals(sheet: dict[str, Any]) -> str:
    """Return a table with a row for every filter that dropped documents or changed the size by at least 5000 bytes."""
    rows = []
    for name, part in sheet["components"].items():
        for counts in part["filters"]:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in list(counts["dropped"].items())[:4])
            removed_bytes = counts["bytes_in"] - counts["bytes_out"]
            if reasons or abs(removed_bytes) >= 5000:
                sizes = [f"{counts['documents_in']:,}", f"{counts['documents_out']:,}", f"{-removed_bytes / MB:+.2f}"]
                rows.append([name, counts["name"], *sizes, reasons or "none dropped; texts were changed"])
        n_duplicates = part["exact_duplicates"] + part["near_duplicates"]
        if n_duplicates:
            documents_in = (
                part["train_documents"] + part["heldout_documents"] + part["documents_emptied"] + n_duplicates
            )
            reasons = f"exact duplicate {part['exact_duplicates']:,}, near duplicate {part['near_duplicates']:,}"
            change = f"{-part['duplicate_bytes'] / MB:+.2f}"
            rows.append([name, "duplicates", f"{documents_in:,}", f"{documents_in - n_duplicates:,}", change, reasons])
        if part["lines_cut"]:
            cut = f"{-part['line_bytes_cut'] / MB:+.2f}"
            rows.append([name, "lines", "", "", cut, f"{part['lines_cut']:,} recurring lines"])
    note = "<p>Filters of each component in order. A filter that dropped no document and changed less than 5 kB is omitted.</p>"
    return note + make_table(
        ["component", "filter", "documents in", "documents out", "change in MB", "reasons"], rows, left=True
    )


def _duplicates(sheet: dict[str, Any]) -> str:
    duplicates = sheet["duplicates"]
    bands, rows = duplicates["bands_and_rows"]
    text = "<p>Rows: component of the removed documents. Columns: component of the retained duplicates.</p>"
    if bands:
        points = ", ".join(f"{s:.1f}: {1 - (1 - s**rows) ** bands:.3f}" for s in (0.3, 0.5, 0.7, 0.8, 0.9))
        text += (
            f"<p class=dim>Near: MinHash, {bands} bands of {rows} hashes over word n-grams ({escape(duplicates['near'])}). "
            f"Probability of finding a pair by its Jaccard similarity: {points}.</p>"
        )
    names = list(sheet["components"])
    return text + "".join(
        f"<h3>{kind}</h3>{_matrix(f'{kind} duplicates', names, {(a, b): n for a, b, n in duplicates['matrix'][kind]})}"
        for kind in ("exact", "near")
    )


def _matrix(name: str, names: list[str], counts: dict[tuple[str, str], int]) -> str:
    """Return a square for every pair of components, darker for more documents."""
    largest = max(counts.values(), default=0)
    rows = []
    for a in names:
        cells = []
        for b in names:
            count = counts.get((a, b), 0)
            opacity = 0.15 + 0.85 * (count / largest) ** 0.4 if count else 0.0
            cells.append(Cell(opacity, format_count(count) if count else "", f"{a} to {b}: {count:,}"))
        rows.append((a, cells))
    return draw_matrix(name, names, rows, height=CELL)


def _lengths(sheet: dict[str, Any]) -> str:
    """Return a small histogram of document lengths for every component; its bins are powers of two of bytes."""
    parts = sheet["components"]
    bits = [int(bit) for part in parts.values() for bit in part["lengths"]]
    low, high = min(bits, default=0), max(bits, default=1)
    charts = []
    for name, part in parts.items():
        largest = max(part["lengths"].values(), default=1)
        bars = []
        for bit in range(low, high + 1):
            count = part["lengths"].get(str(bit), 0)
            height = 70 * count / largest
            tip = f"under {format_size(2**bit)}: {count:,} documents"
            x = 4 + (bit - low) * 12
            bars.append(rect(x, 96 - height, 10, height, style="bar", tip=tip))
            if bit % 5 == 0:
                bars.append(text(x, 110, format_size(2**bit), style="faint"))
        width = 40 + (high - low + 1) * 12
        charts.append(image(width, 118, text(4, 14, name) + "".join(bars)))
    return f"<p>Bytes of a training document; each bar covers lengths up to a power of two.</p><div>{''.join(charts)}</div>"


def _languages(sheet: dict[str, Any]) -> str:
    """Return a bar for each component with its shares of bytes by language."""
    if not any(part["languages"] for part in sheet["components"].values()):
        return "<p>Not measured, because the recipe has no filter of the kind language.</p>"
    rows = []
    for name, part in sheet["components"].items():
        total = sum(part["languages"].values()) or 1
        shares = [(language, size / total) for language, size in part["languages"].items()]
        x = 0.0
        bar = []
        for i, (language, share) in enumerate(shares):
            opacity = max(1 - 0.18 * i, 0.12)
            bar.append(rect(x, 3, 320 * share, 14, style="bar", opacity=opacity, tip=f"{language} {share:.1%}"))
            x += 320 * share
        words = ", ".join(f"{escape(language)} {share:.1%}" for language, share in shares[:5])
        chart = image(320, 20, "".join(bar))
        rows.append(f"<tr><td>{escape(name)}</td><td>{chart}</td><td class=left>{words}</td></tr>")
    note = "<p>Shares of bytes as identified by py3langid, which also assigns a language to code.</p>"
    return f"{note}<div class=scroll><table>{''.join(rows)}</table></div>"


def _skipped(sheet: dict[str, Any]) -> str:
    rows = [
        [name, kind, f"{count:,}", (part["skipped_examples"].get(kind) or [""])[0]]
        for name, part in sheet["components"].items()
        for kind, count in part["skipped"].items()
    ]
    rows += [
        [name, f"encoding {encoding}", f"{count:,}", "decoded, not skipped"]
        for name, part in sheet["components"].items()
        for encoding, count in part["decoded"].items()
    ]
    return make_table(["component", "error", "count", "first example"], rows, left=True) if rows else "<p>None.</p>"


def _split(sheet: dict[str, Any]) -> str:
    rows = [
        [name, f"{part['train_documents']:,}", f"{part['heldout_documents']:,}", f"{part['heldout_bytes'] / MB:.2f}"]
        for name, part in sheet["components"].items()
    ]
    check = sheet["split_check"]
    text = (
        "<p>Held-out documents are selected by a hash of their names before any other stage. Training documents that equal "
        "a held-out document, or share a MinHash band with one, are removed. Check of the final texts: of "
        f"{check['heldout_texts']:,} held-out texts, {check['in_both']} also occur in the training text, ignoring case "
        "and spaces.</p>"
    )
    return text + make_table(["component", "training documents", "held out", "MB"], rows)


def _gaps(sheet: dict[str, Any]) -> str:
    items = "".join(f"<li>{escape(gap)}</li>" for gap in sheet["gaps"])
    return f"<ul>{items}</ul>" if items else "<p>The recipe lists no gaps (field corpus.gaps).</p>"


def _licenses(sheet: dict[str, Any]) -> str:
    rows = [
        [name, part["license"], part["consent"] or "not stated", part["origin"] or "not stated"]
        for name, part in sheet["components"].items()
    ]
    return make_table(["component", "license", "consent", "origin"], rows, left=True)


def _answers(sheet: dict[str, Any]) -> str:
    """Return the questions of Datasheets for Datasets with their answers; missing answers are marked."""
    parts = []
    unanswered = 0
    for chapter, rows in sheet["answers"].items():
        items = []
        for question, answer in rows:
            unanswered += not answer
            text = (
                escape(answer)
                if answer
                else "<em>Not answered; add the answer to the section [datasheet] of the recipe.</em>"
            )
            items.append(f"<dt>{escape(question)}</dt><dd>{text}</dd>")
        parts.append(f"<h3>{escape(chapter)}</h3><dl>{''.join(items)}</dl>")
    count = sum(len(rows) for rows in sheet["answers"].values())
    return f"<p>Of {count} questions (Gebru et al.), {count - unanswered} are answered.</p>{''.join(parts)}"


def _samples(sheet: dict[str, Any]) -> str:
    return "".join(
        f"<details><summary>{escape(reason)}</summary>"
        + "".join(f"<p class=dim>{escape(sample['id'])}</p><pre>{escape(sample['text'])}</pre>" for sample in samples)
        + "</details>"
        for reason, samples in sheet["samples"].items()
    )


def _outputs(sheet: dict[str, Any]) -> str:
    inputs = sheet["inputs"]
    text = (
        f"<p>{inputs['files']:,} source files; digest of the digests of all source files: "
        f"<code>{inputs['digest']}</code>. The digest of each file is in manifest.json (xxh3, 128 bits).</p>"
    )
    rows = [[name, f"{output['size']:,}", output["digest"]] for name, output in sheet["outputs"].items()]
    return f"{text}<details><summary>{len(rows)} output files</summary>{make_table(['file', 'bytes', 'digest'], rows)}</details>"
