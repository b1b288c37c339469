# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Library of the stress tests: start device_train.py in a process that can be killed, inject faults, compare checkpoints.

Every attempt at a run is a separate process that calls the main function of device_train.py. It is forked from a server
process that has imported the libraries but has not initialized JAX devices, and it reads compiled programs from a cache.
This saves about ten seconds per attempt and does not affect the training.
"""

import atexit
import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mesh_transformer.checkpoint.store import Store

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = [
    "mesh_transformer.train.session",
    "mesh_transformer.sample.training_samples",
    "device_train",
    "mesh_transformer.scripts.stress.fault_injection",
]
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
UNFINISHED = (".tmp-", ".old-", ".trash-")  # in the names of the folders of unfinished saves and deletions
TEMPORARY = (".tmp", *UNFINISHED)


class MemorySample(NamedTuple):
    """Memory of an attempt at one point in time."""

    seconds: float  # since the start of the attempt
    resident_bytes: int
    log_bytes: int  # size of the attempt's log, which grows at every step


class CheckpointDiff(NamedTuple):
    """Comparison of two checkpoints of the same step."""

    step: int
    n_arrays: int
    n_different: int  # arrays whose bytes differ, or that are in one checkpoint only
    first: str  # name of the first array that differs, "" if all are equal
    ulps: int  # largest distance in units in the last place
    relative: float  # largest difference divided by the largest absolute value of its array


_started: list[ForkServerContext] = []


def start_fork_server(cache_dir: str = "") -> ForkServerContext:
    """Return the multiprocessing context that forks attempts.

    The first call starts the server; later calls return the same context. `cache_dir` is the folder of JAX's compilation
    cache; "" is a temporary one.
    """
    if _started:
        return _started[0]
    if not cache_dir:
        cache_dir = tempfile.mkdtemp(prefix="compiled-")
        atexit.register(shutil.rmtree, cache_dir, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache_dir
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    _started.append(context)
    return context


@dataclasses.dataclass
class Attempt:
    """One training process, from its start to its end."""

    process: ForkServerProcess
    log: Path  # stdout and stderr of the process
    started: float  # time.monotonic()
    samples: list[MemorySample] = dataclasses.field(default_factory=list)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None, "the process was started"
        return self.process.pid

    def is_running(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; do nothing if the process has ended."""
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the exit status, or minus the signal that ended the process; None if it still runs after `seconds`."""
        self.process.join(seconds)
        return self.process.exitcode

    def log_tail(self, lines: int = 5) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


def start_attempt(
    config: str | Path, overrides: Sequence[str], log: Path, *, user: int | None = None, nan_every: int = 0
) -> Attempt:
    """Start device_train.py with a configuration; its output is appended to `log`.

    The process runs under the user id `user`, if given. With `nan_every` = n the loss of every n-th batch is NaN.
    """
    arguments = [str(config), *(word for item in overrides for word in ("--set", item))]
    process = start_fork_server().Process(target=run_attempt, args=(arguments, str(log), user, nan_every))
    log.touch()
    process.start()
    return Attempt(process, log, time.monotonic())


def run_attempt(arguments: list[str], log: str, user: int | None, nan_every: int) -> None:
    """Run the training program in this process with its output in a file, and exit. Called in the forked process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard_stream in (1, 2):
        os.dup2(descriptor, standard_stream)
    if user is not None:
        os.setuid(user)
    os.chdir(ROOT)
    sys.argv = ["device_train.py", *arguments]

    import device_train  # the server process has imported it
    from mesh_transformer.cli import run_command

    if nan_every:
        inject_nan_batches(nan_every)
    sys.exit(run_command(device_train.main))


def inject_nan_batches(every: int) -> None:
    """Patch the data loader so that the loss weights of every `every`-th batch are NaN."""
    from mesh_transformer.data.loader import Batch, Loader

    original = Loader.batch

    def batch(self: Loader, first: int, size: int, rows: Iterable[int] | None = None) -> Batch:
        made = original(self, first, size, rows)
        is_bad = first // size % every == every - 1
        return made._replace(mask=made.mask * np.float32(np.nan)) if is_bad else made

    Loader.batch = batch


def list_unfinished_saves(root: Path) -> list[str]:
    """Return the names of unfinished saves and deletions in a folder of checkpoints."""
    names = os.listdir(root) if root.is_dir() else []
    return [name for name in names if any(part in name for part in UNFINISHED)]


def list_temporary_files(folder: Path) -> list[str]:
    """Return every path under `folder` with a temporary name."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if any(t in path.name for t in TEMPORARY))


def latest_step(root: Path) -> int:
    """Return the latest committed step in a folder of checkpoints, 0 without checkpoints."""
    return max(Store(root, writable=False).steps(), default=0)


def read_resident_bytes(pid: int) -> int | None:
    """Return the resident memory of a process, None once it has ended."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def compare_checkpoints(left: Path, right: Path, step: int) -> CheckpointDiff:
    """Compare the checkpoints of one step in two folders of checkpoints, bit for bit."""
    stores = [Store(root, writable=False).open_arrays(step) for root in (left, right)]
    first = ""
    n_different = 0
    ulps = 0
    relative = 0.0
    for name in sorted(stores[0].keys() | stores[1].keys()):
        if name in stores[0] and name in stores[1]:
            values = [store[name].read(tuple(slice(0, dim) for dim in store[name].shape)) for store in stores]
            if values[0].tobytes() == values[1].tobytes():
                continue
            ulps = max(ulps, count_ulps(*values))
            wide = [value.astype(np.float64) for value in values]
            scale = max(float(np.abs(wide[0]).max()), np.finfo(np.float64).tiny)
            relative = max(relative, float(np.abs(wide[0] - wide[1]).max()) / scale)
        n_different += 1
        first = first or name
    return CheckpointDiff(step, len(stores[0]), n_different, first, ulps, relative)


def count_ulps(left: np.ndarray, right: np.ndarray) -> int:
    """Return the largest distance of two arrays: units in the last place for floats, the difference for integers."""
    if left.dtype.kind in "biu":
        return int(np.abs(left.astype(np.int64) - right.astype(np.int64)).max())
    bits = np.dtype(f"i{left.itemsize}")
    ordered = []
    for side in (left, right):
        raw = np.atleast_1d(side).view(bits).astype(np.int64)
        ordered.append(np.where(raw < 0, np.int64(np.iinfo(bits).min) - raw, raw))  # -0.0 and 0.0 are 0 apart
    return int(np.abs(ordered[0] - ordered[1]).max())
