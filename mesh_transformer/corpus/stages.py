# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A stage of a build, run in parts by DataTrove's executors, here, on Ray or on Slurm, with what they lack round them.

A task makes one part: it writes its files whole and durable, and returns a record of them, which is written last. A
part with a record is done, whatever happened to the process; every other one is made again from its beginning. After a
stage every part must have its record, and every file the size that its record says, or the stage has failed: the
executors by themselves end well when a rank was lost on Ray or Slurm, and wait for ever when a local worker was killed.
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

logger.disable("datatrove")  # its log goes to the terminal, in every worker; a failed task says what is wrong itself

Task = Callable[[int], dict[str, Any]]  # number of a part -> record; "outputs": {path below the stage: size, digest}
ProgressFn = Callable[[str, int, int], None]  # name of the stage, parts done, parts in all


class CorpusError(ValueError):
    """A corpus that is not complete, and why."""


class Executor:
    """Where tasks run: in this process, in processes of this machine, or on a cluster whose nodes all see the output."""

    def __init__(self, workers: int = 1, ray: str = "", slurm: Slurm | None = None):
        self.workers, self.ray, self.slurm = workers, ray, slurm
        self._pool: ProcessPoolExecutor | None = None

    def pool(self) -> ProcessPoolExecutor:
        """Processes that end with this one; the same ones for all stages, for starting them takes seconds."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=end_with_parent)
        return self._pool

    def close(self) -> None:
        """End the processes; what they have begun they finish."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class _Part(PipelineStep):
    """DataTrove's view of a task."""

    type, name = "corpus", "part"

    def __init__(self, task: Task, folder: Path):
        super().__init__()
        self.task, self.folder = task, folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Make part `rank`; the record is the last thing written, a failure is written for who waits elsewhere."""
        failure = self.folder / "failures" / f"{rank:05d}.txt"
        try:
            with _one_thread():
                record = self.task(rank)
            _write_record(self.folder, rank, record)
            trim_memory()  # so that the peak of one part does not come on top of what another has freed
        except Exception as error:
            _note(failure, error)
            raise
        return None


@contextmanager
def _one_thread() -> Iterator[None]:
    """No threads of NumPy's and tokenizers' own: they and those of other workers would wait for one another."""
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


def _note(path: Path, error: Exception) -> None:
    try:
        path.write_text(f"{type(error).__name__}: {error}"[:2000], encoding="utf-8")
    except OSError:  # the disk is full: that no record is there says enough
        return


def _run_here(executor: LocalPipelineExecutor, machines: Executor) -> None:
    """All parts of a local executor that are not made; raises what the first failing one raised and begins no others."""
    ranks = executor.get_incomplete_ranks(range(executor.tasks))
    if machines.workers == 1 or len(ranks) < 2:
        for rank in ranks:
            executor._run_for_rank(rank, local_rank=1)
        return
    futures = [machines.pool().submit(executor._run_for_rank, rank, 1) for rank in ranks]
    try:
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    except BrokenProcessPool:
        machines.close()
        raise CorpusError(
            "a worker was killed, most likely for want of memory; lower --workers or corpus.part_mb, and build again"
        ) from None
    except BaseException:
        machines.close()
        raise


def run_stage(
    name: str, task: Task, tasks: int, folder: Path, executor: Executor, on_progress: ProgressFn = lambda name, done, total: None
) -> list[dict[str, Any]]:
    """Records of all parts of a stage, made now or before. Raises CorpusError if one is missing in the end."""
    if not tasks:
        return []
    for below in ("records", "failures", "log/completions"):
        (folder / below).mkdir(parents=True, exist_ok=True)
    for rank in range(tasks):
        if _read_record(folder, rank) is None:
            (folder / "log" / "completions" / f"{rank:05d}").unlink(missing_ok=True)
        else:  # done, but killed before DataTrove noted it
            (folder / "log" / "completions" / f"{rank:05d}").touch()
        (folder / "failures" / f"{rank:05d}.txt").unlink(missing_ok=True)
    pipeline = [_Part(task, folder)]
    with _watched(name, folder, tasks, on_progress):
        if executor.slurm:
            run_on_slurm(pipeline, tasks, folder, executor.workers, executor.slurm)
        elif executor.ray and tasks > 1:  # one part alone is not worth the way
            run_on_ray(pipeline, tasks, folder, executor.workers, executor.ray)
        else:
            executor = LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=str(folder / "log"))
            _run_here(executor, executor)
    records = [_read_record(folder, rank) for rank in range(tasks)]
    lost = [rank for rank, record in enumerate(records) if record is None]
    if lost:
        reasons = sorted({path.read_text(encoding="utf-8") for path in (folder / "failures").glob("*.txt")})
        raise CorpusError(
            f"stage {name}: {len(lost)} of {tasks} parts have no whole result ({', '.join(map(str, lost[:5]))}"
            f"{', ...' if len(lost) > 5 else ''}); {'; '.join(reasons[:3]) or 'no worker said why'}; build again to go on"
        )
    return [record for record in records if record is not None]


def reuse_parts(folder: Path, inputs: Sequence[str], before: Sequence[Path]) -> None:
    """Parts that a stage made `before`, in other folders, from the same inputs become parts of it, under their number.

    Only of stages whose files are FOLDER/PART.SUFFIX, and whose records have "inputs".
    """
    made: dict[str, tuple[Path, str, dict[str, Any]]] = {}
    for other in before:
        for path in sorted((other / "records").glob("*.json")):
            if record := _read_record(other, int(path.stem)):
                made[record.get("inputs", "")] = (other, path.stem, record)
    for rank, own in enumerate(inputs):
        if own not in made or _read_record(folder, rank) is not None:
            continue
        other, number, record = made[own]
        outputs = {}
        (folder / "records").mkdir(exist_ok=True)
        for name, output in record["outputs"].items():
            place = name.replace(f"/{number}.", f"/{rank:05d}.")
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).unlink(missing_ok=True)
            link_file(other / name, folder / place)
            outputs[place] = output
        _write_record(folder, rank, record | {"outputs": outputs})


@contextmanager
def _watched(name: str, folder: Path, tasks: int, report: ProgressFn) -> Iterator[None]:
    """Reports how many parts have their records while the block runs."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            report(name, sum(1 for _ in (folder / "records").glob("*.json")), tasks)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    report(name, tasks, tasks)


def _record_path(folder: Path, rank: int) -> Path:
    return folder / "records" / f"{rank:05d}.json"


def _write_record(folder: Path, rank: int, record: dict[str, Any]) -> None:
    replace_file(_record_path(folder, rank), json.dumps(record, ensure_ascii=False).encode())


def _read_record(folder: Path, rank: int) -> dict[str, Any] | None:
    """The record of a part, if it and every file that it names are whole."""
    path = _record_path(folder, rank)
    try:
        record = json.loads(path.read_bytes())
        sizes = {name: (folder / name).stat().st_size for name in record.get("outputs", {})}
    except FileNotFoundError:
        return None
    except ValueError:
        raise DataError(f"{path}: a record that cannot be read; remove it and build again") from None
    whole = all(sizes[name] == output["size"] for name, output in record.get("outputs", {}).items())
    return record if whole else None
