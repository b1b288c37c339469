# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a run, a checkpoint or a Hugging Face folder: prints the results and writes them into the run folder."""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from mesh_transformer.checkpoint.store import find_checkpoint
from mesh_transformer.evaluate.evaluation import EvalTarget, check_tasks, evaluate_model, print_evaluation
from mesh_transformer.evaluate.loglikelihood import make_scorer
from mesh_transformer.reports.console import ProgressFn
from mesh_transformer.reports.evaluation_results import Evaluation, evaluation_file, write_evaluation
from mesh_transformer.reports.html_report import write_report
from mesh_transformer.sample.loading import LoadedModel, load_model
from mesh_transformer.storage.paths import AnyPath, parse_path
from mesh_transformer.storage.resume_log import ResumeLog
from mesh_transformer.train.run_folder import CHECKPOINTS, RunFolder

PROGRESS_SECONDS = 30.0  # between lines of progress when stderr is not a terminal
TABLE_WIDTH = 160  # characters, when stdout is not a terminal


def evaluate_checkpoint(run: str, overrides: Iterable[str] = (), *, quiet: bool = False) -> Evaluation:
    """Evaluate a model and return the results.

    `run` is a run folder (its latest valid checkpoint is evaluated), a checkpoint, or a model of another format. Tables are
    printed on stdout unless `quiet`. If the checkpoint is in a run folder, the results are written there, and a repeated
    call resumes an interrupted evaluation. Raises ConfigError, CheckpointError, DataError or ScoringError.
    """
    loaded = load_model(run, overrides)
    check_tasks(loaded.config)
    print(f"{loaded.where}: step {loaded.step}", file=sys.stderr)
    scorer = make_scorer(loaded.engine, batch_tokens=loaded.config.evaluate.batch_tokens)
    target = EvalTarget(loaded.config, loaded.defaults, scorer, loaded.engine, loaded.step, loaded.where)
    run_folder = find_run_folder(parse_path(loaded.where))
    if run_folder is None:
        with show_progress() as on_progress:
            evaluation = evaluate_model(target, on_progress)
        _print_tables(evaluation, quiet=quiet)
        print(
            f"{loaded.where} is not in a run folder, so the results are not saved; --json prints them as JSON",
            file=sys.stderr,
        )
        return evaluation
    config = dataclasses.replace(loaded.config, run=dataclasses.replace(loaded.config.run, dir=str(run_folder)))
    with RunFolder(config, lambda text: print(text, file=sys.stderr)) as folder:
        partial = evaluation_file(folder.path, loaded.step).with_suffix(".partial.jsonl")
        with ResumeLog(partial, {"model": _model_digest(loaded)}) as log:
            if log.n_resumed:
                print(f"resuming an interrupted evaluation with {log.n_resumed:,} results", file=sys.stderr)
            scorer.resume_log = log
            with show_progress() as on_progress:
                evaluation = evaluate_model(target, on_progress)
            path = write_evaluation(folder.path, loaded.step, evaluation)
            log.delete()
        _print_tables(evaluation, quiet=quiet)
        write_report(folder.path)
    print(f"wrote {run_folder / path.name} and {run_folder / 'report.html'}", file=sys.stderr)
    return evaluation


def _print_tables(evaluation: Evaluation, *, quiet: bool) -> None:
    if not quiet:
        print_evaluation(evaluation, Console(width=None if sys.stdout.isatty() else TABLE_WIDTH))


def _model_digest(loaded: LoadedModel) -> str:
    """Return a digest of the weights and the configuration that results depend on."""
    manifest = find_checkpoint(loaded.where)[0].read_manifest(loaded.step)
    parts = [sorted(manifest.arrays.items()), loaded.config.model, loaded.config.serve]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@contextmanager
def show_progress() -> Iterator[ProgressFn]:
    """Show progress bars on stderr if it is a terminal; otherwise print a line every PROGRESS_SECONDS."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks = {}
        printed = time.monotonic()

        def on_progress(name: str, done: int, total: int | None) -> None:
            nonlocal printed
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done, total=total)
            if not console.is_terminal and time.monotonic() - printed >= PROGRESS_SECONDS:
                print(f"{name}: {done:,}{f' of {total:,}' if total else ''}", file=sys.stderr, flush=True)
                printed = time.monotonic()

        yield on_progress


def find_run_folder(checkpoint: AnyPath) -> AnyPath | None:
    """Return the run folder RUN of a checkpoint RUN/checkpoints/step_N or RUN/step_N; None for other folders."""
    if not checkpoint.name.startswith("step_"):
        return None
    parent = checkpoint.parent
    return parent.parent if parent.name == CHECKPOINTS else parent
