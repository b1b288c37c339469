# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What filtering, deduplication and the mixture of a corpus are worth: one small model trained on as much text of each of

  mixture    CORPUS as built: filtered, without duplicates, components by their epochs
  raw        the same sources as they lie there: no step, no deduplication, every component as large as it is
  COMPONENT  one component of CORPUS alone

and measured on the held-out documents of CORPUS, component by component, as in table 4 of the Pile's paper.

No held-out text is trained on, for all three in the same way: what the corpus held out by name stays out of the raw text
too, and any passage that shares 13 words in a row with a held-out document loses them and 200 characters around them
(GPT-3, appendix C), or goes if that happens in more than ten places. Then no 13-gram is shared; that is checked again.

Text is drawn in passages of at most 16,384 characters by a hash of their names, files of the raw sources likewise. Runs
stay in OUT and go on where they were if the same command is given again; the table is also in OUT/bits_per_byte.json.

examples:
  python scripts/bench/corpus.py corpora/machine runs/corpus
      three runs of the quickstart's model on 2 MB of text each; some 15 minutes on two cores
  python scripts/bench/corpus.py corpora/machine runs/corpus-large --component manual-pages --mb 20 --seeds 2 \\
      --set model.d_model=256
      other sizes; whatever of the model is set is set for all

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
from mesh_transformer.config import ConfigError, check_table, load_config
from mesh_transformer.reports.evaluation_results import metrics_of, read_evaluations
from mesh_transformer.storage.atomic_files import replace_file

ROOT = Path(__file__).parents[2]
PASSAGE = 16_384  # characters
LARGE = 1_000_000  # bytes of a source file that is read for some of its passages, not picked as a whole
SPARE = 1.4  # so much more is drawn than is trained on, for what decontamination takes
OVERLAP = 13  # words in a row
HELD_OUT_KB = 60  # of a component, at most
CUT = "passages cut, dropped"


class Passage(NamedTuple):
    """A piece of a document."""

    component: str
    name: str
    text: str


Source = tuple[float, Passage]  # what share of its passages is drawn, and a whole document


def main(arguments: list[str]) -> int:
    """Draw the texts, train, measure, print the table."""
    options = parse(arguments)
    sheet = read_sheet(options.corpus)
    component = options.component or max(sheet["components"], key=lambda n: sheet["components"][n]["effective_bytes"])
    if component not in sheet["components"]:
        raise ConfigError(f"--component {component}: {options.corpus} has {', '.join(sheet['components'])}")
    texts = prepare_texts(options.corpus, sheet, component, options.out / "texts", options.mb)
    names = ["mixture", "raw", component]
    runs = {name: [train(options, texts, name, seed) for seed in range(options.seeds)] for name in names}
    table = make_table(runs)
    result = {"corpus": sheet["digest"], "texts": texts, "bits_per_byte": table}
    replace_file(options.out / "bits_per_byte.json", (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result, indent=2) if options.json else format_result(texts, table))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("corpus", type=Path, metavar="CORPUS", help="a folder that scripts/build_corpus.py made")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the texts, the runs and the table")
    parser.add_argument("--component", help="the one of the third run; default: the largest of the mixture")
    parser.add_argument("--mb", type=float, default=2.0, help="text to train on, MB; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each; default: %(default)s")
    parser.add_argument("--config", default=str(ROOT / "configs/quickstart.toml"), help="model; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_set_option(parser)
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.mb <= 0:
        raise ConfigError("--seeds is at least 1, and --mb more than 0")
    return options


def read_sheet(corpus: Path) -> dict[str, Any]:
    """The datasheet of a corpus that is whole."""
    if not (corpus / "manifest.json").is_file() or not (corpus / "datasheet.json").is_file():
        raise ConfigError(f"{corpus}: not a whole corpus: build it with scripts/build_corpus.py")
    return json.loads((corpus / "datasheet.json").read_text(encoding="utf-8"))


def prepare_texts(corpus: Path, sheet: dict[str, Any], component: str, folder: Path, mb: float) -> dict[str, Any]:
    """Write the texts to train on and to measure, unless they are there; what they came to, by text and component."""
    plan = {"digest": sheet["digest"], "component": component, "mb": mb, "passage": PASSAGE}
    summary = folder / "summary.json"
    if summary.is_file():
        found = json.loads(summary.read_text(encoding="utf-8"))
        if found["plan"] != plan:
            raise ConfigError(f"{folder}: holds texts of {found['plan']}, not of {plan}; name another OUT")
        return found
    # here, so that a run that goes on does without the libraries of a corpus
    from mesh_transformer.corpus.contamination import ContaminationIndex
    from mesh_transformer.corpus.recipe import DecontaminateFilter, EvaluationConfig, Recipe

    recipe = check_table(Recipe, sheet["recipe"], where=str(corpus / "datasheet.json"))
    held_out = write_held_out(corpus, folder)
    step = DecontaminateFilter(kind="decontaminate", against=("held-out",), n_gram=OVERLAP)
    index = ContaminationIndex(step, {"held-out": EvaluationConfig(path=str(folder / "held-out"))})
    components = sheet["components"]
    sizes = {name: components[name]["effective_bytes"] for name in components}
    shares = {name: SPARE * 1e6 * mb / sum(sizes.values()) * components[name]["epochs"] for name in components}
    alone = {component: SPARE * 1e6 * mb / components[component]["train_bytes"]}
    share = SPARE * 1e6 * mb / sum(entry["raw_bytes"] for entry in components.values())
    drawn = {
        "mixture": draw(built_documents(corpus, shares)),
        "raw": draw(raw_documents(recipe, share)),
        component: draw(built_documents(corpus, alone)),
    }
    trained = {
        name: write_clean(folder.absolute() / f"{name}.jsonl.zst", passages, index, int(1e6 * mb))
        for name, passages in drawn.items()
    }
    found = {"plan": plan, "held_out": held_out, "trained": trained}
    replace_file(summary, (json.dumps(found, indent=2) + "\n").encode())
    return found


def write_held_out(corpus: Path, folder: Path) -> dict[str, int]:
    """held-out/COMPONENT.jsonl, of the first documents by hash; bytes of each component that has any."""
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


def built_documents(corpus: Path, shares: dict[str, float]) -> Iterator[Source]:
    """Documents for training of the components that have a share, with it."""
    from mesh_transformer.corpus.parts import read_documents

    for path in sorted((corpus / "documents/train").glob("*.jsonl.zst")):
        for record in read_documents(path):
            if (name := record["meta"]["pile_set_name"]) not in shares:
                break  # all of a file are of one component
            yield shares[name], Passage(name, record["id"], record["text"])


def raw_documents(recipe: Any, share: float) -> Iterator[Source]:
    """Documents of the sources for training before any step: of files that a hash picks all, of large ones a share."""
    from mesh_transformer.corpus.sources import ReadStats, find_parts, read_part
    from mesh_transformer.corpus.stage_filter import split_of

    for part in find_parts(recipe)[0]:
        for file in part.files:
            is_large = file.size > LARGE
            if not is_large and not is_drawn(f"file:{file.path}", share):
                continue
            for document in read_part(part._replace(files=(file,)), recipe, ReadStats()):
                if split_of(document.name, recipe) == "train":
                    yield share if is_large else 1.0, Passage(part.component, document.name, document.text)


def is_drawn(name: str, share: float) -> bool:
    """Whether a hash of the name lies in this share of all hashes."""
    return xxhash.xxh3_64_intdigest(name.encode()) < share * 2**64


def draw(documents: Iterable[Source]) -> list[Passage]:
    """Passages of documents by the documents' shares, in the order of a hash of their names."""
    drawn = []
    for share, document in documents:
        for number, start in enumerate(range(0, len(document.text), PASSAGE)):
            name = f"{document.name}#{number}"
            if is_drawn(f"passage:{name}", share):
                drawn.append(Passage(document.component, name, document.text[start : start + PASSAGE]))
    return sorted(drawn, key=lambda passage: xxhash.xxh3_64_intdigest(f"order:{passage.name}".encode()))


def write_clean(path: Path, passages: Iterable[Passage], index: Any, size: int) -> dict[str, Any]:
    """Write `size` bytes of text that shares nothing with the held-out one; what was taken, cut and left out.

    Raises DataError if anything is shared in the end.
    """
    from datatrove.data import Document

    from mesh_transformer.corpus.parts import PartWriter
    from mesh_transformer.data.errors import DataError

    taken: Counter[str] = Counter()
    counts = {"passages": 0, "cut": 0, "cut_bytes": 0, "dropped": 0}
    with PartWriter(path) as part:
        for passage in passages:
            if part.bytes >= size:
                break
            document = Document(passage.text, passage.name)
            if index.clean(document):
                counts["dropped"] += 1
                continue
            counts["passages"] += 1
            counts["cut"] += document.text != passage.text
            counts["cut_bytes"] += len(passage.text.encode()) - len(document.text.encode())
            if (again := Document(document.text, passage.name)) and (index.clean(again) or again.text != document.text):
                raise DataError(
                    f"{passage.name}: shares {OVERLAP} words in a row with a held-out document after cutting"
                )
            part.add(document.text, passage.name, {"pile_set_name": passage.component})
            taken[passage.component] += len(document.text.encode())
    return {"path": str(path), "bytes": part.bytes, **counts, "components": dict(taken.most_common())}


def train(options: argparse.Namespace, texts: dict[str, Any], name: str, seed: int) -> dict[str, float]:
    """Train on a text in a run folder of its own, or go on; bits per byte of each component, and of all."""
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
    sizes = load_config(options.config, changes)
    steps = max(int(1e6 * options.mb / (sizes.train.batch_size * sizes.model.seq_len)), 1)
    changes += [f"train.steps={steps}", f"checkpoint.every={max(steps // 4, 1)}"]
    if steps not in read_evaluations(run):
        command = [sys.executable, str(ROOT / "device_train.py"), options.config]
        print(f"{name}, seed {seed}: {steps:,} steps in {run}", file=sys.stderr, flush=True)
        finished = subprocess.run(
            [*command, *(f"--set={change}" for change in changes)], stdout=sys.stderr, cwd=ROOT, check=False
        )
        if finished.returncode == PREEMPTED:
            raise Preempted("the same command goes on")
        if finished.returncode:
            raise ChildProcessError(f"training on {name} ended with status {finished.returncode}; see above")
    measured = metrics_of(read_evaluations(run)[steps])
    found = {component: measured[f"text:{component}.bits_per_byte"] for component in held_out}
    return found | ({"all": measured["text.bits_per_byte"]} if len(held_out) > 1 else {})


def held_out_file(folder: Path, component: str) -> Path:
    """What of a component is measured."""
    return (folder / "held-out" / f"{component}.jsonl").absolute()


def make_table(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Component -> text trained on -> mean over the seeds, and standard deviation where there are several."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for row in next(iter(runs.values()))[0]:
        rows[row] = {}
        for name, seeds in runs.items():
            values = [found[row] for found in seeds]
            rows[row][name] = {"mean": statistics.fmean(values)}
            if len(values) > 1:
                rows[row][name]["sd"] = statistics.stdev(values)
    return rows


def format_result(texts: dict[str, Any], table: dict[str, dict[str, dict[str, float]]]) -> str:
    """What was trained on, and bits per byte; the best of a row with a star."""
    names = list(texts["trained"])
    width = max(map(len, [*table, CUT])) + 2
    heading = f"{'':<{width}}" + "".join(f"{name:>24}" for name in names)
    lines = ["MB trained on, by component", heading]
    for component in [*texts["held_out"], *sorted({c for n in names for c in texts["trained"][n]["components"]})]:
        shares = [texts["trained"][name]["components"].get(component, 0) / 1e6 for name in names]
        line = f"{component:<{width}}" + "".join(f"{share:>24.3f}" for share in shares)
        if line not in lines:
            lines.append(line)
    totals = [texts["trained"][name] for name in names]
    lines.append(f"{'together':<{width}}" + "".join(f"{total['bytes'] / 1e6:>24.3f}" for total in totals))
    lines.append(f"{CUT:<{width}}" + "".join(f"{total['cut']:>18,}{total['dropped']:>6,}" for total in totals))
    lines += ["", "bits per byte of held-out text, the lowest of a row with a star", f"{heading}{'bytes':>12}"]
    for row, found in table.items():
        best = min(math.inf, *(value["mean"] for value in found.values()))
        cells = ""
        for name in names:
            mean = found[name]["mean"]
            spread = f" ± {found[name]['sd']:.4f}" if "sd" in found[name] else ""
            cell = f"{mean:.4f}{spread}{'*' if mean == best else ' '}"
            cells += f"{cell:>24}"
        size = texts["held_out"].get(row, sum(texts["held_out"].values()))
        lines.append(f"{row:<{width}}{cells}{size:>12,}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
