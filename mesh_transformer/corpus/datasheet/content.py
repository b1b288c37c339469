# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Content of a datasheet: composition, removals with samples, duplicates, gaps, licenses and digests of a corpus.

The questions (questions.py) are from Datasheets for Datasets (Gebru et al.); the composition table follows Table 1
of The Pile's paper.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from mesh_transformer.config import config_to_dict
from mesh_transformer.config.renamed import translate_stored
from mesh_transformer.corpus.build import Corpus, Records
from mesh_transformer.corpus.datasheet.page import make_page
from mesh_transformer.corpus.datasheet.questions import answer_questions
from mesh_transformer.corpus.parts import read_dropped
from mesh_transformer.corpus.renamed import DATASHEET
from mesh_transformer.corpus.stages import CorpusError
from mesh_transformer.storage.atomic_files import replace_file

SAMPLES = 3  # dropped documents shown per filter and reason
SAMPLE_CHARACTERS = 400  # shown characters of a dropped document


def write_datasheet(corpus: Corpus, out: Path) -> dict[str, Any]:
    """Write OUT/datasheet.json and a self-contained OUT/datasheet.html; return the content of datasheet.json."""
    sheet = describe_corpus(corpus, out)
    replace_file(out / "datasheet.json", json.dumps(sheet, indent=1, ensure_ascii=False).encode())
    replace_file(out / "datasheet.html", make_page(sheet).encode())
    return sheet


def read_datasheet(out: Path) -> dict[str, Any]:
    """Return the datasheet of a complete corpus that this or an earlier version built.

    Raises CorpusError if the corpus is incomplete.
    """
    if not (out / "manifest.json").is_file() or not (out / "datasheet.json").is_file():
        raise CorpusError(
            f"{out}: not a complete corpus (no manifest.json or datasheet.json); build it with scripts/build_corpus.py"
        )
    return translate_stored(json.loads((out / "datasheet.json").read_text(encoding="utf-8")), DATASHEET)


def describe_corpus(corpus: Corpus, out: Path) -> dict[str, Any]:
    """Return all figures, texts and samples of the datasheet."""
    recipe = corpus.recipe
    names = [name for name in recipe.components if name not in corpus.missing]
    effective_bytes = sum(record["train"]["copied_bytes"] for record in corpus.tokenized)
    inputs = corpus.manifest["inputs"]
    sheet = {
        "name": recipe.corpus.name,
        "about": recipe.corpus.about,
        "gaps": recipe.corpus.gaps,
        "digest": corpus.manifest["digest"],
        "tokenizer": recipe.tokens.tokenizer,
        "components": {name: _describe_component(corpus, name, effective_bytes) for name in names},
        "missing": {name: recipe.components[name].origin for name in corpus.missing},
        "duplicates": {
            "near": recipe.duplicates.near,
            "bands_and_rows": recipe.duplicates.bands_and_rows,
            "matrix": corpus.matrix,
        },
        "split_check": corpus.split_check,
        "survey": corpus.survey,
        "samples": _collect_samples(out),
        "inputs": {
            "files": len(inputs),
            "digest": hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
        },
        "outputs": corpus.manifest["outputs"],
        "recipe": config_to_dict(recipe),
    }
    return sheet | {"answers": answer_questions(sheet, recipe)}


def _describe_component(corpus: Corpus, name: str, effective_bytes: int) -> dict[str, Any]:
    filtered = [record for record in corpus.filtered if record["component"] == name]
    selected = [record for record in corpus.selected if record["component"] == name]
    tokens = [record for record in corpus.tokenized if record["component"] == name]
    config = corpus.recipe.components[name]
    train_bytes = _sum(tokens, "train", "bytes")
    train_documents = _sum(tokens, "train", "documents")
    copied = _sum(tokens, "train", "copied_bytes")
    counts = Counter[str]()
    for record in selected:
        counts.update(record["counts"])
    bad = Counter[str]()
    examples: dict[str, list[str]] = {}
    decoded = Counter[str]()
    languages = Counter[str]()
    for record in filtered:
        bad.update(record["bad"])
        decoded.update(record["decoded"])
        languages.update(record["languages"])
        for kind, messages in record["bad_examples"].items():
            examples[kind] = (examples.get(kind, []) + messages)[:SAMPLES]
    lengths = Counter[int]()
    for record in selected:
        lengths.update({int(bits): count for bits, count in record["lengths"]["train"].items()})
    return {
        "source_bytes": sum(record["source_bytes"] for record in filtered),
        "source_files": sum(len(record["source_digests"]) for record in filtered),
        "raw_bytes": _sum(filtered, "raw", "bytes"),
        "raw_documents": _sum(filtered, "raw", "documents"),
        "train_bytes": train_bytes,
        "train_documents": train_documents,
        "heldout_bytes": _sum(selected, "splits", "heldout", "bytes"),
        "heldout_documents": _sum(selected, "splits", "heldout", "documents"),
        "epochs": corpus.epochs[name],
        "effective_bytes": copied,
        "weight": copied / effective_bytes if effective_bytes else 0.0,
        "mean_document_bytes": train_bytes / max(train_documents, 1),
        "tokens": _sum(tokens, "train", "tokens"),
        "tokens_per_byte": _sum(tokens, "train", "tokens") / max(train_bytes, 1),
        "skipped": dict(bad),
        "skipped_examples": examples,
        "decoded": dict(decoded),
        "filters": _sum_filters(filtered),
        "exact_duplicates": counts["exact"],
        "near_duplicates": counts["near"],
        "duplicate_bytes": counts["duplicate_bytes"],
        "lines_cut": counts["lines"],
        "line_bytes_cut": counts["line_bytes"],
        "documents_emptied": counts["emptied"],
        "languages": dict(languages.most_common()),
        "lengths": {str(bits): lengths[bits] for bits in sorted(lengths)},
        "kind": config.kind,
        "license": config.license,
        "consent": config.consent,
        "origin": config.origin,
        "published": config_to_dict(config.published) if config.published else None,
    }


def _sum(records: Records, *path: str) -> int:
    """Return the sum of a nested value of all records."""
    total = 0
    for record in records:
        value: Any = record
        for key in path:
            value = value[key]
        total += value
    return total


def _sum_filters(filtered: Records) -> list[dict[str, Any]]:
    """Return the counts of every filter of a component, summed over its parts."""
    totals: dict[str, dict[str, Any]] = {}
    for record in filtered:
        for counts in record["filters"]:
            total = totals.setdefault(counts["name"], {"name": counts["name"], "dropped": Counter()})
            total["dropped"].update(counts["dropped"])
            for field in ("documents_in", "bytes_in", "documents_out", "bytes_out", "seconds"):
                total[field] = total.get(field, 0) + counts[field]
    return [total | {"dropped": dict(total["dropped"].most_common())} for total in totals.values()]


def _collect_samples(out: Path) -> dict[str, list[dict[str, str]]]:
    """Return the first SAMPLES dropped documents of each filter and reason."""
    samples: dict[str, list[dict[str, str]]] = {}
    for record in read_dropped(out):
        reason_samples = samples.setdefault(f"{record['meta']['filter']}: {record['meta']['reason']}", [])
        if len(reason_samples) < SAMPLES:
            reason_samples.append({"id": record["id"], "text": record["text"][:SAMPLE_CHARACTERS]})
    return dict(sorted(samples.items()))
