# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a corpus is, for who would use it: composition, what was removed with samples, duplicates, gaps, licences, digests.

The questions (datasheet_questions.py) are those of Datasheets for Datasets (Gebru et al.), the table is that of The
Pile's paper, Table 1.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from mesh_transformer.config import config_to_dict
from mesh_transformer.corpus.build import Corpus, Records
from mesh_transformer.corpus.datasheet.page import make_page
from mesh_transformer.corpus.datasheet.questions import answer_questions
from mesh_transformer.corpus.parts import read_documents
from mesh_transformer.storage.atomic_files import replace_file

SAMPLES = 3  # of what each step removed for each reason
SAMPLE_CHARACTERS = 400


def write_datasheet(corpus: Corpus, out: Path) -> dict[str, Any]:
    """OUT/datasheet.json and a self-contained OUT/datasheet.html; what is in the first."""
    sheet = describe_corpus(corpus, out)
    replace_file(out / "datasheet.json", json.dumps(sheet, indent=1, ensure_ascii=False).encode())
    replace_file(out / "datasheet.html", make_page(sheet).encode())
    return sheet


def describe_corpus(corpus: Corpus, out: Path) -> dict[str, Any]:
    """All numbers, texts and samples of the datasheet."""
    recipe = corpus.recipe
    names = [name for name in recipe.components if name not in corpus.missing]
    effective = sum(record["train"]["copied_bytes"] for record in corpus.tokenized)
    inputs = corpus.manifest["inputs"]
    sheet = {
        "name": recipe.corpus.name,
        "about": recipe.corpus.about,
        "gaps": recipe.corpus.gaps,
        "digest": corpus.manifest["digest"],
        "tokenizer": recipe.tokens.tokenizer,
        "components": {name: _describe_component(corpus, name, effective) for name in names},
        "missing": {name: recipe.components[name].origin for name in corpus.missing},
        "duplicates": {
            "near": recipe.duplicates.near,
            "bands_and_rows": recipe.duplicates.bands_and_rows,
            "matrix": corpus.matrix,
        },
        "proof": corpus.split_check,
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


def _describe_component(corpus: Corpus, name: str, effective: int) -> dict[str, Any]:
    read = [record for record in corpus.filtered if record["component"] == name]
    kept = [record for record in corpus.selected if record["component"] == name]
    tokens = [record for record in corpus.tokenized if record["component"] == name]
    config = corpus.recipe.components[name]
    raw_bytes, raw_documents = (_sum(read, "raw", field) for field in ("bytes", "documents"))
    train_bytes, train_documents = (_sum(tokens, "train", field) for field in ("bytes", "documents"))
    copied = _sum(tokens, "train", "copied_bytes")
    counted = Counter[str]()
    for record in kept:
        counted.update(record["count"])
    bad, examples, decoded, languages = Counter[str](), {}, Counter[str](), Counter[str]()
    for record in read:
        bad.update(record["bad"])
        decoded.update(record["decoded"])
        languages.update(record["languages"])
        for kind, found in record["bad_examples"].items():
            examples[kind] = (examples.get(kind, []) + found)[:SAMPLES]
    lengths = Counter[int]()
    for record in kept:
        lengths.update({int(bits): count for bits, count in record["lengths"]["train"].items()})
    return {
        "source_bytes": sum(record["source_bytes"] for record in read),
        "source_files": sum(len(record["source_digests"]) for record in read),
        "raw_bytes": raw_bytes,
        "raw_documents": raw_documents,
        "train_bytes": train_bytes,
        "train_documents": train_documents,
        "heldout_bytes": _sum(kept, "sides", "heldout", "bytes"),
        "heldout_documents": _sum(kept, "sides", "heldout", "documents"),
        "epochs": corpus.epochs[name],
        "effective_bytes": copied,
        "weight": copied / effective if effective else 0.0,
        "mean_document_bytes": train_bytes / max(train_documents, 1),
        "tokens": _sum(tokens, "train", "tokens"),
        "tokens_per_byte": _sum(tokens, "train", "tokens") / max(train_bytes, 1),
        "left_out": dict(bad),
        "left_out_examples": examples,
        "decoded": dict(decoded),
        "steps": _sum_steps(read),
        "exact_duplicates": counted["exact"],
        "near_duplicates": counted["near"],
        "duplicate_bytes": counted["duplicate_bytes"],
        "lines_cut": counted["lines"],
        "line_bytes_cut": counted["line_bytes"],
        "documents_emptied": counted["emptied"],
        "languages": dict(languages.most_common()),
        "lengths": {str(bits): lengths[bits] for bits in sorted(lengths)},
        "kind": config.kind,
        "licence": config.license,
        "consent": config.consent,
        "origin": config.origin,
        "published": config_to_dict(config.published) if config.published else None,
    }


def _sum(records: Records, *path: str) -> int:
    total = 0
    for record in records:
        value: Any = record
        for key in path:
            value = value[key]
        total += value
    return total


def _sum_steps(read: Records) -> list[dict[str, Any]]:
    """Every step of a component over all its parts."""
    totals: dict[str, dict[str, Any]] = {}
    for record in read:
        for step in record["steps"]:
            total = totals.setdefault(step["name"], {"name": step["name"], "dropped": Counter()})
            total["dropped"].update(step["dropped"])
            for field in ("documents_in", "bytes_in", "documents_out", "bytes_out", "seconds"):
                total[field] = total.get(field, 0) + step[field]
    return [total | {"dropped": dict(total["dropped"].most_common())} for total in totals.values()]


def _collect_samples(out: Path) -> dict[str, list[dict[str, str]]]:
    """The first few of what was dropped, by step and reason; of duplicates, not which document stays."""
    samples: dict[str, list[dict[str, str]]] = {}
    for path in sorted((out / "work").glob("*/dropped/*.jsonl.zst")):
        for record in read_documents(path):
            why = record["meta"]
            found = samples.setdefault(f"{why['step']}: {why['reason']}", [])
            if len(found) < SAMPLES:
                found.append({"id": record["id"], "text": record["text"][:SAMPLE_CHARACTERS]})
    return dict(sorted(samples.items()))
