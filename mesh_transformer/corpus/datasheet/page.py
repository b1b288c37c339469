# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The datasheet as one HTML page without a request to anywhere: tables, and pictures as inline SVG."""

import json
from html import escape
from typing import Any

from mesh_transformer.corpus.datasheet.html import MB, STYLE, format_count, format_size, make_section, make_table
from mesh_transformer.corpus.datasheet.survey import show_profanity, show_pronouns, show_topics


def make_page(sheet: dict[str, Any]) -> str:
    """The page of what datasheet.describe_corpus gives."""
    sections = [
        f"<h1>{escape(sheet['name'])}</h1><p>{escape(sheet['about'])}</p>",
        f"<p class=dim>digest <code>{sheet['digest']}</code></p>",
        make_section("Composition", _composition(sheet)),
        make_section("What each step took", _removals(sheet)),
        make_section("Duplicates", _duplicates(sheet)),
        make_section("Length of documents", _lengths(sheet)),
        make_section("Languages", _languages(sheet)),
        make_section("Topics", show_topics(sheet)),
        make_section("Profanity", show_profanity(sheet)),
        make_section("He and she", show_pronouns(sheet)),
        make_section("What could not be read", _left_out(sheet)),
        make_section("Training and held-out text", _split(sheet)),
        make_section("Gaps and biases", _gaps(sheet)),
        make_section("Licences, consent, and where it is from", _licences(sheet)),
        make_section("Questions and answers", _answers(sheet)),
        make_section("Samples of what was removed", _samples(sheet)),
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
        "kept MB",
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
            name, f"{part['raw_bytes'] / MB:.1f}", f"{part['train_bytes'] / MB:.1f}", f"{part['weight']:.2%}",
            f"{part['epochs']:.2f}", f"{part['effective_bytes'] / MB:.1f}", f"{part['train_documents']:,}",
            format_size(part["mean_document_bytes"]), f"{part['tokens_per_byte']:.4f}",
        ]  # fmt: skip
        if published:
            found = part["published"] or {}
            row += [str(found.get(key, "")) for key in ("raw_gib", "weight", "epochs")]
        rows.append(row)
    kept, documents = (sum(part[key] for part in parts.values()) for key in ("train_bytes", "train_documents"))
    total = [
        "all", f"{sum(part['raw_bytes'] for part in parts.values()) / MB:.1f}", f"{kept / MB:.1f}", "100.00%", "",
        f"{sum(part['effective_bytes'] for part in parts.values()) / MB:.1f}", f"{documents:,}",
        format_size(kept / max(documents, 1)),
        f"{sum(part['tokens'] for part in parts.values()) / max(kept, 1):.4f}", *[""] * 3 * published,
    ]  # fmt: skip
    note = (
        f"<p>Raw is the text of all documents that could be read; kept is what steps, duplicates and lines left of it for "
        f"training; effective is kept times epochs, as the mixture has it. Tokens are those of {escape(sheet['tokenizer'])}.</p>"
    )
    gone = "".join(f"<li>{escape(name)}: {escape(where)}</li>" for name, where in sheet["missing"].items())
    return (
        note
        + make_table(head, rows, total)
        + (f"<p>Declared, but without any file here:</p><ul>{gone}</ul>" if gone else "")
    )


def _removals(sheet: dict[str, Any]) -> str:
    """A row for every step that took or changed something."""
    rows = []
    for name, part in sheet["components"].items():
        for step in part["steps"]:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in list(step["dropped"].items())[:4])
            less = step["bytes_in"] - step["bytes_out"]
            if reasons or abs(less) >= 5000:
                sizes = [f"{step['documents_in']:,}", f"{step['documents_out']:,}", f"{-less / MB:+.2f}"]
                rows.append([name, step["name"], *sizes, reasons or "no document; texts were changed"])
        gone = part["exact_duplicates"] + part["near_duplicates"]
        if gone:
            entered = part["train_documents"] + part["heldout_documents"] + part["documents_emptied"] + gone
            reasons = f"exact duplicate {part['exact_duplicates']:,}, near duplicate {part['near_duplicates']:,}"
            less = f"{-part['duplicate_bytes'] / MB:+.2f}"
            rows.append([name, "duplicates", f"{entered:,}", f"{entered - gone:,}", less, reasons])
        if part["lines_cut"]:
            cut = f"{-part['line_bytes_cut'] / MB:+.2f}"
            rows.append([name, "lines", "", "", cut, f"{part['lines_cut']:,} recurring lines"])
    note = "<p>Steps of a component in their order, those that changed nothing left out.</p>"
    return note + make_table(["component", "step", "documents in", "out", "MB", "dropped because"], rows, left=True)


def _duplicates(sheet: dict[str, Any]) -> str:
    found = sheet["duplicates"]
    bands, rows = found["bands_and_rows"]
    text = "<p>Rows: components that lost documents. Columns: the component of the document that stayed for them.</p>"
    if bands:
        points = ", ".join(f"{s:.1f}: {1 - (1 - s**rows) ** bands:.3f}" for s in (0.3, 0.5, 0.7, 0.8, 0.9))
        text += (
            f"<p class=dim>Near: MinHash, {bands} bands of {rows} hashes over word n-grams ({escape(found['near'])}). Chance "
            f"that a pair of this Jaccard similarity is found: {points}.</p>"
        )
    names = list(sheet["components"])
    return text + "".join(
        f"<h3>{kind}</h3>{_matrix(names, {(a, b): n for a, b, n in found['matrix'][kind]})}"
        for kind in ("exact", "near")
    )


def _matrix(names: list[str], counts: dict[tuple[str, str], int]) -> str:
    """A square for every pair, darker for more documents."""
    side, left, top = 46, 130, 96
    most = max(counts.values(), default=0)
    body = [
        f'<text x="{left - 6}" y="{top + i * side + 28}" text-anchor="end">{escape(n)}</text>'
        for i, n in enumerate(names)
    ]
    body += [
        f'<text transform="translate({left + i * side + 26} {top - 6}) rotate(-45)">{escape(name)}</text>'
        for i, name in enumerate(names)
    ]
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            count = counts.get((a, b), 0)
            opacity = 0.0 if not count else 0.15 + 0.85 * (count / most) ** 0.4
            x, y = left + j * side, top + i * side
            tip = f"<title>{escape(a)} to {escape(b)}: {count:,}</title>"
            body.append(
                f'<rect class="cell" x="{x}" y="{y}" width="{side}" height="{side}" fill-opacity="{opacity:.2f}">{tip}</rect>'
            )
            if count:
                css = ' class="on"' if opacity > 0.6 else ""
                body.append(
                    f'<text{css} x="{x + side / 2}" y="{y + 28}" text-anchor="middle">{format_count(count)}</text>'
                )
    width, height = left + side * len(names) + 90, top + side * len(names) + 8
    picture = f'<svg role="img" aria-label="duplicates" width="{width}" height="{height}">{"".join(body)}</svg>'
    return f"<div class=scroll>{picture}</div>"


def _lengths(sheet: dict[str, Any]) -> str:
    """A small histogram for every component, over powers of two of bytes."""
    parts = sheet["components"]
    bits = [int(bit) for part in parts.values() for bit in part["lengths"]]
    low, high = min(bits, default=0), max(bits, default=1)
    pictures = []
    for name, part in parts.items():
        most = max(part["lengths"].values(), default=1)
        bars = []
        for bit in range(low, high + 1):
            count = part["lengths"].get(str(bit), 0)
            height = 70 * count / most
            tip = f"<title>under {format_size(2**bit)}: {count:,} documents</title>"
            x, y = 4 + (bit - low) * 12, 96 - height
            bars.append(f'<rect class="bar" x="{x}" y="{y:.1f}" width="10" height="{height:.1f}">{tip}</rect>')
        ticks = "".join(
            f'<text class="faint" x="{4 + (bit - low) * 12}" y="110">{format_size(2**bit)}</text>'
            for bit in range(low, high + 1) if bit % 5 == 0
        )  # fmt: skip
        width = 40 + (high - low + 1) * 12
        inside = f'<text x="4" y="14">{escape(name)}</text>{"".join(bars)}{ticks}'
        pictures.append(f'<svg role="img" width="{width}" height="118">{inside}</svg>')
    return f"<p>Bytes of a training document; every bar is a power of two.</p><div>{''.join(pictures)}</div>"


def _languages(sheet: dict[str, Any]) -> str:
    """Shares of bytes by language, a bar for each component."""
    if not any(part["languages"] for part in sheet["components"].values()):
        return "<p>Not measured: the recipe has no step of kind language.</p>"
    rows = []
    for name, part in sheet["components"].items():
        total = sum(part["languages"].values()) or 1
        shares = [(language, size / total) for language, size in part["languages"].items()]
        x, bar = 0.0, []
        for i, (language, share) in enumerate(shares):
            tip = f"<title>{escape(language)} {share:.1%}</title>"
            opacity = max(1 - 0.18 * i, 0.12)
            place = f'x="{x:.1f}" y="3" width="{320 * share:.1f}" height="14" fill-opacity="{opacity:.2f}"'
            bar.append(f'<rect class="bar" {place}>{tip}</rect>')
            x += 320 * share
        words = ", ".join(f"{escape(language)} {share:.1%}" for language, share in shares[:5])
        picture = f'<svg width="320" height="20">{"".join(bar)}</svg>'
        rows.append(f"<tr><td>{escape(name)}</td><td>{picture}</td><td class=left>{words}</td></tr>")
    note = "<p>By bytes, as py3langid takes them; code is in no language, and taken for one.</p>"
    return f"{note}<div class=scroll><table>{''.join(rows)}</table></div>"


def _left_out(sheet: dict[str, Any]) -> str:
    rows = [
        [name, kind, f"{count:,}", (part["left_out_examples"].get(kind) or [""])[0]]
        for name, part in sheet["components"].items()
        for kind, count in part["left_out"].items()
    ]
    rows += [
        [name, f"was {encoding}", f"{count:,}", "decoded, not left out"]
        for name, part in sheet["components"].items()
        for encoding, count in part["decoded"].items()
    ]
    return make_table(["component", "damage", "places", "first"], rows, left=True) if rows else "<p>Nothing.</p>"


def _split(sheet: dict[str, Any]) -> str:
    rows = [
        [name, f"{part['train_documents']:,}", f"{part['heldout_documents']:,}", f"{part['heldout_bytes'] / MB:.2f}"]
        for name, part in sheet["components"].items()
    ]
    proof = sheet["proof"]
    text = (
        "<p>A document is held out by a hash of its name, before anything else is done. Training documents that equal a "
        "held-out one, or share a MinHash band with one, are removed. Checked on the final texts: of "
        f"{proof['heldout_texts']:,} held-out texts, {proof['in_both']} are also among those for training, case and spaces "
        "apart.</p>"
    )
    return text + make_table(["component", "training documents", "held out", "MB"], rows)


def _gaps(sheet: dict[str, Any]) -> str:
    items = "".join(f"<li>{escape(gap)}</li>" for gap in sheet["gaps"])
    return f"<ul>{items}</ul>" if items else "<p>The recipe names none (corpus.gaps): that is a gap of the recipe.</p>"


def _licences(sheet: dict[str, Any]) -> str:
    rows = [
        [name, part["licence"], part["consent"] or "not stated", part["origin"] or "not stated"]
        for name, part in sheet["components"].items()
    ]
    return make_table(["component", "licence", "consent", "origin"], rows, left=True)


def _answers(sheet: dict[str, Any]) -> str:
    """The questions of Datasheets for Datasets, those without an answer marked."""
    parts, open_ = [], 0
    for chapter, rows in sheet["answers"].items():
        items = []
        for question, answer in rows:
            open_ += not answer
            said = escape(answer) if answer else "<em>The recipe does not say (section datasheet).</em>"
            items.append(f"<dt>{escape(question)}</dt><dd>{said}</dd>")
        parts.append(f"<h3>{escape(chapter)}</h3><dl>{''.join(items)}</dl>")
    count = sum(len(rows) for rows in sheet["answers"].values())
    return f"<p>Of {count} questions (Gebru et al.), {count - open_} are answered.</p>{''.join(parts)}"


def _samples(sheet: dict[str, Any]) -> str:
    return "".join(
        f"<details><summary>{escape(reason)}</summary>"
        + "".join(f"<p class=dim>{escape(one['id'])}</p><pre>{escape(one['text'])}</pre>" for one in found)
        + "</details>"
        for reason, found in sheet["samples"].items()
    )


def _outputs(sheet: dict[str, Any]) -> str:
    inputs = sheet["inputs"]
    text = (
        f"<p>{inputs['files']:,} source files; digest of their digests <code>{inputs['digest']}</code>. Every one is in "
        "manifest.json (xxh3, 128 bits).</p>"
    )
    rows = [[name, f"{found['size']:,}", found["digest"]] for name, found in sheet["outputs"].items()]
    return f"{text}<details><summary>{len(rows)} output files</summary>{make_table(['file', 'bytes', 'digest'], rows)}</details>"
