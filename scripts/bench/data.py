# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Building a corpus in figures: MB/s of every step and of the whole on one core, peak memory as the input grows.

Seconds are those of the processor, so that other work on the machine does not count; waiting for the disk does not either.

The text is real: documents of a recipe's components in turn, as their sources give them. Each step goes over all of it by
itself, and beside it the bare call of the library that it stands on, where that is another. Whole builds of 1, 4 and 16
times --whole-mb follow, in processes of their own, and from the largest of them a projection to The Pile's 825 GiB.

examples:
  python scripts/bench/data.py
      with the sources of configs/corpus/machine.toml and a vocabulary trained on them
  python scripts/bench/data.py mine.toml --tokenizer tokenizer.json --mb 32 --whole-mb 0
      the steps alone, on other text
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import zstandard
from datatrove.data import Document
from mesh_transformer.scripts.train_tokenizer import train_vocabulary, write_atomically

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import check_table
from mesh_transformer.corpus.build import build_corpus
from mesh_transformer.corpus.filters import FILTERS, make_filters
from mesh_transformer.corpus.parts import PartWriter, read_documents
from mesh_transformer.corpus.quality import sample_texts, train_classifier
from mesh_transformer.corpus.recipe import Recipe, load_recipe
from mesh_transformer.corpus.sources import ReadStats, find_parts, read_part
from mesh_transformer.corpus.stage_dedup import BoundedSignature, hash_line, hash_text, minhash_config
from mesh_transformer.corpus.stages import Executor
from mesh_transformer.corpus.word_tokenizer import WORDS
from mesh_transformer.data.tokenizers import FileTokenizer, load_tokenizer

MB = 1e6
LONGEST = (
    100_000  # characters of a document: memory goes with the longest one, and is to be seen to go with nothing else
)
GROWTH = (1, 4, 16)  # times --whole-mb
PILE_MB, PILE_DOCUMENTS = 825.18 * 2**30 / MB, 146_340_692  # The Pile, table 1
MACHINES, CORES = (1, 16, 128), 32
Row = dict[str, Any]  # step, mb_per_s, and of the bare library: bare (its name), ratio
Texts = list[tuple[str, str]]  # name, text


def main(arguments: list[str]) -> int:
    """Read, measure step by step, build, project, print."""
    parser = make_parser(__doc__ or "")
    default = Path(__file__).parents[2] / "configs/corpus/machine.toml"
    parser.add_argument("corpus", type=Path, nargs="?", default=default, help="a recipe, for its sources")
    parser.add_argument("--tokenizer", default="", help="default: 8,192 tokens trained on the text")
    parser.add_argument("--mb", type=int, default=8, help="of text for the steps; default: %(default)s")
    parser.add_argument("--whole-mb", type=int, default=4, help="of the smallest build; 0: none; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where builds have room; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.corpus)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(recipe, Path(folder), options)
        rows = [*bench.read_sources(), *bench.measure_steps(), *bench.measure_stages()]
        builds = bench.measure_builds() if options.whole_mb else []
    result = {"text_mb": bench.size, "rows": rows, "builds": builds, "projection": project(builds)}
    print(json.dumps(result) if options.json else describe(result))
    return 0


class Bench:
    """Text of a recipe's sources, and what is measured on it."""

    def __init__(self, recipe: Recipe, folder: Path, options: argparse.Namespace):
        self.recipe, self.folder, self.options = recipe, folder, options
        self.parts, _ = find_parts(recipe)
        self.texts: Texts = []

    @property
    def size(self) -> float:
        """MB of the text of the steps."""
        return sum(len(text.encode()) for _, text in self.texts) / MB

    def documents(self, component: str) -> Iterator[tuple[str, str]]:
        """Name and text of a component's documents; too long ones are left out."""
        for part in self.parts:
            if part.component == component:
                for document in read_part(part, self.recipe, ReadStats()):
                    if len(document.text) < LONGEST:
                        yield document.name, document.text

    def read_sources(self) -> list[Row]:
        """An equal share of every component becomes the text of the steps; MB of text a second from its files."""
        names, share = (
            dict.fromkeys(part.component for part in self.parts),
            self.options.mb / len(self.recipe.components),
        )
        return [self._read_source(name, share) for name in names]

    def _read_source(self, name: str, mb: float) -> Row:
        """Whole files until there are so many MB; of these no more become text of the steps."""
        start, size, last = time.process_time(), 0, ""
        for place, text in self.documents(name):
            file = place.rpartition(":")[0] or place
            if size >= mb * MB and file != last:
                break
            if size < mb * MB:
                self.texts.append((place, text))
            size, last = size + len(text.encode()), file
        rate = size / MB / (time.process_time() - start)
        return {"step": f"read {self.recipe.components[name].kind}: {name}", "mb_per_s": rate}

    def rate(self, run: Callable[[str], Any]) -> float:
        """MB a second of a function of one text."""
        start = time.process_time()
        for _, text in self.texts:
            run(text)
        return self.size / (time.process_time() - start)

    def measure_steps(self) -> list[Row]:
        """Every kind of [[filters]]."""
        self.tokenizer = self.options.tokenizer or self._train_tokenizer()
        recipe = make_recipe(self.folder, list(FILTERS), self.tokenizer, self.texts)
        model = self.folder / "quality.bin"
        positives, negatives = (sample_texts((text for _, text in self.texts[half::2]), 1000, 0) for half in (0, 1))
        train_classifier(positives, negatives, model, 0)
        steps = make_filters(recipe, "text", dict.fromkeys(range(len(FILTERS)), model))
        rates = [self.rate(partial(lambda one, text: one(Document(text, "x")), step)) for _, step in steps]
        names = [name.partition("-")[2] for name, _ in steps]
        return [{"step": name, "mb_per_s": rate} for name, rate in zip(names, rates, strict=True)]

    def _train_tokenizer(self) -> str:
        path = self.folder / "tokenizer.json"
        write_atomically(path, train_vocabulary((text for _, text in self.texts), 8192).to_str())
        return str(path)

    def measure_stages(self) -> list[Row]:
        """Hashes, files and tokens, beside the bare libraries."""
        rows: list[Row] = [
            {"step": "exact duplicates", "mb_per_s": self.rate(hash_text)},
            {"step": "lines", "mb_per_s": self.rate(lambda text: {hash_line(line) for line in text.split("\n")})},
        ]
        language: Any = WORDS
        for near in ("pile", "fineweb"):
            table = dataclasses.replace(self.recipe.duplicates, near=near)
            config = minhash_config(dataclasses.replace(self.recipe, duplicates=table))
            block = BoundedSignature(str(self.folder), config, language=language)
            rows.append({"step": f"MinHash, {near}", "mb_per_s": self.rate(partial(sign, block))})
        return [*rows, *self._measure_files(), *self._measure_tokens()]

    def _measure_files(self) -> list[Row]:
        path = self.folder / "part.jsonl.zst"
        start = time.process_time()
        with PartWriter(path) as part:
            for name, text in self.texts:
                part.add(text, name, {})
        written = self.size / (time.process_time() - start)
        start = time.process_time()
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for _, text in self.texts)
        zstandard.ZstdCompressor(level=3).compress(lines.encode())
        bare = self.size / (time.process_time() - start)
        start = time.process_time()
        for _ in read_documents(path):
            pass
        read = self.size / (time.process_time() - start)
        return [
            {"step": "write a part", "mb_per_s": written, "bare": "json, zstd", "ratio": written / bare},
            {"step": "read a part", "mb_per_s": read},
        ]

    def _measure_tokens(self) -> list[Row]:
        """Ours and the library's own batch encoding by turns, the better of three each."""
        ours, texts = load_tokenizer(self.tokenizer), [text for _, text in self.texts]
        assert isinstance(ours, FileTokenizer), "a tokenizer.json"
        theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.to_json()["tokenizer"]))
        calls = {"ours": ours.encode_batch, "batch": theirs.encode_batch, "fast": theirs.encode_batch_fast}
        rates: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(3):
            for name, encode in calls.items():
                start = time.process_time()
                encode(texts)
                rates[name].append(self.size / (time.process_time() - start))
        best = {name: max(found) for name, found in rates.items()}
        ratios = {"ratio": best["ours"] / best["batch"], "ratio_fast": best["ours"] / best["fast"]}
        return [{"step": "tokens", "mb_per_s": best["ours"], "bare": "tokenizers' encode_batch"} | ratios]

    def measure_builds(self) -> list[Row]:
        """Whole builds, each in a fresh process: seconds by stage, peak memory."""
        sources = self.folder / "sources"
        sources.mkdir()
        names = dict.fromkeys(part.component for part in self.parts)
        turns = itertools.zip_longest(*(self.documents(name) for name in names))
        documents = (one for turn in turns for one in turn if one is not None)
        kinds = [kind for kind in FILTERS if kind not in ("c4", "fineweb", "quality")]  # which would leave little
        builds, there = [], 0
        for growth in GROWTH:
            for number in range(there, growth):
                lines = [json.dumps({"text": text}) for _, text in take(documents, self.options.whole_mb)]
                (sources / f"{number:04d}.jsonl").write_text("\n".join(lines))
            there = growth
            recipe = make_recipe(self.folder, kinds, self.tokenizer, self.texts, max(self.options.whole_mb // 2, 1))
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                build = pool.submit(build_alone, recipe, self.folder / f"out-{growth}").result()
            builds.append({"growth": growth} | build)
        return builds


def take(documents: Iterable[tuple[str, str]], mb: float) -> Texts:
    """The first documents of an iterator, of so many MB together."""
    found: Texts = []
    size = 0
    for document in documents:
        found.append(document)
        size += len(document[1].encode())
        if size >= mb * MB:
            break
    return found


def make_recipe(folder: Path, kinds: list[str], tokenizer: str, texts: Texts, part_mb: int = 1) -> Recipe:
    """One component of JSON lines with these steps, near duplicates as FineWeb has them, lines, and a tokenizer."""
    evaluation = folder / "evaluation.jsonl"
    evaluation.write_text(
        "".join(json.dumps({"text": text[:1000]}) + "\n" for _, text in texts[:: len(texts) // 50 + 1])
    )
    settings: dict[str, dict[str, Any]] = {
        "quality": {"positives": ["text"], "negatives": ["text"]},
        "decontaminate": {"against": ["evaluation"], "max_cuts": 1_000_000},
        "gopher-quality": {"min_words": 10, "min_stop_words": 0},
    }
    table = {
        "corpus": {"name": "bench", "part_mb": part_mb},
        "components": {"text": {"kind": "jsonl", "paths": [str(folder / "sources")], "license": "that of the sources"}},
        "filters": [{"kind": kind} | settings.get(kind, {}) for kind in kinds],
        "evaluation": {"evaluation": {"path": str(evaluation)}},
        "duplicates": {"near": "fineweb"},
        "lines": {"min_documents": 50},
        "tokens": {"tokenizer": tokenizer},
    }
    return check_table(Recipe, table, where="bench")


def sign(block: BoundedSignature, text: str) -> None:
    """A document's MinHash signature, if it has any n-gram."""
    shingles = block.get_shingles(text)
    if len(shingles):
        block.get_signature(shingles)


def build_alone(recipe: Recipe, out: Path) -> Row:
    """Build in this process and say what it took."""
    before, marks, clock = peak_memory(), [("", time.process_time())], time.perf_counter()

    def report(name: str, done: int, total: int) -> None:
        if done == total:
            marks.append((name, time.process_time()))

    corpus = build_corpus(recipe, out, Executor(), report)
    seconds: dict[str, float] = {}
    for (_, start), (name, end) in itertools.pairwise(marks):
        seconds[name] = seconds.get(name, 0.0) + end - start
    size = sum(record["raw"]["bytes"] for record in corpus.filtered) / MB
    return {
        "mb": size,
        "documents": sum(record["raw"]["documents"] for record in corpus.filtered),
        "parts": len(corpus.parts),
        "mb_per_s": size / (time.process_time() - marks[0][1]),
        "wall_s": time.perf_counter() - clock,
        "stages": seconds,
        "imports_mb": before,
        "peak_mb": peak_memory(),
    }


def peak_memory() -> float:
    """MB that this process held at most; getrusage would count what its parent held before."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / MB


ALONE = {"match-bands": 14, "removals": 1, "shards": 1}  # tasks of stages that have no more than these, however large
BY_DOCUMENT = ("match-bands", "match-exact", "removals")


def project(builds: list[Row]) -> list[Row]:
    """Hours for The Pile's raw text, from the smallest and the largest build; see `describe` for what is assumed."""
    if len(builds) < 2:
        return []
    small, large, rows = builds[0], builds[-1], []
    for machines in MACHINES:
        hours: dict[str, float] = {}
        for stage, seconds in large["stages"].items():
            unit, whole = ("documents", PILE_DOCUMENTS) if stage in BY_DOCUMENT else ("mb", PILE_MB)
            slope = max(seconds - small["stages"][stage], 0.0) / (
                large[unit] - small[unit]
            )  # what starts once cancels out
            hours[stage] = slope * whole / min(machines * CORES, ALONE.get(stage, machines * CORES)) / 3600
        rows.append({"machines": machines, "cores": machines * CORES, "hours": sum(hours.values()), "stages": hours})
    return rows


def describe(result: Row) -> str:
    """The tables."""
    lines = [f"{result['text_mb']:.1f} MB of text", f"{'step':<32} {'MB/s per core':>13}  of the bare library"]
    for row in result["rows"]:
        ratio = f"  {row['ratio']:.2f} of {row['bare']}" if "ratio" in row else ""
        lines.append(f"{row['step']:<32} {row['mb_per_s']:>13.2f}{ratio}")
    for build in result["builds"]:
        lines.append(
            f"build x{build['growth']:<3} {build['mb']:8.1f} MB {build['parts']:4} parts {build['mb_per_s']:6.2f} MB/s, peak "
            f"{build['peak_mb']:.0f} MB, of these {build['imports_mb']:.0f} MB before it began; {build['wall_s']:.0f} s by clock"
        )
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in build["stages"].items())
        lines.append(f"           seconds: {stages}")
    if result["projection"]:
        lines.append(
            f"on paper, {PILE_MB / 1e6:.3f} TB and {PILE_DOCUMENTS:,} documents on machines of {CORES} such cores; stages in "
            "parts take what they take here for each byte or document, whatever the number of parts; storage keeps up; "
            f"match-bands has {ALONE['match-bands']} tasks, removals and the shard of the mixture one:"
        )
    for row in result["projection"]:
        longest = sorted(row["stages"].items(), key=lambda item: -item[1])[:4]
        stages = ", ".join(f"{name} {hours:.2f}" for name, hours in longest)
        lines.append(f"{row['machines']:>4} machines: {row['hours']:8.1f} h ({stages}, ...)")
    if result["builds"]:
        first, last = (result["builds"][i]["peak_mb"] for i in (0, -1))
        lines.append(f"peak memory, largest over smallest build: {last / first:.3f}")
    tokens = next(row for row in result["rows"] if row["step"] == "tokens")
    lines.append(f"tokens, ours over tokenizers' encode_batch_fast, which ours is based on: {tokens['ratio_fast']:.3f}")
    lines.append(f"tokens, ours over tokenizers' own batch encoding: {tokens['ratio']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
