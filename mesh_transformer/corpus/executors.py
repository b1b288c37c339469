# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Run the parts of a stage on a Ray cluster or on Slurm with DataTrove's executors; stages.py checks completeness.

Every node must see the output folder and the sources under the same paths. DataTrove's Slurm executor only submits;
this module waits for the job, and cancels it if the build is stopped. The next build cancels a job that outlived a
killed build.
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

GB_PER_TASK = 2  # memory to reserve for a part, in gigabytes
POLL_SECONDS = 2.0


class Slurm(NamedTuple):
    """Partition and options of sbatch."""

    partition: str
    options: dict[str, str]  # without --, for example time, account, qos, mem-per-cpu


class _SlurmExecutor(SlurmPipelineExecutor):
    """Slurm executor without DataTrove's job that merges logs, which would wait forever after a failed part."""

    def launch_merge_stats(self) -> None:
        """Do nothing, because the records of the parts hold the totals."""


def run_on_ray(pipeline: list[Any], tasks: int, folder: Path, workers: int, address: str) -> None:
    """Run at most `workers` parts at once on the cluster at `address`; raise DataError if ray is not installed."""
    try:
        import ray
        from datatrove.executor import RayPipelineExecutor
    except ImportError:
        raise DataError(
            f"--ray {address} requires the package ray, which is not installed: pip install 'mesh-transformer[corpus,ray]'"
        ) from None
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    RayPipelineExecutor(
        pipeline=pipeline, tasks=tasks, workers=workers, logging_dir=str(folder / "log"), mem_per_cpu_gb=GB_PER_TASK
    ).run()


def run_on_slurm(pipeline: list[Any], tasks: int, folder: Path, workers: int, slurm: Slurm) -> None:
    """Submit a job array that runs at most `workers` parts at once, and wait for its end.

    Raises DataError if Slurm rejects the job.
    """
    job_file = folder / "slurm-job"
    if job_file.is_file():
        _cancel(job_file.read_text(encoding="utf-8"))
    executor = _SlurmExecutor(
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
        executor.launch_job()
    except FileNotFoundError:
        raise DataError(
            f"--slurm {slurm.partition}: sbatch is not installed; run this command on a machine that can submit jobs"
        ) from None
    except subprocess.CalledProcessError as error:
        raise DataError(
            f"--slurm {slurm.partition}: sbatch failed with status {error.returncode}; see its output above, and correct --slurm "
            "or --slurm-option"
        ) from None
    if executor.job_id == -1:  # all parts are complete
        return
    job_id = str(executor.job_id)
    replace_file(job_file, job_id.encode())
    try:
        while _is_queued(job_id):
            time.sleep(POLL_SECONDS)
    except BaseException:
        _cancel(job_id)
        raise
    job_file.unlink()


def _is_queued(job_id: str) -> bool:
    """Return whether any part of a job is waiting or running; True also while Slurm does not respond."""
    environment = os.environ | {"LC_ALL": "C"}
    command = ["squeue", "--noheader", "--jobs", job_id, "--format", "%T"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        return "Invalid job id" not in result.stderr
    return bool(result.stdout.strip())


def _cancel(job_id: str) -> None:
    """Cancel a job and wait until it has ended, since the next job writes the same files."""
    subprocess.run(["scancel", job_id], capture_output=True, check=False)
    while _is_queued(job_id):
        time.sleep(POLL_SECONDS)
