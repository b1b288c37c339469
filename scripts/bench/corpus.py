# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare a corpus with its raw sources: train a small model on the same amount of each of three texts

  mixture    CORPUS as built: filtered, deduplicated, components by their epochs
  raw        the same sources without filters and deduplication, components by their size
  COMPONENT  one component of CORPUS alone

and measure bits per byte on the held-out documents of CORPUS by component, as in table 4 of The Pile's paper.

No run trains on held-out text. Documents that the corpus held out by name are excluded from the raw text as well. From
a passage that shares 13 consecutive words with a held-out document, these words and 200 characters on each side are cut
(GPT-3, appendix C); a passage with more than ten overlaps is dropped. The result is checked for shared 13-grams.

Passages of at most 16,384 characters are sampled by a hash of their names, and so are files of the raw sources. Runs are
stored in OUT; the same command resumes them. The table is also in OUT/bits_per_byte.json.

examples:
  python scripts/bench/corpus.py corpora/machine runs/corpus
      three runs of the quickstart model on 2 MB of text each; about 15 minutes on two cores
  python scripts/bench/corpus.py corpora/machine runs/corpus-large --component manual-pages --mb 20 --seeds 2 \\
      --set model.d_model=256
      other sizes; --set applies to all runs

exit status: 0 done, 1 failed, 2 wrong usage, 75 preempted (run it again to continue)
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mesh_transformer.cli import PREEMPTED, Preempted, add_set_option, make_parser, run_command
from mesh_transformer.config import ConfigError, load_config
from mesh_transformer.reports.evaluation_results import metrics_of, read_evaluations
from mesh_transformer.storage.atomic_files import replace_file

ROOT = Path(__file__).parents[2]
PASSAGE = 16_384  # maximum characters of a passage
LARGE_FILE = 1_000_000  # bytes; larger source files are sampled by passage, smaller ones as a whole
SPARE = 1.4  # ratio of sampled to trained text, since decontamination removes some text
OVERLAP = 13  # consecutive words that a passage may not share with held-out text
HELD_OUT_KB = 60  # maximum kB of held-out text of a component
CUT_LABEL = "passages cut, dropped"


class Passage(NamedTuple):
    """Part of a document."""

    component: str
    name: str
    text: str


Source = tuple[float, Passage]  # a whole document, and the fraction of its passages to sample


def main(arguments: list[str]) -> int:
    """Sample the texts, train, measure and print the table."""
    options = parse(arguments)
    sheet = read_sheet(options.corpus)
    component = options.component or max(sheet["components"], key=lambda n: sheet["components"][n]["effective_bytes"])
    if component not in sheet["components"]:
        raise ConfigError(
            f"--component {component}: not a component of {options.corpus}; choose one of {', '.join(sheet['components'])}"
        )
    texts = prepare_texts(options.corpus, sheet, component, options.out / "texts", options.mb)
    names = ["mixture", "raw", component]
    runs = {name: [train(options, texts, name, seed) for seed in range(options.seeds)] for name in names}
    table = make_table(runs)
    result = {"corpus": sheet["digest"], "texts": texts, "bits_per_byte": table}
    replace_file(options.out / "bits_per_byte.json", (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result, indent=2) if options.json else format_result(texts, table))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "corpus", type=Path, metavar="CORPUS", help="folder of a corpus built by scripts/build_corpus.py"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder for texts, runs and table")
    parser.add_argument("--component", help="component of the third run; default: the largest of the mixture")
    parser.add_argument("--mb", type=float, default=2.0, help="MB of training text; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="number of runs for each text; default: %(default)s")
    parser.add_argument(
        "--config", default=str(ROOT / "configs/quickstart.toml"), help="model configuration; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_set_option(parser)
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        raise ConfigError(f"--seeds {options.seeds}: must be at least 1")
    if options.mb <= 0:
        raise ConfigError(f"--mb {options.mb}: must be greater than 0")
    return options


def read_sheet(corpus: Path) -> dict[str, Any]:
    """Return the datasheet of a complete corpus; this does not need the libraries of the corpus extra."""
    if not (corpus / "manifest.json").is_file() or not (corpus / "datasheet.json").is_file():
        raise ConfigError(f"{corpus}: not a complete corpus; build it with scripts/build_corpus.py")
    return json.loads((corpus / "datasheet.json").read_text(encoding="utf-8"))


def prepare_texts(corpus: Path, sheet: dict[str, Any], component: str, folder: Path, mb: float) -> dict[str, Any]:
    """Write training and held-out texts unless they exist; return their sizes by text and component."""
    plan = {"digest": sheet["digest"], "component": component, "mb": mb, "passage": PASSAGE}
    summary = folder / "summary.json"
    if summary.is_file():
        found = json.loads(summary.read_text(encoding="utf-8"))
        if found["plan"] != plan:
            raise ConfigError(f"{folder} has the texts of {found['plan']}, but {plan} is requested; choose another OUT")
        return found
    # Imported late so that resuming does not require the libraries of the corpus extra.
    from mesh_transformer.corpus.contamination import ContaminationIndex
    from mesh_transformer.corpus.recipe import DecontaminateFilter, EvaluationConfig, load_stored_recipe

    recipe = load_stored_recipe(sheet["recipe"], where=str(corpus / "datasheet.json"))
    held_out = write_held_out(corpus, folder)
    config = DecontaminateFilter(kind="decontaminate", against=("held-out",), n_gram=OVERLAP)
    index = ContaminationIndex(config, {"held-out": EvaluationConfig(path=str(folder / "held-out"))})
    components = sheet["components"]
    sizes = {name: components[name]["effective_bytes"] for name in components}
    target = SPARE * 1e6 * mb
    fractions = {name: target / sum(sizes.values()) * components[name]["epochs"] for name in components}
    single = {component: target / components[component]["train_bytes"]}
    raw_fraction = target / sum(entry["raw_bytes"] for entry in components.values())
    sampled = {
        "mixture": sample(built_documents(corpus, fractions)),
        "raw": sample(raw_documents(recipe, raw_fraction)),
        component: sample(built_documents(corpus, single)),
    }
    trained = {
        name: write_clean(folder.absolute() / f"{name}.jsonl.zst", passages, index, int(1e6 * mb))
        for name, passages in sampled.items()
    }
    found = {"plan": plan, "held_out": held_out, "trained": trained}
    replace_file(summary, (json.dumps(found, indent=2) + "\n").encode())
    return found


def write_held_out(corpus: Path, folder: Path) -> dict[str, int]:
    """Write held-out/COMPONENT.jsonl with the first documents by hash; return the bytes of each component."""
    from mesh_transformer.corpus.parts import read_documents

    documents: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((corpus / "documents/heldout").glob("*.jsonl.zst")):
        for record in read_documents(path):
            documents[record["meta"]["pile_set_name"]].append(record)
    found = {}
    for name, records in documents.items():
        lines, size = [], 0
        for record in sorted(records, key=lambda record: xxhash.xxh3_64_intdigest(record["id"].encode())):
            text = record["text"][: HELD_OUT_KB * 1000 - size]
            if text.strip():
                lines.append(json.dumps({"text": text}) + "\n")
                size += len(text)
        path = held_out_file(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, "".join(lines).encode())
        found[name] = sum(len(json.loads(line)["text"].encode()) for line in lines)
    return found


def built_documents(corpus: Path, fractions: dict[str, float]) -> Iterator[Source]:
    """Yield the training documents of the components in `fractions`, each with its fraction."""
    from mesh_transformer.corpus.parts import read_documents

    for path in sorted((corpus / "documents/train").glob("*.jsonl.zst")):
        for record in read_documents(path):
            if (name := record["meta"]["pile_set_name"]) not in fractions:
                break  # all documents of a file have the same component
            yield fractions[name], Passage(name, record["id"], record["text"])


def raw_documents(recipe: Any, fraction: float) -> Iterator[Source]:
    """Yield the unfiltered training documents of sampled files (fraction 1) and of all large files (`fraction`)."""
    from mesh_transformer.corpus.sources import ReadStats, find_parts, read_part
    from mesh_transformer.corpus.stage_filter import split_of

    for part in find_parts(recipe)[0]:
        for file in part.files:
            is_large = file.size > LARGE_FILE
            if not is_large and not is_sampled(f"file:{file.path}", fraction):
                continue
            for document in read_part(part._replace(files=(file,)), recipe, ReadStats()):
                if split_of(document.name, recipe) == "train":
                    yield fraction if is_large else 1.0, Passage(part.component, document.name, document.text)


def is_sampled(name: str, fraction: float) -> bool:
    """Return whether the hash of a name is in the first `fraction` of all hashes."""
    return xxhash.xxh3_64_intdigest(name.encode()) < fraction * 2**64


def sample(documents: Iterable[Source]) -> list[Passage]:
    """Sample the passages of documents by the fractions of the documents, ordered by a hash of their names."""
    passages = []
    for fraction, document in documents:
        for number, start in enumerate(range(0, len(document.text), PASSAGE)):
            name = f"{document.name}#{number}"
            if is_sampled(f"passage:{name}", fraction):
                passages.append(Passage(document.component, name, document.text[start : start + PASSAGE]))
    return sorted(passages, key=lambda passage: xxhash.xxh3_64_intdigest(f"order:{passage.name}".encode()))


def write_clean(path: Path, passages: Iterable[Passage], index: Any, size: int) -> dict[str, Any]:
    """Write `size` bytes of text that share no n-gram with held-out text; return counts of written, cut and dropped text.

    Raises DataError if a written passage still shares an n-gram.
    """
    from datatrove.data import Document

    from mesh_transformer.corpus.parts import PartWriter
    from mesh_transformer.data.errors import DataError

    written: Counter[str] = Counter()
    counts = {"passages": 0, "cut": 0, "cut_bytes": 0, "dropped": 0}
    with PartWriter(path) as part:
        for passage in passages:
            if part.bytes >= size:
                break
            document = Document(passage.text, passage.name)
            if index.decontaminate(document):
                counts["dropped"] += 1
                continue
            counts["passages"] += 1
            counts["cut"] += document.text != passage.text
            counts["cut_bytes"] += len(passage.text.encode()) - len(document.text.encode())
            again = Document(document.text, passage.name)
            if index.decontaminate(again) or again.text != document.text:
                raise DataError(
                    f"{passage.name}: shares {OVERLAP} consecutive words with a held-out document even after decontamination; "
                    "exclude its file in the recipe, and build the corpus again"
                )
            part.add(document.text, passage.name, {"pile_set_name": passage.component})
            written[passage.component] += len(document.text.encode())
    return {"path": str(path), "bytes": part.bytes, **counts, "components": dict(written.most_common())}


def train(options: argparse.Namespace, texts: dict[str, Any], name: str, seed: int) -> dict[str, float]:
    """Train on a text, or resume its run, and return the bits per byte of each component and of all."""
    run = (options.out / f"{name}-seed{seed}").absolute()
    held_out = {component: str(held_out_file(options.out / "texts", component)) for component in texts["held_out"]}
    changes = [
        f"run.dir={json.dumps(str(run))}",
        f"run.seed={seed}",
        f"data.train={{text={{path={json.dumps(texts['trained'][name]['path'])}}}}}",
        "data.holdout_one_in=0",
        f"data.cache_dir={json.dumps(str((options.out / 'cache').absolute()))}",
        "train.evaluate_every=0",
        "sample.prompts=[]",
        'evaluate.tasks=["text"]',
        *(f"evaluate.data.{component}={json.dumps(path)}" for component, path in held_out.items()),
        *options.set,
    ]
    config = load_config(options.config, changes)
    steps = max(int(1e6 * options.mb / (config.train.batch_size * config.model.seq_len)), 1)
    changes += [f"train.steps={steps}", f"checkpoint.every={max(steps // 4, 1)}"]
    if steps not in read_evaluations(run):
        command = [sys.executable, str(ROOT / "device_train.py"), options.config]
        print(f"{name}, seed {seed}: {steps:,} steps in {run}", file=sys.stderr, flush=True)
        finished = subprocess.run(
            [*command, *(f"--set={change}" for change in changes)], stdout=sys.stderr, cwd=ROOT, check=False
        )
        if finished.returncode == PREEMPTED:
            raise Preempted(f"training on {name} was preempted; run the same command again to resume")
        if finished.returncode:
            raise ChildProcessError(
                f"training on {name} with seed {seed} failed with status {finished.returncode}; correct the error above, and run "
                "the same command again to resume"
            )
    measured = metrics_of(read_evaluations(run)[steps])
    found = {component: measured[f"text:{component}.bits_per_byte"] for component in held_out}
    return found | ({"all": measured["text.bits_per_byte"]} if len(held_out) > 1 else {})


def held_out_file(folder: Path, component: str) -> Path:
    """Return the path of the held-out texts of a component."""
    return (folder / "held-out" / f"{component}.jsonl").absolute()


def make_table(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return component -> training text -> mean over the seeds, and standard deviation if there are several."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for component in next(iter(runs.values()))[0]:
        table[component] = {}
        for name, seeds in runs.items():
            values = [found[component] for found in seeds]
            table[component][name] = {"mean": statistics.fmean(values)}
            if len(values) > 1:
                table[component][name]["sd"] = statistics.stdev(values)
    return table


def format_result(texts: dict[str, Any], table: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the training texts and bits per byte as tables; a star marks the lowest value of each line."""
    names = list(texts["trained"])
    width = max(map(len, [*table, CUT_LABEL])) + 2
    heading = f"{'':<{width}}" + "".join(f"{name:>24}" for name in names)
    lines = ["MB of training text, by component", heading]
    for component in [*texts["held_out"], *sorted({c for n in names for c in texts["trained"][n]["components"]})]:
        sizes = [texts["trained"][name]["components"].get(component, 0) / 1e6 for name in names]
        line = f"{component:<{width}}" + "".join(f"{size:>24.3f}" for size in sizes)
        if line not in lines:
            lines.append(line)
    totals = [texts["trained"][name] for name in names]
    lines.append(f"{'total':<{width}}" + "".join(f"{total['bytes'] / 1e6:>24.3f}" for total in totals))
    lines.append(f"{CUT_LABEL:<{width}}" + "".join(f"{total['cut']:>18,}{total['dropped']:>6,}" for total in totals))
    lines += ["", "bits per byte of held-out text, * = lowest of the line", f"{heading}{'bytes':>12}"]
    for component, found in table.items():
        best = min(math.inf, *(value["mean"] for value in found.values()))
        cells = ""
        for name in names:
            mean = found[name]["mean"]
            spread = f" ± {found[name]['sd']:.4f}" if "sd" in found[name] else ""
            cell = f"{mean:.4f}{spread}{'*' if mean == best else ' '}"
            cells += f"{cell:>24}"
        size = texts["held_out"].get(component, sum(texts["held_out"].values()))
        lines.append(f"{component:<{width}}{cells}{size:>12,}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
