# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""How well duplicates are found: exact and near ones planted among documents of random words, precision and recall.

Words are drawn as often as Zipf's law has them, so documents have next to nothing in common but what is planted. A near
duplicate shares its first words with its original, as many as give the stated Jaccard similarity of 5-grams.

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

WORDS, N_GRAM = 150, 5
LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
VOCABULARY = 50_000
_LETTERS = str.maketrans("0123456789ABCDEFGHIJKLMNOP", "abcdefghijklmnopqrstuvwxyz")


def main(arguments: list[str]) -> int:
    """Plant, build, count."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--documents", type=int, default=50_000, help="originals; default: %(default)s")
    parser.add_argument("--planted", type=int, default=1000, help="of exact, and of near ones; default: %(default)s")
    parser.add_argument("--preset", choices=["pile", "fineweb"], action="append", help="default: both")
    parser.add_argument("--workers", type=int, default=2, help="processes; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args(arguments)
    results = {preset: measure(preset, options) for preset in options.preset or ["pile", "fineweb"]}
    if options.json:
        print(json.dumps(results))
        return 0
    for preset, result in results.items():
        print(f"{preset}: {result['seconds']:.1f} s, precision {result['precision']:.4f}")
        print(f"{'planted':>10} {'count':>6} {'similarity':>10} {'found':>7} {'theory':>7}")
        for row in result["rows"]:
            shown = (row["planted"], row["count"], row["similarity"], row["recall"], row["theory"])
            print("{:>10} {:>6} {:>10.3f} {:>7.3f} {:>7.3f}".format(*shown))
    return 0


def plant(options: argparse.Namespace) -> Iterator[tuple[str, str, float]]:
    """Name, text and true similarity of all documents: originals, then exact duplicates, then near ones."""
    draw = np.random.default_rng(1)
    chances = 1 / np.arange(1, VOCABULARY + 1)
    words = draw.choice(VOCABULARY, size=(options.documents + options.planted, WORDS), p=chances / chances.sum())
    for number in range(options.documents):
        yield "original", write(words[number]), 0.0
    for number in range(options.planted):
        yield "exact", write(words[number]).title(), 1.0
    for number in range(options.planted):
        level = LEVELS[number % len(LEVELS)]
        grams = WORDS - N_GRAM + 1  # of each; J = shared / (2 grams - shared)
        shared = round(2 * grams * level / (1 + level))
        other = words[options.documents + number]
        text = np.concatenate([words[options.planted + number][: shared + N_GRAM - 1], other])[:WORDS]
        yield f"near {level}", write(text), shared / (2 * grams - shared)


def write(words: np.ndarray) -> str:
    """A text of words that are numbers in letters: digits are all one to DataTrove's shingles."""
    return " ".join(np.base_repr(word, 26).translate(_LETTERS) for word in words)


def measure(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """Precision over all that was removed, recall of each kind that was planted beside what the bands should find."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kinds = []
        with open(root / "all.jsonl", "w", encoding="utf-8") as file:
            for kind, text, similarity in plant(options):
                kinds.append((kind, similarity))
                file.write(json.dumps({"text": text}) + "\n")
        table = {
            "corpus": {"name": "planted"},
            "components": {"all": {"kind": "jsonl", "paths": [str(root / "all.jsonl")], "licence": "none"}},
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
