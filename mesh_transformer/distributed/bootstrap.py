# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Start-up of a multi-process run: detect the coordinator and the process index, connect, and disconnect together.

Every host of a run starts the same command, and `join_processes` connects the processes. A process takes its
configuration from the first of these sources that is present:

    [mesh] coordinator, processes, process_id    in the file or by --set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    in the environment
    Slurm, Open MPI, Cloud TPU on Kubernetes     in their environment variables, which jax.distributed reads
    mesh.processes = "auto"                      jax.distributed detects the cluster (Cloud TPU VMs)

Without any of these, the run has one process. watchdog.py ends the run if a process is lost.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from mesh_transformer.cli import Preempted
from mesh_transformer.config import ConfigError, MeshConfig
from mesh_transformer.distributed import coordination
from mesh_transformer.distributed.watchdog import Watchdog

VARIABLES = {  # field of [mesh] -> environment variable
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
START_SECONDS = 300  # time limit for all processes to connect


class ProcessConfig(NamedTuple):
    """Arguments of jax.distributed.initialize; None for a value that JAX detects."""

    coordinator: str | None
    processes: int | None
    process_id: int | None


def detect_process(config: MeshConfig, environment: Mapping[str, str]) -> ProcessConfig | None:
    """Return this process's configuration by the rules of this module; None for a run of one process. Raises ConfigError."""
    coordinator = config.coordinator or environment.get(VARIABLES["coordinator"], "")
    processes = config.processes or _read_number(environment, VARIABLES["processes"])
    process_id = (
        config.process_id if config.process_id is not None else _read_number(environment, VARIABLES["process_id"])
    )
    if processes == 1:
        return None
    if isinstance(processes, int):
        missing = [
            name for name, value in (("coordinator", coordinator), ("process_id", process_id)) if value in ("", None)
        ]
        if missing:
            raise ConfigError(
                f"{_origin(config, 'processes')} = {processes}, but mesh.{missing[0]} is not set; set mesh.{missing[0]}, or "
                f"the environment variable {VARIABLES[missing[0]]}"
            )
        if not re.fullmatch(r".+:[0-9]{1,5}", coordinator):
            raise ConfigError(
                f'{_origin(config, "coordinator")} = "{coordinator}": expected HOST:PORT of process 0, for example '
                '"10.0.0.1:1234"'
            )
        if process_id is not None and process_id >= processes:
            raise ConfigError(
                f"{_origin(config, 'process_id')} = {process_id} must be less than {_origin(config, 'processes')} = "
                f"{processes}; number the processes from 0"
            )
        return ProcessConfig(coordinator, processes, process_id)
    if processes == "auto" or _has_cluster_launcher(environment):
        return ProcessConfig(coordinator or None, None, process_id)
    if coordinator or process_id is not None:
        name, value = ("coordinator", f'"{coordinator}"') if coordinator else ("process_id", process_id)
        raise ConfigError(
            f"{_origin(config, name)} = {value}, but the number of processes is not set; set mesh.processes, or the "
            f"environment variable {VARIABLES['processes']}"
        )
    return None


def _origin(config: MeshConfig, field: str) -> str:
    """Return the key of the configuration or the environment variable that gave the value of a field."""
    return VARIABLES[field] if getattr(config, field) in ("", None) else f"mesh.{field}"


def _read_number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if text and not text.isdigit():
        raise ConfigError(f"the environment variable {name} is {text!r}, but must be a number; correct or unset it")
    return int(text) if text else None


def _has_cluster_launcher(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher that JAX supports started this process as one of several."""
    slurm = "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    mpi = int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    return slurm or mpi or "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1


@contextlib.contextmanager
def join_processes(config: MeshConfig) -> Iterator[None]:
    """Connect to the other processes of the run, if any, and disconnect together at exit; enter before other JAX work.

    An error inside the context also ends the other processes, which print the error. Raises ConfigError, and RuntimeError
    if the processes cannot connect.
    """
    process = detect_process(config, os.environ)
    if process is None:
        yield
        return
    if config.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
    # JAX's preemption service would replace the SIGTERM handler of distributed/stop.py.
    jax.config.update("jax_enable_preemption_service", False)
    _initialize(process, config.heartbeat_seconds)
    watchdog = Watchdog(config.heartbeat_seconds)
    try:
        yield
        watchdog.leave()
    except BaseException as error:
        if isinstance(error, Preempted) and coordination.stop_consensus().agreed:
            watchdog.leave()
        else:
            watchdog.fail(error)
        raise


def _initialize(process: ProcessConfig, heartbeat_seconds: float) -> None:
    address = process.coordinator or "the address that jax.distributed detected"
    name = "this process" if process.process_id is None else f"process {process.process_id} of {process.processes}"
    try:
        # JAX's own heartbeat ends processes without our error message, so its timeout is longer than the watchdog's.
        jax.distributed.initialize(
            process.coordinator,
            process.processes,
            process.process_id,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=max(100, round(3 * heartbeat_seconds)),
        )
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"{name} could not connect to the coordinator at {address} within {START_SECONDS} s ({error}); check that all "
            "processes are running and that their machines can reach this address"
        ) from error
