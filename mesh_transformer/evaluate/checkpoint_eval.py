# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A run, a checkpoint or a model folder of Hugging Face -> its results: printed, and kept in the run folder."""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from mesh_transformer.checkpoint.store import find_checkpoint
from mesh_transformer.config import ConfigError
from mesh_transformer.convert.huggingface.reader import is_huggingface, open_huggingface
from mesh_transformer.convert.lazy_arrays import LazyArray
from mesh_transformer.data.tokenizers import load_tokenizer
from mesh_transformer.evaluate.evaluation import ProgressFn, EvalTarget, check_tasks, evaluate_model, print_evaluation
from mesh_transformer.storage.resume_log import ResumeLog
from mesh_transformer.evaluate.loglikelihood import make_scorer
from mesh_transformer.mesh import init_devices
from mesh_transformer.model.params import Params
from mesh_transformer.reports.evaluation_results import Evaluation, evaluation_file, write_evaluation
from mesh_transformer.reports.html_report import write_report
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.engine import EngineOptions
from mesh_transformer.sample.loading import LoadedModel, describe_arrays, load_model, read_model_config
from mesh_transformer.storage.paths import AnyPath, parse_path
from mesh_transformer.train.run_folder import CHECKPOINTS, RunFolder

TELL_SECONDS = 30.0  # between lines of progress where nobody sees a terminal
WIDTH = 160  # of tables where nobody sees a terminal


def evaluate_checkpoint(run: str, overrides: Iterable[str] = (), *, quiet: bool = False) -> Evaluation:
    """Measure the newest intact checkpoint of `run`, or `run` itself; tables on stdout unless `quiet`, progress on stderr.

    Killed, the same call goes on where it was, if there is a run folder. Raises ConfigError and CheckpointError as
    opening a model does, and what `measure` raises.
    """
    trained = open_model(run, overrides)
    check_tasks(trained.config)
    print(f"{trained.where}: step {trained.step}", file=sys.stderr)
    scorer = make_scorer(trained.engine, batch_tokens=trained.config.evaluate.batch_tokens)
    subject = EvalTarget(trained.config, trained.tokenizer, scorer, trained.engine, trained.step, trained.where)
    place = find_run_folder(parse_path(trained.where))
    if place is None:
        with show_progress() as report:
            evaluation = evaluate_model(subject, report)
        _show(evaluation, quiet=quiet)
        print("no run folder, so the results are not kept; --json prints them as a program reads them", file=sys.stderr)
        return evaluation
    config = dataclasses.replace(trained.config, run=dataclasses.replace(trained.config.run, dir=str(place)))
    with RunFolder(config, lambda text: print(text, file=sys.stderr)) as folder:
        partial = evaluation_file(folder.path, trained.step).with_suffix(".partial.jsonl")
        with ResumeLog(partial, _identify(trained)) as journal:
            if journal.n_resumed:
                print(f"going on with {journal.n_resumed:,} answers of an evaluation that was stopped", file=sys.stderr)
            scorer.resume_log = journal
            with show_progress() as report:
                evaluation = evaluate_model(subject, report)
            path = write_evaluation(folder.path, trained.step, evaluation)
            journal.finish()
        _show(evaluation, quiet=quiet)
        write_report(folder.path)
    print(f"kept in {place / path.name}, and shown on {place / 'report.html'}", file=sys.stderr)
    return evaluation


def _show(evaluation: Evaluation, *, quiet: bool) -> None:
    if not quiet:
        print_evaluation(evaluation, Console(width=None if sys.stdout.isatty() else WIDTH))


def _identify(trained: LoadedModel) -> str:
    """A digest of all that answers depend on besides what is asked: the weights, and how they are computed with."""
    manifest = find_checkpoint(trained.where)[0].read_manifest(trained.step)
    parts = [sorted(manifest.arrays.items()), trained.config.model, trained.config.serve]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def open_model(path: str, overrides: Iterable[str] = ()) -> LoadedModel:
    """As load_trained, and also a model folder of Hugging Face, whose weights stay as they are."""
    place = parse_path(path)
    if not is_huggingface(place):
        return load_model(path, overrides)
    foreign, where = open_huggingface(place), str(place)
    config = read_model_config({"config": {"model": foreign.model}}, where, overrides)
    if foreign.tokenizer is None:
        raise ConfigError(f"{where}: no tokenizer in the folder; add its tokenizer.json, or vocab.json and merges.txt")
    layout = init_devices(config.mesh)
    params: Params = {}
    for name, like in describe_arrays(config, layout, {}, stacked=True).items():
        module, _, leaf = name.removeprefix("params/").rpartition("/")
        params.setdefault(module, {})[leaf] = _read(foreign.arrays[name].array, like)
    serve = config.serve
    options = EngineOptions(
        slots=serve.slots, weight_dtype=serve.weight_dtype, kv_cache_dtype=serve.kv_cache_dtype
    )
    engine = DecoderOnlyEngine(config.model, params, options, layout=layout)
    return LoadedModel(engine, load_tokenizer(foreign.tokenizer), config, 0, where)


def _read(array: LazyArray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The values, each device's own; in the type in which they are saved."""

    def read(index: tuple[slice, ...] | None):
        assert index is not None, "it is of a device of this process"
        return array.read(tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, like.shape, strict=True)))

    assert like.sharding is not None
    return jax.make_array_from_callback(like.shape, like.sharding, read)


@contextmanager
def show_progress() -> Iterator[ProgressFn]:
    """Bars on stderr where a person looks, else a line now and then."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks = {}
        told = time.monotonic()

        def report(what: str, done: int, total: int | None) -> None:
            nonlocal told
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)
            if not console.is_terminal and time.monotonic() - told >= TELL_SECONDS:
                print(f"{what}: {done:,}{f' of {total:,}' if total else ''}", file=sys.stderr, flush=True)
                told = time.monotonic()

        yield report


def find_run_folder(checkpoint: AnyPath) -> AnyPath | None:
    """The run folder that a step's folder is in: of RUN/checkpoints/step_N RUN, of RUN/step_N RUN; None for other folders."""
    if not checkpoint.name.startswith("step_"):
        return None
    parent = checkpoint.parent
    return parent.parent if parent.name == CHECKPOINTS else parent
