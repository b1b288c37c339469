# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run tell each other beside training: values of all, failures of one, the point where all stop.

It goes through the key-value store and the barriers of jax.distributed's coordination service, in process 0, over the
network and not over the devices, so that it may be done in a thread beside the collectives of a step. Whatever is
called here must be called in all processes, under the same name and equally often. With one process nothing is sent.
"""

import collections
import json
import threading
from collections.abc import Callable
from typing import Any

SECONDS = 3600.0  # for which a process waits for the others; one that is gone is found much earlier (processes.py)
SPACE = "mesh_transformer"

_rounds: collections.Counter[str] = collections.Counter()
_lock = threading.Lock()


class Unreachable(RuntimeError):
    """The coordination service does not answer, or others did not come in time."""


class FailedElsewhere(RuntimeError):
    """What was to be done everywhere failed in another process; the message has its number and its words."""


def process_count() -> int:
    """Processes of this run; unlike JAX's own it starts no device."""
    return _runtime().num_processes or 1


def process_index() -> int:
    """This one's number, 0 for the one that speaks for all."""
    return _runtime().process_id or 0


def gather(name: str, value: str, *, seconds: float = SECONDS) -> list[str]:
    """`value` of every process, by process, once all have called this. Raises Unreachable if they do not in time."""
    count = process_count()
    if count == 1:
        return [value]
    with _lock:
        _rounds[name] += 1
        number = _rounds[name]
    place = f"{name}.{number}"
    publish(f"{place}/{process_index()}", value)
    try:
        _client().wait_at_barrier(f"{SPACE}/{place}", round(1000 * seconds))
    except Exception as error:  # of the service, by status code
        raise Unreachable(f"not all {count} processes came to {name!r} within {seconds:g} s: {error}") from error
    found = read(place)
    if process_index() == 0 and number > 1:  # all have read the round before, else they would not have come
        _client().key_value_delete(f"{SPACE}/{name}.{number - 1}/")
    return [found[process] for process in range(count)]


def run_everywhere(name: str, work: Callable[[], object], *, first: bool = False) -> None:
    """Do `work` in each process (with `first` in process 0 only), wait for all, and raise in all if it failed in one."""
    failure: Exception | None = None
    if not first or process_index() == 0:
        try:
            work()
        except Exception as error:  # raised below, once the others know
            failure = error
    words = gather(name, "" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure:
        raise failure
    for process, text in enumerate(words):
        if text:
            raise FailedElsewhere(f"process {process}: {text}")


def from_first(name: str, work: Callable[[], Any]) -> Any:
    """What `work` returns in process 0 (something JSON can hold); raises in all if it fails there."""
    found: list[Any] = []
    run_everywhere(name, lambda: found.append(work()), first=True)
    return json.loads(gather(f"{name} result", json.dumps(found[0]) if found else "")[0])


def publish(key: str, value: str) -> None:
    """Let the others read `value` under `key`."""
    try:
        # The service keeps no empty values.
        _client().key_value_set(f"{SPACE}/{key}", f"={value}", allow_overwrite=True)
    except Exception as error:  # of the service, by status code
        raise Unreachable(str(error).partition("\n")[0]) from error


def read(folder: str) -> dict[int, str]:
    """What each process has published under `folder`/<its number>."""
    try:
        found = _client().key_value_dir_get(f"{SPACE}/{folder}/")
    except Exception as error:  # of the service, by status code
        raise Unreachable(str(error).partition("\n")[0]) from error
    return {int(key.rpartition("/")[2]): value[1:] for key, value in found}


def _client() -> Any:
    return _runtime().client


def _runtime() -> Any:
    from jax._src import distributed  # nothing public has the client; and here, for JAX takes a second to import

    return distributed.global_state


class CommonStop:
    """The point where all processes stop once one of them was asked to.

    Training passes the same points in the same order in all processes: one before each step and each batch of an
    evaluation. Who is asked publishes why. Each process then publishes how many points it has passed, and passes no
    more until all have; they stop at the point after the furthest. Nobody is waited for who is in a step meanwhile: a
    thread answers for it (`tick`), and the point after the furthest is one that everybody will come to.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passed = 0
        self._asked = self._answered = False
        self.agreed = False  # and all have come to the point
        self._stop_at: int | None = None
        self._reason = ""

    def reached(self, reason: str) -> str:
        """At each point: `reason` for which this process was asked to stop, if it was; the reason to stop here, if any."""
        if process_count() == 1:
            return reason
        if reason and not self._asked:
            self._asked = True
            publish(f"asked/{process_index()}", reason)
        with self._changed:
            while self._answered and self._stop_at is None:
                self._changed.wait()
            if self._stop_at is not None and self._passed + 1 >= self._stop_at:
                self.agreed = True
                return self._reason
            self._passed += 1
            return ""

    def tick(self) -> None:
        """In a thread, now and then: hear of requests and answer them."""
        asked = read("asked") if self._stop_at is None else {}
        if not asked:
            return
        with self._changed:
            if not self._answered:
                self._answered = True
                publish(f"passed/{process_index()}", str(self._passed))
        passed = read("passed")
        if len(passed) == process_count():
            with self._changed:
                process = min(asked)
                self._reason = f"{asked[process]} in process {process}"
                self._stop_at = max(map(int, passed.values())) + 1
                self._changed.notify_all()


_stop = CommonStop()


def common_stop() -> CommonStop:
    """The one of this run."""
    return _stop
