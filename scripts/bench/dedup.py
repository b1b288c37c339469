# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure precision and recall of deduplication on duplicates planted among documents of random words.

Words follow Zipf's law, so documents share almost nothing except what is planted. A near duplicate shares as many of
its first words with its original as the stated Jaccard similarity of 5-grams requires.

examples:
  python scripts/bench/dedup.py
      1,000 exact and 1,000 near duplicates among 50,000 documents, with both presets
  python scripts/bench/dedup.py --documents 5000 --planted 500 --preset pile --json
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import check_table
from mesh_transformer.corpus.build import build_corpus
from mesh_transformer.corpus.parts import read_documents
from mesh_transformer.corpus.recipe import Recipe
from mesh_transformer.corpus.stages import Executor

WORDS, N_GRAM = 150, 5  # words of a document, and of a shingle
LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
VOCABULARY = 50_000
_LETTERS = str.maketrans("0123456789ABCDEFGHIJKLMNOP", "abcdefghijklmnopqrstuvwxyz")


def main(arguments: list[str]) -> int:
    """Plant duplicates, build a corpus, and print precision and recall."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--documents", type=int, default=50_000, help="number of originals; default: %(default)s")
    parser.add_argument(
        "--planted",
        type=int,
        default=1000,
        help="number of exact duplicates, and of near duplicates; default: %(default)s",
    )
    parser.add_argument(
        "--preset", choices=["pile", "fineweb"], action="append", help="near-duplicate preset; default: both"
    )
    parser.add_argument("--workers", type=int, default=2, help="worker processes; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    options = parser.parse_args(arguments)
    results = {preset: measure(preset, options) for preset in options.preset or ["pile", "fineweb"]}
    if options.json:
        print(json.dumps(results))
        return 0
    for preset, result in results.items():
        print(f"{preset}: {result['seconds']:.1f} s, precision {result['precision']:.4f}")
        print(f"{'planted':>10} {'count':>6} {'similarity':>10} {'found':>7} {'theory':>7}")
        for level in result["rows"]:
            values = (level["planted"], level["count"], level["similarity"], level["recall"], level["theory"])
            print("{:>10} {:>6} {:>10.3f} {:>7.3f} {:>7.3f}".format(*values))
    return 0


def plant(options: argparse.Namespace) -> Iterator[tuple[str, str, float]]:
    """Yield name, text and true similarity of all documents: originals, then exact and near duplicates."""
    rng = np.random.default_rng(1)
    weights = 1 / np.arange(1, VOCABULARY + 1)
    words = rng.choice(VOCABULARY, size=(options.documents + options.planted, WORDS), p=weights / weights.sum())
    for number in range(options.documents):
        yield "original", to_text(words[number]), 0.0
    for number in range(options.planted):
        yield "exact", to_text(words[number]).title(), 1.0
    for number in range(options.planted):
        level = LEVELS[number % len(LEVELS)]
        grams = WORDS - N_GRAM + 1  # of each document; Jaccard similarity = shared / (2 grams - shared)
        shared = round(2 * grams * level / (1 + level))
        other = words[options.documents + number]
        text = np.concatenate([words[options.planted + number][: shared + N_GRAM - 1], other])[:WORDS]
        yield f"near {level}", to_text(text), shared / (2 * grams - shared)


def to_text(words: np.ndarray) -> str:
    """Return word numbers as words of letters, because DataTrove's shingles treat all digits as equal."""
    return " ".join(np.base_repr(word, 26).translate(_LETTERS) for word in words)


def measure(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the precision of all removals, and the measured and the predicted recall at each planted similarity."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kinds = []
        with open(root / "all.jsonl", "w", encoding="utf-8") as file:
            for kind, text, similarity in plant(options):
                kinds.append((kind, similarity))
                file.write(json.dumps({"text": text}) + "\n")
        table = {
            "corpus": {"name": "planted"},
            "components": {"all": {"kind": "jsonl", "paths": [str(root / "all.jsonl")], "license": "none"}},
            "heldout": {"one_in": 0},
            "duplicates": {"near": preset},
        }
        recipe = check_table(Recipe, table, where="planted")
        start = time.perf_counter()
        build_corpus(recipe, root / "out", Executor(options.workers))
        seconds = time.perf_counter() - start
        paths = (root / "out" / "work").glob("select-*/dropped/*.jsonl.zst")
        removed = {int(record["id"].rpartition(":")[2]) - 1 for path in paths for record in read_documents(path)}
    bands, rows = recipe.duplicates.bands_and_rows
    table_rows = []
    for kind in dict.fromkeys(kind for kind, _ in kinds if kind != "original"):
        numbers = [number for number, (own, _) in enumerate(kinds) if own == kind]
        similarity = kinds[numbers[0]][1]
        table_rows.append({
            "planted": kind,
            "count": len(numbers),
            "similarity": similarity,
            "recall": sum(number in removed for number in numbers) / len(numbers),
            "theory": 1 - (1 - similarity**rows) ** bands,
        })  # fmt: skip
    right = sum(kinds[number][0] != "original" for number in removed)
    return {"seconds": seconds, "removed": len(removed), "precision": right / max(len(removed), 1), "rows": table_rows}


if __name__ == "__main__":
    sys.exit(run_command(main))
