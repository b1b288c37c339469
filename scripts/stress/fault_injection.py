# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Attempts at a run, each a process of device_train.py that can be killed, and what they left: used by proofs and soaks.

Every attempt is a process of its own that runs the program's own main. It is forked from a server that has imported
the libraries but started no device, and it finds compiled steps in a cache: that saves ten seconds an attempt, and
leaves what is proved alone.
"""

import atexit
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.store import Store

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = [
    "mesh_transformer.train.session",
    "mesh_transformer.sample.training_samples",
    "device_train",
    "mesh_transformer.scripts.stress.fault_injection",
]
UNFINISHED = (".tmp-", ".old-", ".trash-")  # parts of names that only an unfinished save or deletion leaves
TEMPORARY = (".tmp", *UNFINISHED)


@functools.cache
def start_server(compiled: str = "") -> Any:
    """The context that forks attempts; `compiled` is the folder of the compiled steps, a passing one by default."""
    if not compiled:
        compiled = tempfile.mkdtemp(prefix="compiled-")
        atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    places = (str(ROOT), str(ROOT / "scripts"))
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    sys.path[:0] = [place for place in places if place not in sys.path]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@dataclasses.dataclass
class Attempt:
    """One process that trains, from its start to its end."""

    process: Any
    log: Path  # everything it prints
    started: float
    # seconds since its start, bytes of memory, bytes of its log
    samples: list[tuple[float, int, int]] = dataclasses.field(default_factory=list)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """A signal; nothing if it has ended."""
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit status, minus the signal that killed it; None if it still runs after so long."""
        self.process.join(seconds)
        return self.process.exitcode

    def last_words(self, lines: int = 5) -> str:
        """The end of what it printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


def start_attempt(
    config: str | Path, overrides: Sequence[str], log: Path, *, user: int | None = None, nan_every: int = 0
) -> Attempt:
    """Start device_train.py on a configuration; what it prints is added to `log`.

    `user` is the id it runs under. With `nan_every` = n the losses of one batch in n are not numbers.
    """
    arguments = [str(config), *(word for item in overrides for word in ("--set", item))]
    process = start_server().Process(target=run_attempt, args=(arguments, str(log), user, nan_every))
    log.touch()
    process.start()
    return Attempt(process, log, time.monotonic())


def run_attempt(arguments: list[str], log: str, user: int | None, nan_every: int) -> None:
    """The process itself: the program's main, with its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if user is not None:
        os.setuid(user)
    os.chdir(ROOT)
    sys.argv = ["device_train.py", *arguments]

    import device_train  # already there, by way of the server
    from mesh_transformer.cli import run_command

    if nan_every:
        poison_batches(nan_every)
    sys.exit(run_command(device_train.main))


def poison_batches(every: int) -> None:
    """From here on, in this process, every so many training batches one has weights that are not numbers."""
    from mesh_transformer.data.loader import Batch, Loader

    whole = Loader.batch

    def batch(self: Loader, first: int, size: int, rows: Iterable[int] | None = None) -> Batch:
        made = whole(self, first, size, rows)
        is_bad = first // size % every == every - 1
        return made._replace(mask=made.mask * np.float32(np.nan)) if is_bad else made

    Loader.batch = batch


def list_unfinished(root: Path) -> list[str]:
    """Names of what unfinished saves left in a folder of checkpoints."""
    names = os.listdir(root) if root.is_dir() else []
    return [name for name in names if any(part in name for part in UNFINISHED)]


def list_debris(folder: Path) -> list[str]:
    """Everything below that bears a temporary name."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if any(t in path.name for t in TEMPORARY))


def read_resident_bytes(pid: int) -> int | None:
    """Memory that a process holds, None once it has ended."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def compare_steps(left: Path, right: Path, step: int) -> dict[str, Any]:
    """Two checkpoints of one step in two folders: leaves, those that differ, the first of them, and by how much.

    `ulps` is the largest distance in units in the last place, `difference` the largest in shares of a leaf's largest value.
    """
    sides = [Store(root, writable=False).open_arrays(step) for root in (left, right)]
    result: dict[str, Any] = {
        "step": step,
        "leaves": len(sides[0]),
        "different": 0,
        "first": None,
        "ulps": 0,
        "difference": 0.0,
    }
    for name in sorted(sides[0].keys() | sides[1].keys()):
        if not (name in sides[0] and name in sides[1]):
            distance = -1
        else:
            values = [side[name].read(tuple(slice(0, dim) for dim in side[name].shape)) for side in sides]
            if values[0].tobytes() == values[1].tobytes():
                continue
            distance = count_ulps(*values)
            wide = [value.astype(np.float64) for value in values]
            scale = max(float(np.abs(wide[0]).max()), np.finfo(np.float64).tiny)
            result["difference"] = max(result["difference"], float(np.abs(wide[0] - wide[1]).max()) / scale)
        result["different"] += 1
        result["first"] = result["first"] or name
        result["ulps"] = max(result["ulps"], distance)
    return result


def count_ulps(left: np.ndarray, right: np.ndarray) -> int:
    """The largest distance of two arrays in units in the last place (floats), or as they are (integers)."""
    if left.dtype.kind in "biu":
        return int(np.abs(left.astype(np.int64) - right.astype(np.int64)).max())
    bits = np.dtype(f"i{left.itemsize}")
    ordered = []
    for side in (left, right):
        raw = np.atleast_1d(side).view(bits).astype(np.int64)
        ordered.append(np.where(raw < 0, np.int64(np.iinfo(bits).min) - raw, raw))  # -0.0 and 0.0 are 0 apart
    return int(np.abs(ordered[0] - ordered[1]).max())
