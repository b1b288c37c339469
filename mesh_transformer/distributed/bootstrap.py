# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The processes of one run: how many there are, how they meet, who watches whom, and how all end when one is lost.

Each host of a run starts the same command; `join_processes` has them meet. How a process learns its part, in this order:

    [mesh] coordinator, processes, process_id    in the file or by --set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    in the environment
    Slurm, Open MPI, Cloud TPU on Kubernetes     by their own variables, as jax.distributed reads them
    mesh.processes = "auto"                      jax.distributed finds out (Cloud TPU VMs)

and else it is alone. A process that is gone stops the others, because a collective without it never ends: every process
says once a tick that it lives and looks whether the others do. One that is silent for mesh.heartbeat_seconds counts as
lost, and one that fails says so itself; the others then name it and exit with status 1.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax

from mesh_transformer.cli import FAILED, PREEMPTED, Preempted
from mesh_transformer.config import ConfigError, MeshConfig
from mesh_transformer.distributed import coordination

START_SECONDS = 300  # for which a process waits for the others to start
TICKS = 30  # in mesh.heartbeat_seconds, at most one a quarter of a second
LEAVE_SECONDS = 10.0  # a failed process may take to say why, before it is ended
AGAIN = "run the same command again in all processes to go on from the newest checkpoint"


class Part(NamedTuple):
    """What jax.distributed.initialize is told; None: it finds out."""

    coordinator: str | None
    processes: int | None
    process_id: int | None


def find_part(config: MeshConfig, environment: Mapping[str, str]) -> Part | None:
    """This process's part in a run of several, by the rules of this module; None if it is alone. Raises ConfigError."""
    coordinator = config.coordinator or environment.get("JAX_COORDINATOR_ADDRESS", "")
    processes = config.processes or _read_number(environment, "JAX_NUM_PROCESSES")
    process_id = config.process_id if config.process_id is not None else _read_number(environment, "JAX_PROCESS_ID")
    if processes == 1:
        return None
    if isinstance(processes, int):
        missing = [
            name for name, value in (("coordinator", coordinator), ("process_id", process_id)) if value in ("", None)
        ]
        if missing:
            raise ConfigError(
                f"mesh.processes = {processes} needs mesh.{missing[0]} too (--set mesh.{missing[0]}=..., or "
                f"JAX_{'COORDINATOR_ADDRESS' if missing[0] == 'coordinator' else 'PROCESS_ID'})"
            )
        if not re.fullmatch(r".+:[0-9]{1,5}", coordinator):
            raise ConfigError(f'mesh.coordinator = "{coordinator}" must be HOST:PORT of process 0')
        if process_id is not None and process_id >= processes:
            raise ConfigError(f"mesh.process_id = {process_id} must be below mesh.processes = {processes}")
        return Part(coordinator, processes, process_id)
    if processes == "auto" or _launched_with_others(environment):
        return Part(coordinator or None, None, process_id)
    if coordinator or process_id is not None:
        raise ConfigError("mesh.coordinator and mesh.process_id need mesh.processes too, the number of processes")
    return None


def _read_number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if text and not text.isdigit():
        raise ConfigError(f"{name}={text} in the environment must be a number")
    return int(text) if text else None


def _launched_with_others(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX can question started this process as one of several."""
    slurm = "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    mpi = int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    return slurm or mpi or "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1


@contextlib.contextmanager
def join_processes(config: MeshConfig) -> Iterator[None]:
    """Meet the other processes of the run, if there are any; before any other JAX work. All leave together.

    An error inside ends the others too, which print it. Raises ConfigError, and RuntimeError if they do not come.
    """
    part = find_part(config, os.environ)
    if part is None:
        yield
        return
    if config.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from distributed/stop.py
    _initialize(part, config.heartbeat_seconds)
    watch = Watch(config.heartbeat_seconds)
    try:
        yield
        watch.leave()
    except BaseException as error:
        if isinstance(error, Preempted) and coordination.common_stop().agreed:
            watch.leave()
        else:
            watch.fail(error)
        raise


def _initialize(part: Part, heartbeat_seconds: float) -> None:
    where = part.coordinator or "the address that jax.distributed found"
    try:
        # JAX's own heartbeat ends processes without a word of ours, so it is the more patient one.
        jax.distributed.initialize(
            part.coordinator,
            part.processes,
            part.process_id,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=max(100, round(3 * heartbeat_seconds)),
        )
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"process {part.process_id} of {part.processes} did not meet the others at {where} within {START_SECONDS} s; "
            f"all must be started, and reach that address: {error}"
        ) from error


class Watch:
    """This process's sign of life and its eye on the others', in a thread."""

    def __init__(self, heartbeat_seconds: float):
        self.heartbeat_seconds = heartbeat_seconds
        self._tick_seconds = max(heartbeat_seconds / TICKS, 0.25, coordination.process_count() / 500)
        self._me, self._count = coordination.process_index(), coordination.process_count()
        self._who = f"{socket.gethostname()}, pid {os.getpid()}"
        self._ended, self._failing = threading.Event(), threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}  # last sign of life of each process, and when it was new here
        self._started = time.monotonic()
        _on_abort(
            lambda: f"{self._stops()}{self._describe(0)}, which all others need, is gone or cannot be reached; {AGAIN}"
        )
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """After all have come here; ends the watch."""
        coordination.gather("leave", "")
        self._ended.set()
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> None:
        """Tell the others of an error of this process; if it may well be because of another, wait for the verdict first."""
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._thread.join(self.heartbeat_seconds + LEAVE_SECONDS)  # the thread ends the process if one is lost
        self._failing.set()
        words = str(error).strip().partition("\n")[0]
        coordination.publish(f"failed/{self._me}", f"{type(error).__name__}: {words}")
        if self._me == 0:  # with which everybody's means to hear of it would go
            time.sleep(2 * self._tick_seconds)
        # What else runs here may wait for the others for ever.
        timer = threading.Timer(LEAVE_SECONDS, os._exit, (FAILED,))
        timer.daemon = True
        timer.start()

    def _run(self) -> None:
        number = 0
        while not self._ended.wait(self._tick_seconds):
            number += 1
            try:
                coordination.publish(f"alive/{self._me}", f"{self._who} {number}")
                alive, failed = coordination.read("alive"), coordination.read("failed")
                coordination.common_stop().tick()
            except coordination.Unreachable as error:
                self._end(f"{self._describe(0)}, which all others need, cannot be reached ({error})")
                continue
            now = time.monotonic()
            for process in range(self._count):
                sign, since = alive.get(process, ""), self._seen.get(process, ("", self._started))
                if sign != since[0]:
                    self._seen[process] = (sign, now)
                elif now - since[1] > self.heartbeat_seconds:
                    self._end(
                        f"{self._describe(process)} has not been heard of for {self.heartbeat_seconds:g} s: "
                        "it was killed, hangs, or its host is gone"
                    )
            for process, words in failed.items():
                if process != self._me:
                    self._failing.wait(LEAVE_SECONDS / 2)  # the same error may be on its way here
                    preempted = words.startswith(f"{Preempted.__name__}:")
                    self._end(f"{self._describe(process)} said: {words}", PREEMPTED if preempted else FAILED)

    def _describe(self, process: int) -> str:
        who = self._seen.get(process, ("", 0.0))[0].rpartition(" ")[0]
        return f"process {process} of {self._count}" + (f" ({who})" if who else "")

    def _stops(self) -> str:
        return f"process {self._me} stops: "

    def _end(self, reason: str, status: int = FAILED) -> None:
        """End this process, wherever its threads are, unless it is about to end by itself."""
        if self._failing.is_set() or self._ended.is_set():
            return
        sys.stdout.flush()
        print(f"error: {self._stops()}{reason}; {AGAIN}", file=sys.stderr, flush=True)
        os._exit(status)


_abort_handlers: list[object] = []  # C has their addresses


def _on_abort(describe: Callable[[], str]) -> None:
    """Have this process say why and exit with status 1 where JAX calls abort(), as it does when it loses process 0.

    JAX offers no other place to speak: it aborts from a thread of its own, milliseconds after the connection broke.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def end(_number: int) -> None:
        libc.alarm(int(LEAVE_SECONDS))  # whatever state the process is in, it ends
        os.write(2, f"error: {describe()}\n".encode())
        os._exit(FAILED)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(end, ctypes.c_void_p))
    _abort_handlers.append(end)
