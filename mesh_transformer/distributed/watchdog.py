# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Heartbeat and failure detection between the processes of a run.

A collective never completes if one of its processes is lost, so a lost process must end the others. At every tick each
process publishes a heartbeat and checks the heartbeats of the others. A process without a heartbeat for mesh.heartbeat_seconds
counts as lost; a process that fails publishes its error. The others then name the lost or failed process and exit with
status 1 (75 after a preemption).
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import jax

from mesh_transformer.cli import FAILED, PREEMPTED, Preempted
from mesh_transformer.distributed import coordination

TICKS_PER_TIMEOUT = 30  # heartbeats per mesh.heartbeat_seconds; at most four per second
EXIT_SECONDS = 10.0  # time limit for a failed process to report its error and exit
RESTART_HINT = "run the same command again in all processes to resume from the latest checkpoint"


class Watchdog:
    """Thread that publishes this process's heartbeat and checks the others' heartbeats. The constructor starts the thread."""

    def __init__(self, heartbeat_seconds: float):
        self.heartbeat_seconds = heartbeat_seconds
        self._tick_seconds = max(heartbeat_seconds / TICKS_PER_TIMEOUT, 0.25, coordination.process_count() / 500)
        self._index = coordination.process_index()
        self._count = coordination.process_count()
        self._identity = f"{socket.gethostname()}, pid {os.getpid()}"
        self._ended = threading.Event()
        self._failing = threading.Event()
        self._heartbeats: dict[int, tuple[str, float]] = {}  # process -> its last heartbeat, and the time of arrival
        self._started = time.monotonic()
        _on_abort(
            lambda: f"{self._prefix()}{self._describe(0)}, the coordinator, is lost or unreachable; {RESTART_HINT}"
        )
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Wait until all processes have called `leave`, then stop the thread and disconnect."""
        coordination.gather("leave", "")
        self._ended.set()
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> None:
        """Publish an error of this process. If a peer may have caused it, wait for that peer's failure report first."""
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._thread.join(self.heartbeat_seconds + EXIT_SECONDS)  # the thread ends the process if a peer is lost
        self._failing.set()
        message = str(error).strip().partition("\n")[0]
        coordination.set_key(f"failed/{self._index}", f"{type(error).__name__}: {message}")
        if self._index == 0:  # the coordination service ends with process 0: give the others time to read the error
            time.sleep(2 * self._tick_seconds)
        # Other threads of this process may be blocked in a collective: end the process without waiting for them.
        timer = threading.Timer(EXIT_SECONDS, os._exit, (FAILED,))
        timer.daemon = True
        timer.start()

    def _run(self) -> None:
        number = 0
        while not self._ended.wait(self._tick_seconds):
            number += 1
            try:
                coordination.set_key(f"alive/{self._index}", f"{self._identity} {number}")
                alive, failed = coordination.get_keys("alive"), coordination.get_keys("failed")
                coordination.stop_consensus().poll()
            except coordination.CoordinationError as error:
                self._end(f"{self._describe(0)}, the coordinator, cannot be reached ({error})")
                continue
            self._check_heartbeats(alive)
            self._check_failures(failed)

    def _check_heartbeats(self, alive: dict[int, str]) -> None:
        now = time.monotonic()
        for process in range(self._count):
            heartbeat = alive.get(process, "")
            last, arrived = self._heartbeats.get(process, ("", self._started))
            if heartbeat != last:
                self._heartbeats[process] = (heartbeat, now)
            elif now - arrived > self.heartbeat_seconds:
                self._end(
                    f"{self._describe(process)} has sent no heartbeat for {self.heartbeat_seconds:g} s: "
                    "it was killed, is blocked, or its host is lost"
                )

    def _check_failures(self, failed: dict[int, str]) -> None:
        for process, message in failed.items():
            if process != self._index:
                self._failing.wait(EXIT_SECONDS / 2)  # this process may be about to raise the same error
                is_preempted = message.startswith(f"{Preempted.__name__}:")
                self._end(f"{self._describe(process)} failed: {message}", PREEMPTED if is_preempted else FAILED)

    def _describe(self, process: int) -> str:
        identity = self._heartbeats.get(process, ("", 0.0))[0].rpartition(" ")[0]
        return f"process {process} of {self._count}" + (f" ({identity})" if identity else "")

    def _prefix(self) -> str:
        return f"process {self._index} stops: "

    def _end(self, reason: str, status: int = FAILED) -> None:
        """End this process without waiting for its threads, unless it is already ending."""
        if self._failing.is_set() or self._ended.is_set():
            return
        sys.stdout.flush()
        print(f"error: {self._prefix()}{reason}; {RESTART_HINT}", file=sys.stderr, flush=True)
        os._exit(status)


_abort_handlers: list[object] = []  # references that keep the callbacks alive: C code has their addresses


def _on_abort(describe: Callable[[], str]) -> None:
    """Print a message and exit with status 1 when JAX calls abort(), as JAX does when it loses process 0.

    JAX has no other hook: it aborts from a background thread, milliseconds after the connection is lost.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def end(_number: int) -> None:
        libc.alarm(int(EXIT_SECONDS))  # ends the process if the lines below block
        os.write(2, f"error: {describe()}\n".encode())
        os._exit(FAILED)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(end, ctypes.c_void_p))
    _abort_handlers.append(end)
