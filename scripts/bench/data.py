# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure building a corpus: MB of text per second of each filter and stage on one core, and peak memory as the input grows.

Times are CPU seconds, which exclude other load on the machine and waiting for the disk.

The text consists of documents of a recipe's components, an equal share of each, as read from the sources. Each filter and
stage processes all of the text separately; for a stage that is based on a library, the library alone is measured as well.
Complete builds of 1, 4 and 16 times --build-mb follow, in separate processes. The time for The Pile's 825 GiB is
extrapolated from the smallest and the largest build.

examples:
  python scripts/bench/data.py
      the sources of configs/corpus/machine.toml, with a vocabulary trained on them
  python scripts/bench/data.py mine.toml --tokenizer tokenizer.json --mb 32 --build-mb 0
      filters and stages only, on other text
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
from mesh_transformer.config import ConfigError, check_table
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
MAX_CHARACTERS = 100_000  # longer documents are skipped, since peak memory depends on the longest document
GROWTH = (1, 4, 16)  # sizes of the builds in multiples of --build-mb
PILE_MB = 825.18 * 2**30 / MB  # The Pile, table 1
PILE_DOCUMENTS = 146_340_692
MACHINES = (1, 16, 128)
CORES = 32  # per machine
Row = dict[str, Any]  # step, mb_per_s; compared with a library: library (its name), ratio
Texts = list[tuple[str, str]]  # name, text
TOKENIZE = "tokenize"  # name of the step in the table


def main(arguments: list[str]) -> int:
    """Read the text, measure filters and stages, build, project and print."""
    parser = make_parser(__doc__ or "")
    default = Path(__file__).parents[2] / "configs/corpus/machine.toml"
    parser.add_argument(
        "corpus",
        type=Path,
        nargs="?",
        default=default,
        help="recipe with the sources; default: configs/corpus/machine.toml",
    )
    parser.add_argument("--tokenizer", default="", help="tokenizer.json; default: 8,192 tokens trained on the text")
    parser.add_argument("--mb", type=int, default=8, help="MB of text for filters and stages; default: %(default)s")
    parser.add_argument(
        "--build-mb", type=int, default=4, help="MB of text of the smallest build; 0: no builds; default: %(default)s"
    )
    parser.add_argument("--folder", type=Path, help="folder with space for the builds; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.corpus)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(recipe, Path(folder), options)
        rows = [*bench.read_sources(), *bench.measure_filters(), *bench.measure_stages()]
        builds = bench.measure_builds() if options.build_mb else []
    result = {"text_mb": bench.size, "rows": rows, "builds": builds, "projection": project(builds)}
    print(json.dumps(result) if options.json else format_result(result))
    return 0


class Bench:
    """Text of a recipe's sources, and measurements on it."""

    def __init__(self, recipe: Recipe, folder: Path, options: argparse.Namespace):
        self.recipe = recipe
        self.folder = folder
        self.options = options
        self.parts, _ = find_parts(recipe)
        self.texts: Texts = []
        self.tokenizer = options.tokenizer  # "": trained on the texts after they are read

    @property
    def size(self) -> float:
        """Size of the texts in MB."""
        return sum(len(text.encode()) for _, text in self.texts) / MB

    def documents(self, component: str) -> Iterator[tuple[str, str]]:
        """Yield name and text of a component's documents of at most MAX_CHARACTERS."""
        for part in self.parts:
            if part.component == component:
                for document in read_part(part, self.recipe, ReadStats()):
                    if len(document.text) < MAX_CHARACTERS:
                        yield document.name, document.text

    def read_sources(self) -> list[Row]:
        """Read and keep an equal share of text from each component; return the MB per second of each."""
        names = dict.fromkeys(part.component for part in self.parts)
        share = self.options.mb / len(self.recipe.components)
        return [self._read_source(name, share) for name in names]

    def _read_source(self, component: str, mb: float) -> Row:
        """Read complete files with at least `mb` MB of text, keep documents of about `mb` MB, and return the reading rate."""
        size = 0
        last_file = ""
        start = time.process_time()
        for name, text in self.documents(component):
            file = name.rpartition(":")[0] or name
            if size >= mb * MB and file != last_file:
                break
            if size < mb * MB:
                self.texts.append((name, text))
            size += len(text.encode())
            last_file = file
        rate = size / MB / (time.process_time() - start)
        return {"step": f"read {self.recipe.components[component].kind}: {component}", "mb_per_s": rate}

    def rate(self, run: Callable[[str], Any]) -> float:
        """Return the MB of text per second that a function of one text processes."""
        start = time.process_time()
        for _, text in self.texts:
            run(text)
        return self.size / (time.process_time() - start)

    def measure_filters(self) -> list[Row]:
        """Return the rate of each kind of [[filters]]."""
        self.tokenizer = self.tokenizer or self._train_tokenizer()
        recipe = make_recipe(self.folder, list(FILTERS), self.tokenizer, self.texts)
        classifier = self.folder / "quality.bin"
        positives, negatives = (sample_texts((text for _, text in self.texts[half::2]), 1000, 0) for half in (0, 1))
        train_classifier(positives, negatives, classifier, 0)
        rows: list[Row] = []
        for name, apply in make_filters(recipe, "text", dict.fromkeys(range(len(FILTERS)), classifier)):
            rate = self.rate(partial(apply_to_text, apply))
            rows.append({"step": name.partition("-")[2], "mb_per_s": rate})
        return rows

    def _train_tokenizer(self) -> str:
        path = self.folder / "tokenizer.json"
        write_atomically(path, train_vocabulary((text for _, text in self.texts), 8192).to_str())
        return str(path)

    def measure_stages(self) -> list[Row]:
        """Return the rates of hashing, files and tokenization, and of the libraries alone."""
        rows: list[Row] = [
            {"step": "exact duplicates", "mb_per_s": self.rate(hash_text)},
            {
                "step": "repeated lines",
                "mb_per_s": self.rate(lambda text: {hash_line(line) for line in text.split("\n")}),
            },
        ]
        language: Any = WORDS
        for near in ("pile", "fineweb"):
            table = dataclasses.replace(self.recipe.duplicates, near=near)
            config = minhash_config(dataclasses.replace(self.recipe, duplicates=table))
            signature = BoundedSignature(str(self.folder), config, language=language)
            rows.append({"step": f"MinHash, {near}", "mb_per_s": self.rate(partial(compute_signature, signature))})
        return [*rows, *self._measure_files(), *self._measure_tokens()]

    def _measure_files(self) -> list[Row]:
        path = self.folder / "part.jsonl.zst"
        start = time.process_time()
        with PartWriter(path) as part:
            for name, text in self.texts:
                part.add(text, name, {})
        write_rate = self.size / (time.process_time() - start)
        start = time.process_time()
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for _, text in self.texts)
        zstandard.ZstdCompressor(level=3).compress(lines.encode())
        library_rate = self.size / (time.process_time() - start)
        start = time.process_time()
        for _ in read_documents(path):
            pass
        read_rate = self.size / (time.process_time() - start)
        return [
            {
                "step": "write a part",
                "mb_per_s": write_rate,
                "library": "json and zstd",
                "ratio": write_rate / library_rate,
            },
            {"step": "read a part", "mb_per_s": read_rate},
        ]

    def _measure_tokens(self) -> list[Row]:
        """Return the best of three rates of this project's batch encoding and of the library's, measured in alternation."""
        texts = [text for _, text in self.texts]
        tokenizer = load_tokenizer(self.tokenizer)
        if not isinstance(tokenizer, FileTokenizer):
            raise ConfigError(
                f"--tokenizer {self.tokenizer}: must be a tokenizer.json or its folder, which tokenizers can read"
            )
        library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_json()["tokenizer"]))
        encoders = {"native": tokenizer.encode_batch, "batch": library.encode_batch, "fast": library.encode_batch_fast}
        rates: dict[str, list[float]] = {name: [] for name in encoders}
        for _ in range(3):
            for name, encode in encoders.items():
                start = time.process_time()
                encode(texts)
                rates[name].append(self.size / (time.process_time() - start))
        best = {name: max(own) for name, own in rates.items()}
        return [
            {
                "step": TOKENIZE,
                "mb_per_s": best["native"],
                "library": "tokenizers' encode_batch",
                "ratio": best["native"] / best["batch"],
                "ratio_fast": best["native"] / best["fast"],
            }
        ]

    def measure_builds(self) -> list[Row]:
        """Build corpora of growing size, each in a new process; return seconds by stage and peak memory."""
        sources = self.folder / "sources"
        sources.mkdir()
        components = dict.fromkeys(part.component for part in self.parts)
        rounds = itertools.zip_longest(*(self.documents(name) for name in components))
        documents = (document for one_of_each in rounds for document in one_of_each if document is not None)
        # c4, fineweb and quality are left out because they would drop most documents.
        kinds = [kind for kind in FILTERS if kind not in ("c4", "fineweb", "quality")]
        builds = []
        n_files = 0
        for growth in GROWTH:
            for number in range(n_files, growth):
                lines = [json.dumps({"text": text}) for _, text in take(documents, self.options.build_mb)]
                (sources / f"{number:04d}.jsonl").write_text("\n".join(lines))
            n_files = growth
            recipe = make_recipe(self.folder, kinds, self.tokenizer, self.texts, max(self.options.build_mb // 2, 1))
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                build = pool.submit(measure_build, recipe, self.folder / f"out-{growth}").result()
            builds.append({"growth": growth} | build)
        return builds


def take(documents: Iterable[tuple[str, str]], mb: float) -> Texts:
    """Return the next documents of an iterator until they have `mb` MB of text."""
    taken: Texts = []
    size = 0
    for document in documents:
        taken.append(document)
        size += len(document[1].encode())
        if size >= mb * MB:
            break
    return taken


def make_recipe(folder: Path, kinds: list[str], tokenizer: str, texts: Texts, part_mb: int = 1) -> Recipe:
    """Return a recipe of one JSONL component with these filters, FineWeb's near deduplication, line deduplication and tokens."""
    evaluation = folder / "evaluation.jsonl"
    evaluation.write_text(
        "".join(json.dumps({"text": text[:1000]}) + "\n" for _, text in texts[:: len(texts) // 50 + 1])
    )
    options: dict[str, dict[str, Any]] = {
        "quality": {"positives": ["text"], "negatives": ["text"]},
        "decontaminate": {"against": ["evaluation"], "max_cuts": 1_000_000},
        "gopher-quality": {"min_words": 10, "min_stop_words": 0},
    }
    table = {
        "corpus": {"name": "bench", "part_mb": part_mb},
        "components": {"text": {"kind": "jsonl", "paths": [str(folder / "sources")], "license": "as the sources"}},
        "filters": [{"kind": kind} | options.get(kind, {}) for kind in kinds],
        "evaluation": {"evaluation": {"path": str(evaluation)}},
        "duplicates": {"near": "fineweb"},
        "lines": {"min_documents": 50},
        "tokens": {"tokenizer": tokenizer},
    }
    return check_table(Recipe, table, where="bench")


def apply_to_text(apply: Callable[[Document], Any], text: str) -> None:
    """Apply a filter to a text."""
    apply(Document(text, "x"))


def compute_signature(signature: BoundedSignature, text: str) -> None:
    """Compute the MinHash signature of a text, if it has any n-gram."""
    shingles = signature.get_shingles(text)
    if len(shingles):
        signature.get_signature(shingles)


def measure_build(recipe: Recipe, out: Path) -> Row:
    """Build a corpus in this process; return sizes, CPU seconds by stage and peak memory."""
    peak_before = peak_memory()
    start = time.perf_counter()
    stage_ends = [("", time.process_time())]

    def on_progress(name: str, done: int, total: int) -> None:
        if done == total:
            stage_ends.append((name, time.process_time()))

    corpus = build_corpus(recipe, out, Executor(), on_progress)
    seconds: dict[str, float] = {}
    for (_, stage_start), (name, stage_end) in itertools.pairwise(stage_ends):
        seconds[name] = seconds.get(name, 0.0) + stage_end - stage_start
    size = sum(record["raw"]["bytes"] for record in corpus.filtered) / MB
    return {
        "mb": size,
        "documents": sum(record["raw"]["documents"] for record in corpus.filtered),
        "parts": len(corpus.parts),
        "mb_per_s": size / (time.process_time() - stage_ends[0][1]),
        "wall_s": time.perf_counter() - start,
        "stages": seconds,
        "imports_mb": peak_before,
        "peak_mb": peak_memory(),
    }


def peak_memory() -> float:
    """Return this process's peak memory in MB; getrusage would include its parent's before the fork."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / MB


# Number of tasks of the stages whose number of tasks does not grow with the input.
MAX_TASKS = {"match-bands": 14, "removals": 1, "shards": 1}
# Stages whose time grows with the number of documents instead of bytes.
STAGES_PER_DOCUMENT = ("match-bands", "match-exact", "removals")


def project(builds: list[Row]) -> list[Row]:
    """Return the hours for The Pile's raw text, extrapolated from the smallest and the largest build.

    `format_result` prints the assumptions.
    """
    if len(builds) < 2:
        return []
    small = builds[0]
    large = builds[-1]
    rows = []
    for machines in MACHINES:
        cores = machines * CORES
        hours: dict[str, float] = {}
        for stage, seconds in large["stages"].items():
            unit, total = ("documents", PILE_DOCUMENTS) if stage in STAGES_PER_DOCUMENT else ("mb", PILE_MB)
            added_seconds = max(seconds - small["stages"][stage], 0.0)  # the difference excludes start-up
            slope = added_seconds / (large[unit] - small[unit])
            hours[stage] = slope * total / min(cores, MAX_TASKS.get(stage, cores)) / 3600
        rows.append({"machines": machines, "cores": cores, "hours": sum(hours.values()), "stages": hours})
    return rows


def format_result(result: Row) -> str:
    """Return the tables; the last line is the ratio of tokenization."""
    lines = [f"{result['text_mb']:.1f} MB of text", f"{'step':<32} {'MB/s per core':>13}  ratio to the library alone"]
    for row in result["rows"]:
        ratio = f"  {row['ratio']:.2f} of {row['library']}" if "ratio" in row else ""
        lines.append(f"{row['step']:<32} {row['mb_per_s']:>13.2f}{ratio}")
    for build in result["builds"]:
        lines.append(
            f"build x{build['growth']:<3} {build['mb']:8.1f} MB {build['parts']:4} parts {build['mb_per_s']:6.2f} MB/s, "
            f"peak memory {build['peak_mb']:.0f} MB ({build['imports_mb']:.0f} MB before the build); "
            f"{build['wall_s']:.0f} s wall clock"
        )
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in build["stages"].items())
        lines.append(f"           CPU seconds: {stages}")
    lines += _format_projection(result["projection"])
    if result["builds"]:
        peaks = [result["builds"][i]["peak_mb"] for i in (0, -1)]
        lines.append(f"peak memory of the largest build / the smallest: {peaks[1] / peaks[0]:.3f}")
    tokens = next(row for row in result["rows"] if row["step"] == TOKENIZE)
    lines.append(f"ratio of tokenization to tokenizers' encode_batch_fast, which it calls: {tokens['ratio_fast']:.3f}")
    lines.append(f"ratio of tokenization to tokenizers' encode_batch: {tokens['ratio']:.3f}")
    return "\n".join(lines)


def _format_projection(projection: list[Row]) -> list[str]:
    if not projection:
        return []
    lines = [
        f"projection to {PILE_MB / 1e6:.3f} TB and {PILE_DOCUMENTS:,} documents on machines with {CORES} cores like this one. "
        "It assumes that each stage takes as long per byte or document as here, for any number of parts; that storage is not "
        f"a bottleneck; that match-bands has {MAX_TASKS['match-bands']} tasks, and removals and shards have one:"
    ]
    for row in projection:
        slowest = sorted(row["stages"].items(), key=lambda item: -item[1])[:4]
        stages = ", ".join(f"{name} {hours:.2f}" for name, hours in slowest)
        lines.append(f"{row['machines']:>4} machines: {row['hours']:8.1f} h ({stages}, ...)")
    return lines


if __name__ == "__main__":
    sys.exit(run_command(main))
