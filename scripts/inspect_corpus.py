# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Inspect a corpus built by build_corpus.py: random documents, dropped documents with reasons, near duplicates.

examples:
  python scripts/inspect_corpus.py corpora/machine --n 3 --component licenses
      three training documents, the same for the same --seed
  python scripts/inspect_corpus.py corpora/machine --dropped gopher
      dropped documents whose filter or reason contains this word
  python scripts/inspect_corpus.py corpora/machine --duplicates-of /usr/share/common-licenses/Apache-2.0
      documents that share a MinHash band with the document of this id, also removed ones, with their similarity
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.corpus.parts import read_documents, read_dropped
from mesh_transformer.corpus.recipe import load_stored_recipe
from mesh_transformer.corpus.stage_dedup import BoundedSignature, minhash_config
from mesh_transformer.corpus.stages import CorpusError
from mesh_transformer.corpus.word_tokenizer import WORDS

Record = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Print the requested documents."""
    options = parse(arguments)
    if not (options.corpus / "manifest.json").is_file():
        raise CorpusError(
            f"{options.corpus}: no manifest.json: not a corpus, or incomplete; build it with scripts/build_corpus.py"
        )
    if options.duplicates_of:
        print_duplicates(options)
        return 0
    if options.dropped is not None:
        records = sample(find_dropped(options), options)
    else:
        folder = options.corpus / "documents" / ("heldout" if options.heldout else "train")
        paths = sorted(folder.glob(f"{options.component or '*'}-*.jsonl.zst"))
        records = sample((record for path in paths for record in read_documents(path)), options)
    if not records:
        requested = f"--component {options.component}" if options.component else "any component"
        requested += f", --dropped {options.dropped}".rstrip() if options.dropped is not None else ""
        raise CorpusError(
            f"{options.corpus}: no document matches {requested}; {options.corpus}/datasheet.html lists the components, "
            "filters and reasons"
        )
    for record in records:
        print_document(record, options.characters)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("corpus", type=Path, metavar="CORPUS", help="folder of a corpus")
    parser.add_argument("--n", type=int, default=5, help="number of documents; default: %(default)s")
    parser.add_argument("--component", default="", help="print only documents of this component")
    parser.add_argument("--heldout", action="store_true", help="print held-out instead of training documents")
    parser.add_argument(
        "--dropped",
        metavar="WORD",
        nargs="?",
        const="",
        help="print dropped documents with WORD in the filter or reason",
    )
    parser.add_argument(
        "--duplicates-of", metavar="ID", default="", help="print near duplicates of the document with this id"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample; default: %(default)s")
    parser.add_argument(
        "--characters", type=int, default=1000, help="printed characters of each document; default: %(default)s"
    )
    return parser.parse_args(arguments)


def sample(records: Iterator[Record], options: argparse.Namespace) -> list[Record]:
    """Return a uniform sample in one pass (reservoir sampling)."""
    rng = random.Random(options.seed)
    sampled: list[Record] = []
    for number, record in enumerate(records):
        if len(sampled) < options.n:
            sampled.append(record)
        elif (index := rng.randrange(number + 1)) < options.n:
            sampled[index] = record
    return sampled


def find_dropped(options: argparse.Namespace) -> Iterator[Record]:
    """Yield dropped documents whose filter or reason contains the word of --dropped."""
    for record in read_dropped(options.corpus):
        meta = record["meta"]
        matches = options.dropped in f"{meta['filter']} {meta['reason']}"
        if matches and options.component in ("", meta["component"]):
            yield record


def print_document(record: Record, characters: int) -> None:
    """Print a document with its metadata."""
    meta = ", ".join(f"{key} {value}" for key, value in record["meta"].items())
    print(f"--- {record['id']} ({meta})")
    text = record["text"]
    print(text[:characters] + (f"\n[... {len(text) - characters:,} more characters]" if len(text) > characters else ""))


def print_duplicates(options: argparse.Namespace) -> None:
    """Print the documents that share a band of the build's signatures with a document, by their exact similarity."""
    manifest = options.corpus / "manifest.json"
    recipe = load_stored_recipe(json.loads(manifest.read_text(encoding="utf-8"))["recipe"], where=str(manifest))
    if recipe.duplicates.near == "none":
        raise CorpusError(
            f'{options.corpus} has no MinHash signatures, because it was built with duplicates.near = "none"; build it again '
            'with "fineweb", "pile" or "custom"'
        )
    work = options.corpus / "work"
    filtered = next(work.glob("filter-*"))
    signed = next(work.glob("sign*-*"))  # "signatures", or "sign" in version 1.0
    parts = sorted((filtered / "documents").glob("*.jsonl.zst"))
    original = next((r for path in parts for r in read_documents(path) if r["id"] == options.duplicates_of), None)
    if original is None:
        raise CorpusError(
            f"--duplicates-of {options.duplicates_of}: no filtered document has this id; without --duplicates-of, this program "
            "prints documents with their ids"
        )
    language: Any = WORDS
    block = BoundedSignature(str(signed / "signatures"), minhash_config(recipe), language=language)
    shingles = block.get_shingles(original["text"])
    if not len(shingles):
        raise CorpusError(
            f"--duplicates-of {options.duplicates_of}: the document has fewer than duplicates.n_gram = "
            f"{recipe.duplicates.n_gram} words, so it cannot have near duplicates; choose a longer document"
        )
    signature = block.get_signature(shingles)
    found = [(similarity(block, shingles, r["text"]), r) for r in find_candidates(signed, parts, signature)]
    found.sort(key=lambda one: -one[0])
    for jaccard, record in found[: options.n + 1]:
        print(f"{jaccard:.3f}  {record['meta']['pile_set_name']}  {record['id']}")


def find_candidates(signed: Path, parts: list[Path], signature: list[list[int]]) -> Iterator[Record]:
    """Yield the documents of all parts that share a band with the signature."""
    for number, path in enumerate(parts):
        hits: set[int] = set()
        for band, hashes in enumerate(signature):
            dtype = np.dtype([("hashes", "<u8", len(hashes)), ("document", "<u4")])
            entries = np.fromfile(signed / f"signatures/bucket_{band:03d}/{number:05d}.minhash.sig", dtype)
            hits |= set(entries["document"][(entries["hashes"] == np.array(hashes, np.uint64)).all(axis=1)].tolist())
        if hits:
            yield from (record for i, record in enumerate(read_documents(path)) if i in hits)


def similarity(block: BoundedSignature, shingles: np.ndarray, text: str) -> float:
    """Return the Jaccard similarity of the n-grams of two documents."""
    other = block.get_shingles(text)
    return len(np.intersect1d(shingles, other)) / max(len(np.union1d(shingles, other)), 1)


if __name__ == "__main__":
    sys.exit(run_command(main))
