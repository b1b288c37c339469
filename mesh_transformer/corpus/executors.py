# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A stage's parts on a Ray cluster or on Slurm, by DataTrove's executors; whether all were made is for stages.py to see.

Every node must see the output folder, and the sources, under the same path. Slurm's executor submits and goes; here the
job is waited for, and cancelled if the build is stopped. A job that outlived a killed build is cancelled by the next one.
"""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.executor import SlurmPipelineExecutor

from mesh_transformer.data.errors import DataError
from mesh_transformer.storage.atomic_files import replace_file

GB_PER_TASK = 2  # that a node must have free for a part
POLL_SECONDS = 2.0


class Slurm(NamedTuple):
    """Where sbatch puts the parts."""

    partition: str
    options: dict[str, str]  # further ones of sbatch, without --: time, account, qos, mem-per-cpu


class _Job(SlurmPipelineExecutor):
    """Without DataTrove's second job, which sums up logs and would wait for ever behind a part that failed."""

    def launch_merge_stats(self) -> None:
        """Nothing: our records are the sums."""


def run_on_ray(pipeline: list[Any], tasks: int, folder: Path, workers: int, address: str) -> None:
    """At most `workers` parts at once on the cluster of this address; DataError where ray is not installed."""
    try:
        import ray
        from datatrove.executor import RayPipelineExecutor
    except ImportError:
        raise DataError("--ray needs ray: pip install 'mesh-transformer[corpus,ray]'") from None
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    RayPipelineExecutor(
        pipeline=pipeline, tasks=tasks, workers=workers, logging_dir=str(folder / "log"), mem_per_cpu_gb=GB_PER_TASK
    ).run()


def run_on_slurm(pipeline: list[Any], tasks: int, folder: Path, workers: int, slurm: Slurm) -> None:
    """A job array of at most `workers` parts at once, until it has ended; DataError if Slurm does not take it."""
    note = folder / "slurm-job"
    if note.is_file():
        _cancel(note.read_text(encoding="utf-8"))
    job = _Job(
        pipeline=pipeline,
        tasks=tasks,
        time=slurm.options.get("time", "24:00:00"),
        partition=slurm.partition,
        workers=workers,
        job_name=f"corpus-{folder.name.rpartition('-')[0]}",
        qos="",
        mem_per_cpu_gb=GB_PER_TASK,
        env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
        sbatch_args=dict(slurm.options),
        logging_dir=str(folder / "log"),
    )
    try:
        job.launch_job()
    except FileNotFoundError:
        raise DataError("--slurm: there is no sbatch here; start this on a machine that submits jobs") from None
    except subprocess.CalledProcessError as error:
        raise DataError(f"--slurm: sbatch refused with status {error.returncode}; what it said is above") from None
    if job.job_id == -1:  # nothing left to do
        return
    number = str(job.job_id)
    replace_file(note, number.encode())
    try:
        while _is_there(number):
            time.sleep(POLL_SECONDS)
    except BaseException:
        _cancel(number)
        raise
    note.unlink()


def _is_there(number: str) -> bool:
    """Whether any part of a job waits or runs. That Slurm does not answer for a while says nothing."""
    environment = os.environ | {"LC_ALL": "C"}
    command = ["squeue", "--noheader", "--jobs", number, "--format", "%T"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return "Invalid job id" not in done.stderr
    return bool(done.stdout.strip())


def _cancel(number: str) -> None:
    """End a job and wait until nothing of it runs, for its parts write the same files as the next one's."""
    subprocess.run(["scancel", number], capture_output=True, check=False)
    while _is_there(number):
        time.sleep(POLL_SECONDS)
