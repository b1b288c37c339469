# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Build a corpus from a recipe: filter, deduplicate, mix and tokenize source files, and document the result.

If the build was interrupted, run the same command again to resume. After a change of the recipe, only the stages that
depend on the change run again. The output folder contains documents/ (text by split and component), tokens/ (shards for
device_train.py), work/ (results of the stages, and the dropped documents), datasheet.html and .json, and manifest.json with
the digests of all files, which exists only if the corpus is complete.

examples:
  python scripts/build_corpus.py configs/corpus/machine.toml corpora/machine
      a small Pile from the files of a Debian installation
  python scripts/build_corpus.py mine.toml corpora/mine --ray auto --workers 64 --set tokens.tokenizer='"tokenizer.json"'
      on a Ray cluster whose nodes share corpora/mine
  python scripts/build_corpus.py mine.toml corpora/mine --slurm cpu --workers 64 --slurm-option account=us
      on Slurm, from a machine that can submit jobs; each stage is a job array
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mesh_transformer.cli import add_set_option, make_parser, run_command
from mesh_transformer.config import ConfigError

if TYPE_CHECKING:
    from mesh_transformer.corpus.build import Corpus


def main(arguments: list[str]) -> int:
    """Build a corpus, write its datasheet and print a summary."""
    options = parse(arguments)
    from mesh_transformer.corpus.build import build_corpus  # imported late so that a missing library is a short error
    from mesh_transformer.corpus.datasheet.content import write_datasheet
    from mesh_transformer.corpus.executors import Slurm
    from mesh_transformer.corpus.recipe import load_recipe
    from mesh_transformer.corpus.stages import Executor

    recipe = load_recipe(options.corpus, options.set)
    started = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars: dict[str, TaskID] = {}

        def on_progress(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done, total=total)

        pairs = dict(one.split("=", 1) for one in options.slurm_option)
        slurm = Slurm(options.slurm, pairs) if options.slurm else None
        corpus = build_corpus(recipe, options.out, Executor(options.workers, options.ray, slurm), on_progress)
    seconds = time.perf_counter() - started
    write_datasheet(corpus, options.out)
    print(describe(corpus, options.out, seconds))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("corpus", type=Path, metavar="CORPUS.toml", help="recipe, as in configs/corpus")
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder; an interrupted build in it is resumed")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="number of parallel workers; default: %(default)s"
    )
    parser.add_argument("--ray", default="", metavar="ADDRESS", help="run on a Ray cluster: host:port, or auto")
    parser.add_argument("--slurm", default="", metavar="PARTITION", help="run on a Slurm partition")
    parser.add_argument(
        "--slurm-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of sbatch, without --; repeatable",
    )
    add_set_option(parser)
    options = parser.parse_args(arguments)
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: must be at least 1")
    if options.ray and options.slurm:
        raise ConfigError(f"--ray {options.ray} and --slurm {options.slurm} exclude each other; pass one of them")
    if wrong := [one for one in options.slurm_option if "=" not in one or one.startswith("-")]:
        raise ConfigError(f"--slurm-option {wrong[0]!r}: expected KEY=VALUE, for example account=us")
    return options


def describe(corpus: "Corpus", out: Path, seconds: float) -> str:
    """Return the summary: input and output sizes, speed and digest."""
    raw = sum(record["raw"]["bytes"] for record in corpus.filtered)
    train = sum(record["splits"]["train"]["bytes"] for record in corpus.selected)
    tokens = sum(record["train"]["copied_tokens"] for record in corpus.tokenized)
    lines = [
        f"component {name}: no files, skipped; origin: {corpus.recipe.components[name].origin or 'not given'}"
        for name in corpus.missing
    ]
    lines += [
        f"{out}: {raw / 1e6:.1f} MB of raw text, {train / 1e6:.1f} MB for training, {tokens:,} tokens in the mixture",
        f"{seconds:.1f} s, {raw / seconds / 1e6:.2f} MB/s of raw text (including parts reused from earlier builds)",
        f"digest {corpus.manifest['digest']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
