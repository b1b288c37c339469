# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Run the parts of a stage on a Ray cluster or on Slurm by DataTrove's executors; stages.py checks completeness.

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

GB_PER_TASK = 2  # memory to reserve for a part
POLL_SECONDS = 2.0


class Slurm(NamedTuple):
    """Partition and options of sbatch."""

    partition: str
    options: dict[str, str]  # without --, for example time, account, qos, mem-per-cpu


class _Job(SlurmPipelineExecutor):
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
    """Submit a job array of at most `workers` parts at once and wait for its end; raise DataError if it is rejected."""
    job_file = folder / "slurm-job"
    if job_file.is_file():
        _cancel(job_file.read_text(encoding="utf-8"))
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
        raise DataError(
            f"--slurm {slurm.partition}: sbatch is not installed; run this command on a machine that can submit jobs"
        ) from None
    except subprocess.CalledProcessError as error:
        raise DataError(
            f"--slurm {slurm.partition}: sbatch failed with status {error.returncode}; see its output above, and correct --slurm "
            "or --slurm-option"
        ) from None
    if job.job_id == -1:  # all parts are complete
        return
    number = str(job.job_id)
    replace_file(job_file, number.encode())
    try:
        while _is_queued(number):
            time.sleep(POLL_SECONDS)
    except BaseException:
        _cancel(number)
        raise
    job_file.unlink()


def _is_queued(number: str) -> bool:
    """Return whether any part of a job is waiting or running; also True while Slurm does not respond."""
    environment = os.environ | {"LC_ALL": "C"}
    command = ["squeue", "--noheader", "--jobs", number, "--format", "%T"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return "Invalid job id" not in done.stderr
    return bool(done.stdout.strip())


def _cancel(number: str) -> None:
    """Cancel a job and wait until it has ended, since the next job writes the same files."""
    subprocess.run(["scancel", number], capture_output=True, check=False)
    while _is_queued(number):
        time.sleep(POLL_SECONDS)
