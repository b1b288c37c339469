# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Run a stage of a build in parts with DataTrove's executors: on this machine, on Ray or on Slurm, with completeness checks.

A task makes one part: it writes complete, durable files and returns a record of them, which is written last. A part
with a record is done, even if the process was killed afterwards; every other part is made again from its beginning. After a
stage every part must have its record, and every file must have the size in the record; otherwise the stage has failed.
DataTrove's executors report success when a rank was lost on Ray or Slurm, and wait forever when a local worker was killed.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from threadpoolctl import threadpool_limits

from mesh_transformer.corpus.executors import Slurm, run_on_ray, run_on_slurm
from mesh_transformer.data.errors import DataError
from mesh_transformer.data.shard_builder import end_with_parent
from mesh_transformer.host_memory import trim_memory
from mesh_transformer.storage.atomic_files import link_file, replace_file

logger.disable("datatrove")  # every worker would log to the terminal; a failed task reports its own error

Task = Callable[
    [int], dict[str, Any]
]  # number of a part -> record; its "outputs": {path in the stage folder: size, digest}
ProgressFn = Callable[[str, int, int], None]  # name of the stage, number of completed parts, number of all parts

RENAMED_RECORD_KEYS = {"steps": "filters"}  # records of version 1.0 -> current names


class CorpusError(ValueError):
    """Incomplete or unusable corpus; the message states the reason and how to continue."""


def ignore_progress(name: str, done: int, total: int) -> None:
    """Ignore progress: the default of `on_progress`."""


class Executor:
    """Runs tasks in this process, in processes of this machine, or on a cluster whose nodes share the output folder."""

    def __init__(self, workers: int = 1, ray: str = "", slurm: Slurm | None = None):
        self.workers = workers
        self.ray = ray
        self.slurm = slurm
        self._pool: ProcessPoolExecutor | None = None

    def pool(self) -> ProcessPoolExecutor:
        """Return worker processes that end with this process. All stages reuse them, because starting them takes seconds."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=end_with_parent)
        return self._pool

    def close(self) -> None:
        """Stop the worker processes after the tasks that are running."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class _Part(PipelineStep):
    """DataTrove pipeline step that makes one part by a task."""

    type, name = "corpus", "part"

    def __init__(self, task: Task, folder: Path):
        super().__init__()
        self.task = task
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Make part `rank`. The record is written last; an error is also written to a file for remote callers."""
        failure = self.folder / "failures" / f"{rank:05d}.txt"
        try:
            with _one_thread():
                record = self.task(rank)
            _write_record(self.folder, rank, record)
            trim_memory()  # otherwise memory freed by one part would add to the peak of the next
        except Exception as error:
            _write_failure(failure, error)
            raise
        return None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Disable the threads of NumPy and tokenizers, which would compete with the threads of other workers."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        with threadpool_limits(1):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _write_failure(path: Path, error: Exception) -> None:
    try:
        path.write_text(f"{type(error).__name__}: {error}"[:2000], encoding="utf-8")
    except OSError:  # such as a full disk: the missing record still marks the part as incomplete
        return


def _run_locally(pipeline_executor: LocalPipelineExecutor, executor: Executor) -> None:
    """Make all missing parts of a local pipeline; after the first failure, raise its error and start no further part."""
    ranks = pipeline_executor.get_incomplete_ranks(range(pipeline_executor.tasks))
    if executor.workers == 1 or len(ranks) < 2:
        for rank in ranks:
            pipeline_executor._run_for_rank(rank, local_rank=1)
        return
    futures = [executor.pool().submit(pipeline_executor._run_for_rank, rank, 1) for rank in ranks]
    try:
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    except BrokenProcessPool:
        executor.close()
        raise CorpusError(
            f"one of {executor.workers} workers was killed, most likely because memory ran out; lower --workers or corpus.part_mb, "
            "and build again"
        ) from None
    except BaseException:
        executor.close()
        raise


def run_stage(
    name: str, task: Task, tasks: int, folder: Path, executor: Executor, on_progress: ProgressFn = ignore_progress
) -> list[dict[str, Any]]:
    """Make the missing parts of a stage and return the records of all parts.

    Raises CorpusError if a part could not be made.
    """
    if not tasks:
        return []
    for subfolder in ("records", "failures", "log/completions"):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    for rank in range(tasks):
        if _read_record(folder, rank) is None:
            (folder / "log" / "completions" / f"{rank:05d}").unlink(missing_ok=True)
        else:  # complete, but DataTrove may not have marked it: the process may have been killed
            (folder / "log" / "completions" / f"{rank:05d}").touch()
        (folder / "failures" / f"{rank:05d}.txt").unlink(missing_ok=True)
    pipeline = [_Part(task, folder)]
    with _monitored(name, folder, tasks, on_progress):
        if executor.slurm:
            run_on_slurm(pipeline, tasks, folder, executor.workers, executor.slurm)
        elif executor.ray and tasks > 1:  # a single part is faster on this machine
            run_on_ray(pipeline, tasks, folder, executor.workers, executor.ray)
        else:
            _run_locally(
                LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=str(folder / "log")),
                executor,
            )
    records = [_read_record(folder, rank) for rank in range(tasks)]
    lost = [rank for rank, record in enumerate(records) if record is None]
    if lost:
        reasons = sorted({path.read_text(encoding="utf-8") for path in (folder / "failures").glob("*.txt")})
        raise CorpusError(
            f"stage {name}: {len(lost)} of {tasks} parts are incomplete ({', '.join(map(str, lost[:5]))}"
            f"{', ...' if len(lost) > 5 else ''}); {'; '.join(reasons[:3]) or 'no worker reported an error'}; "
            "build again to resume"
        )
    return [record for record in records if record is not None]


def reuse_parts(folder: Path, inputs: Sequence[str], earlier: Sequence[Path]) -> None:
    """Link parts of `earlier` folders that the stage made from the same inputs into `folder`, under their new part numbers.

    This works only for stages whose files are FOLDER/PART.SUFFIX, and whose records have "inputs".
    """
    made: dict[str, tuple[Path, str, dict[str, Any]]] = {}
    for other in earlier:
        for path in sorted((other / "records").glob("*.json")):
            if record := _read_record(other, int(path.stem)):
                made[record.get("inputs", "")] = (other, path.stem, record)
    for rank, part_inputs in enumerate(inputs):
        if part_inputs not in made or _read_record(folder, rank) is not None:
            continue
        other, old_number, record = made[part_inputs]
        outputs = {}
        (folder / "records").mkdir(exist_ok=True)
        for name, output in record["outputs"].items():
            new_name = name.replace(f"/{old_number}.", f"/{rank:05d}.")
            (folder / new_name).parent.mkdir(parents=True, exist_ok=True)
            (folder / new_name).unlink(missing_ok=True)
            link_file(other / name, folder / new_name)
            outputs[new_name] = output
        _write_record(folder, rank, record | {"outputs": outputs})


@contextmanager
def _monitored(name: str, folder: Path, tasks: int, on_progress: ProgressFn) -> Iterator[None]:
    """Report the number of complete parts while the block runs."""
    ended = threading.Event()

    def monitor() -> None:
        while not ended.wait(0.2):
            on_progress(name, sum(1 for _ in (folder / "records").glob("*.json")), tasks)

    thread = threading.Thread(target=monitor, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    on_progress(name, tasks, tasks)


def _record_path(folder: Path, rank: int) -> Path:
    return folder / "records" / f"{rank:05d}.json"


def _write_record(folder: Path, rank: int, record: dict[str, Any]) -> None:
    replace_file(_record_path(folder, rank), json.dumps(record, ensure_ascii=False).encode())


def _read_record(folder: Path, rank: int) -> dict[str, Any] | None:
    """Return the record of a part, or None if the record, or a file that it names, is missing or incomplete."""
    path = _record_path(folder, rank)
    try:
        record = json.loads(path.read_bytes())
        sizes = {name: (folder / name).stat().st_size for name in record.get("outputs", {})}
    except FileNotFoundError:
        return None
    except ValueError:
        raise DataError(f"{path}: invalid JSON in the record of a part; remove the file and build again") from None
    if any(sizes[name] != output["size"] for name, output in record.get("outputs", {}).items()):
        return None
    return {RENAMED_RECORD_KEYS.get(str(key), str(key)): value for key, value in record.items()}
