# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Build a corpus: sources to filtered, deduplicated, mixed, tokenised and documented text, as one file says.

Killed, the same command goes on; run again after a change of the file, only what depends on it is made anew. OUT gets
documents/ (text by side and component), tokens/ (shards for device_train.py), dropped/ (what was left out, and why),
datasheet.html and .json, and manifest.json, the digest of everything, which is there only if the corpus is whole.

examples:
  python scripts/build_corpus.py configs/corpus/machine.toml corpora/machine
      a small Pile from what a Debian machine has
  python scripts/build_corpus.py mine.toml corpora/mine --ray auto --workers 64 --set tokens.tokenizer='"tokenizer.json"'
      on a Ray cluster whose nodes all see corpora/mine
  python scripts/build_corpus.py mine.toml corpora/mine --slurm cpu --workers 64 --slurm-option account=us
      on Slurm, from a machine that submits jobs; parts of each stage are a job array
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mesh_transformer.cli import add_set_option, make_parser, run_command
from mesh_transformer.config import ConfigError

if TYPE_CHECKING:
    from mesh_transformer.corpus.build import Corpus


def main(arguments: list[str]) -> int:
    """Build, document, and say what came out."""
    options = parse(arguments)
    from mesh_transformer.corpus.build import build_corpus  # here, so that missing libraries are said in one line
    from mesh_transformer.corpus.datasheet.content import write_datasheet
    from mesh_transformer.corpus.executors import Slurm
    from mesh_transformer.corpus.recipe import load_recipe
    from mesh_transformer.corpus.stages import Executor

    recipe = load_recipe(options.corpus, options.set)
    started = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        rows: dict[str, int] = {}

        def report(name: str, done: int, total: int) -> None:
            if name not in rows:
                rows[name] = int(progress.add_task(name, total=total))
            progress.update(
                next(task for task in progress.task_ids if int(task) == rows[name]), completed=done, total=total
            )

        pairs = dict(one.split("=", 1) for one in options.slurm_option)
        slurm = Slurm(options.slurm, pairs) if options.slurm else None
        corpus = build_corpus(recipe, options.out, Executor(options.workers, options.ray, slurm), report)
    seconds = time.perf_counter() - started
    write_datasheet(corpus, options.out)
    print(describe(corpus, options.out, seconds))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("corpus", type=Path, metavar="CORPUS.toml", help="the recipe, see configs/corpus")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the corpus, and of what a stop leaves")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="parts at once; default: %(default)s")
    parser.add_argument("--ray", default="", metavar="ADDRESS", help="a Ray cluster: host:port, or auto")
    parser.add_argument("--slurm", default="", metavar="PARTITION", help="a partition of Slurm")
    parser.add_argument(
        "--slurm-option", action="append", default=[], metavar="KEY=VALUE", help="of sbatch, without --; repeatable"
    )
    add_set_option(parser)
    options = parser.parse_args(arguments)
    if options.workers < 1:
        raise ConfigError("--workers is at least 1")
    if options.ray and options.slurm:
        raise ConfigError("--ray and --slurm: one of them")
    if wrong := [one for one in options.slurm_option if "=" not in one or one.startswith("-")]:
        raise ConfigError(f"--slurm-option {wrong[0]!r}: KEY=VALUE, for example account=us")
    return options


def describe(corpus: "Corpus", out: Path, seconds: float) -> str:
    """A few lines: what went in, what came out, how fast, and its digest."""
    raw = sum(record["raw"]["bytes"] for record in corpus.filtered)
    train = sum(record["sides"]["train"]["bytes"] for record in corpus.selected)
    tokens = sum(record["train"]["copied_tokens"] for record in corpus.tokenized)
    lines = [
        f"component {name}: no files, left out: {corpus.recipe.components[name].origin}" for name in corpus.missing
    ]
    lines += [
        f"{out}: {raw / 1e6:.1f} MB of raw text, {train / 1e6:.1f} MB for training, {tokens:,} tokens in the mixture",
        f"{seconds:.1f} s, {raw / seconds / 1e6:.2f} MB/s of raw text (parts made before count as if made now)",
        f"digest {corpus.manifest['digest']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
