# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Cross-process coordination outside the training step: gather values, propagate failures, agree on a stop point.

Values travel through the key-value store and the barriers of jax.distributed's coordination service, which runs in
process 0. They use the network and not the devices, so a thread may exchange them while the collectives of a step run.
Every process must make the same calls, with the same names and equally often. A run of one process does not use the service.
"""

import collections
import json
import threading
from collections.abc import Callable
from typing import Any

TIMEOUT_SECONDS = 3600.0  # time limit of a barrier; the watchdog (watchdog.py) finds a lost process much earlier
KEY_PREFIX = "mesh_transformer"

_rounds: collections.Counter[str] = collections.Counter()  # name -> number of calls of `gather` so far
_lock = threading.Lock()


class CoordinationError(RuntimeError):
    """Failure of the coordination service to answer, or of a process to reach a barrier in time."""


class RemoteFailure(RuntimeError):
    """Failure of `run_on_all` in another process; the message has the process index and the error."""


def process_count() -> int:
    """Return the number of processes of this run without initializing a device, as jax.process_count would."""
    return _runtime().num_processes or 1


def process_index() -> int:
    """Return the index of this process; process 0 writes files and prints."""
    return _runtime().process_id or 0


def gather(name: str, value: str, *, seconds: float = TIMEOUT_SECONDS) -> list[str]:
    """Wait for all processes and return their values by process index; raise CoordinationError after `seconds`."""
    count = process_count()
    if count == 1:
        return [value]
    with _lock:
        _rounds[name] += 1
        number = _rounds[name]
    key = f"{name}.{number}"
    set_key(f"{key}/{process_index()}", value)
    try:
        _client().wait_at_barrier(f"{KEY_PREFIX}/{key}", round(1000 * seconds))
    except Exception as error:  # the service raises one type; the cause is its status code
        raise CoordinationError(
            f"not all {count} processes reached the barrier {name!r} within {seconds:g} s ({error}); check the output of the "
            "other processes, and restart all of them"
        ) from error
    values = get_keys(key)
    if process_index() == 0 and number > 1:  # a process that reached this barrier has read the previous round
        _client().key_value_delete(f"{KEY_PREFIX}/{name}.{number - 1}/")
    return [values[process] for process in range(count)]


def run_on_all(name: str, work: Callable[[], object], *, first_only: bool = False) -> None:
    """Call `work` in every process (`first_only`: only in process 0), wait for all processes, and raise in all if one failed.

    Raises the error of this process, or RemoteFailure for the error of another process.
    """
    failure: Exception | None = None
    if not first_only or process_index() == 0:
        try:
            work()
        except Exception as error:  # raised below, after the other processes have been informed
            failure = error
    messages = gather(name, "" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure:
        raise failure
    for process, message in enumerate(messages):
        if message:
            raise RemoteFailure(f"process {process} failed in {name!r}: {message}")


def broadcast_from_first(name: str, work: Callable[[], Any]) -> Any:
    """Call `work` in process 0 and return its JSON-serializable result in every process; if it fails, raise in every process."""
    results: list[Any] = []
    run_on_all(name, lambda: results.append(work()), first_only=True)
    return json.loads(gather(f"{name} result", json.dumps(results[0]) if results else "")[0])


def set_key(key: str, value: str) -> None:
    """Publish `value` under `key` to the other processes."""
    try:
        # The prefix "=" is needed because the service does not store empty values.
        _client().key_value_set(f"{KEY_PREFIX}/{key}", f"={value}", allow_overwrite=True)
    except Exception as error:  # the service raises one type; the cause is its status code
        raise _unreachable(error) from error


def get_keys(folder: str) -> dict[int, str]:
    """Return the values that processes have published under `folder`/<process index>."""
    try:
        items = _client().key_value_dir_get(f"{KEY_PREFIX}/{folder}/")
    except Exception as error:  # the service raises one type; the cause is its status code
        raise _unreachable(error) from error
    return {int(key.rpartition("/")[2]): value[1:] for key, value in items}


def _unreachable(error: Exception) -> CoordinationError:
    reason = str(error).partition("\n")[0]
    return CoordinationError(f"the coordination service of process 0 does not answer: {reason}")


def _client() -> Any:
    return _runtime().client


def _runtime() -> Any:
    # JAX's public API does not expose the client. The import is local because importing JAX takes a second.
    from jax._src import distributed

    return distributed.global_state


class StopConsensus:
    """Agreement of all processes to stop at the same check, once a process has a reason to stop.

    Training makes the same checks in the same order in every process: one before each step and one before each batch
    of an evaluation. The process that receives the stop request publishes its reason. Every process then publishes how
    many checks it has passed, and waits until all have answered. All processes stop at the first check that no process
    has passed. A background thread answers for a process that is inside a step (`poll`), so the other processes need not
    wait for the end of the step.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passed = 0
        self._has_requested = False
        self._has_answered = False
        self._stop_at: int | None = None
        self._reason = ""
        self.agreed = False  # all processes have agreed, and this process has reached the agreed check

    def should_stop(self, reason: str) -> str:
        """Count one check and return the common reason to stop here, or "" to continue.

        `reason` is this process's reason to stop, "" for none.
        """
        if process_count() == 1:
            return reason
        if reason and not self._has_requested:
            self._has_requested = True
            set_key(f"stop_requested/{process_index()}", reason)
        with self._changed:
            while self._has_answered and self._stop_at is None:
                self._changed.wait()
            if self._stop_at is not None and self._passed + 1 >= self._stop_at:
                self.agreed = True
                return self._reason
            self._passed += 1
            return ""

    def poll(self) -> None:
        """Answer stop requests of other processes; the watchdog thread calls this at intervals."""
        requests = get_keys("stop_requested") if self._stop_at is None else {}
        if not requests:
            return
        with self._changed:
            if not self._has_answered:
                self._has_answered = True
                set_key(f"checks_passed/{process_index()}", str(self._passed))
        passed = get_keys("checks_passed")
        if len(passed) == process_count():
            with self._changed:
                process = min(requests)
                self._reason = f"{requests[process]} in process {process}"
                self._stop_at = max(map(int, passed.values())) + 1
                self._changed.notify_all()


_stop_consensus = StopConsensus()


def stop_consensus() -> StopConsensus:
    """Return the StopConsensus of this process, of which there is one."""
    return _stop_consensus
