# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Train for an hour under kills, stops, damage, full disks and batches that are not numbers; nothing may be lost.

examples:
  python scripts/stress/soak.py --minutes 60
      the quickstart, undisturbed once, then again and again under a fault every --pause seconds or so
  python scripts/stress/soak.py configs/tiny.toml --minutes 3 --json
      a short one

Faults: kill -9; SIGTERM, SIGINT and SIGUSR1; a file of the newest checkpoint flipped, cut or deleted while nothing runs;
a disk without room for a while (a file system in memory, where mounting is allowed; else this fault is left out, and
said so). One batch in 50 gives a loss that is not a number, in the undisturbed run, too. Each disturbed run must end
with the bits, the losses and the data of the undisturbed one, without debris. Memory is sampled throughout.

exit status: 0 nothing lost, 1 something was, 2 wrong usage
"""

import collections
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mesh_transformer.scripts.stress.corruption import damage_file, list_files
from mesh_transformer.scripts.stress.fault_injection import (
    Attempt,
    compare_steps,
    list_debris,
    read_resident_bytes,
    start_attempt,
    start_server,
)
from mesh_transformer.scripts.stress.resume import newest, read_losses

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.cli import PREEMPTED, add_set_option, make_parser, run_command
from mesh_transformer.config import load_config
from mesh_transformer.reports.metrics_log import FILE, read_metrics
from mesh_transformer.train.data_log import read_log, effective_history

NAN_EVERY = 50
DISK_BYTES = 200_000_000
SAMPLE_SECONDS = 5.0
SETTLING = 4  # samples of a process that trains, after which its memory should stay as it is
FAULTS = ("kill", "stop", "damage", "full disk")
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclasses.dataclass
class Result:
    """What was counted, and what was wrong."""

    minutes: float = 0.0
    rounds: int = 0  # disturbed runs that came to their end
    equal: int = 0  # of those, with the bits, losses and data of the undisturbed run
    attempts: int = 0
    faults: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    statuses: dict[str, int] = dataclasses.field(default_factory=dict)  # how attempts ended
    events: dict[str, int] = dataclasses.field(default_factory=dict)  # of all metrics.jsonl at the ends of the runs
    peak_bytes: list[int] = dataclasses.field(default_factory=list)  # of each attempt that settled
    growth: list[float] = dataclasses.field(default_factory=list)  # bytes per minute of each, once settled
    memory: list[tuple[float, int]] = dataclasses.field(default_factory=list)  # of the undisturbed run: seconds, bytes
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Parse, soak, print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("config", metavar="CONFIG", nargs="?", default="configs/quickstart.toml")
    add_set_option(parser)
    parser.add_argument("--minutes", type=float, default=60.0, help="in all, about")
    parser.add_argument("--pause", type=float, default=40.0, help="seconds between faults, on average")
    parser.add_argument("--seed", type=int, default=0, help="of faults and moments")
    parser.add_argument("--work", type=Path, help="folder for the runs; by default a passing one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    steps = min(max(round(4 * options.minutes), 24), 510)
    options.set = [f"train.steps={steps}", "train.evaluate_every=0", "checkpoint.every=8", *options.set]
    load_config(options.config, options.set)
    work = options.work or Path(tempfile.mkdtemp(prefix="soak-"))
    work.mkdir(parents=True, exist_ok=True)
    disk = work / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    mounted = (
        not os.geteuid() and bool(shutil.which("mount")) and not subprocess.run(mount, capture_output=True).returncode
    )
    try:
        result = Soak(options, work, disk, mounted).run()
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=False)
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(dataclasses.asdict(result)) if options.json else format_result(result))
    return 1 if result.problems else 0


def format_result(result: Result) -> str:
    """A page for a person."""
    words = lambda counts: ", ".join(f"{name} {count}" for name, count in counts.items())  # noqa: E731
    grown = max(result.growth, default=0.0)
    shown = [result.memory[i * (len(result.memory) - 1) // 9] for i in range(10)] if result.memory else []
    lines = [
        f"{result.minutes:.1f} minutes, {result.attempts} attempts, faults: {words(result.faults)}",
        f"attempts ended with status: {words(result.statuses)}",
        f"{result.equal} of {result.rounds} disturbed runs equal the undisturbed one, bit for bit",
        f"events: {words(result.events)}",
        f"memory: {len(result.peak_bytes)} attempts settled, at most {max(result.peak_bytes, default=0) / 1e6:.0f} MB, growing "
        f"by at most {grown / 1e6:.2f} MB a minute",
        "memory of the undisturbed run: " + ", ".join(f"{at:.0f} s {size / 1e6:.0f} MB" for at, size in shown),
        *result.notes,
        *(f"PROBLEM: {problem}" for problem in result.problems),
    ]
    return "\n".join([*lines, *([] if result.problems else ["nothing was lost"])])


class Soak:
    """The undisturbed run, and the disturbed ones beside it."""

    def __init__(self, options: Any, work: Path, disk: Path, mounted: bool):
        self.options, self.work, self.disk = options, work, disk
        self.result, self.random = Result(), random.Random(options.seed)
        self.faults = FAULTS if mounted else FAULTS[:3]
        if not mounted:
            self.result.notes.append("no file system could be mounted: full disks were left out")
        self.begun, self.life = time.monotonic(), 0.0
        start_server(str(work / "compiled"))

    def run(self) -> Result:
        """Everything in order."""
        attempt = self.start("clean", self.work / "clean")
        self.watch(attempt, 10.0**9, into=self.result.memory)
        if status := attempt.wait():
            raise RuntimeError(f"the undisturbed run ended with {status}:\n{attempt.last_words()}")
        self.life = time.monotonic() - attempt.started
        until = self.begun + 60 * self.options.minutes
        while not self.result.rounds or until - time.monotonic() > 1.5 * self.life:
            name = f"round_{self.result.rounds}"
            self.disturb(name, self.disk / name, until - self.life)
            self.result.rounds += 1
            self.compare(name, self.disk / name)
            shutil.rmtree(self.disk / name)
        self.result.minutes = (time.monotonic() - self.begun) / 60
        return self.result

    def start(self, name: str, run_dir: Path) -> Attempt:
        """An attempt at a run."""
        own = (f"run.dir={json.dumps(str(run_dir))}", 'checkpoint.resume="latest-valid"', "checkpoint.keep_last=3")
        overrides = [*self.options.set, *own, "track.sequences=true", "train.log_every=1"]
        self.result.attempts += 1
        return start_attempt(self.options.config, overrides, self.work / f"{name}.log", nan_every=NAN_EVERY)

    def disturb(self, name: str, run_dir: Path, until: float) -> None:
        """One run under faults, until it has come to its end; no faults after `until`."""
        for _ in range(10**6):
            attempt = self.start(name, run_dir)
            was_full = False
            while attempt.is_running():
                calm = self.random.uniform(0.2, 1.8) * self.options.pause
                self.watch(attempt, calm if time.monotonic() < until else 10.0**9)
                if attempt.is_running():
                    was_full |= self.cause(self.random.choice(self.faults), attempt, run_dir)
            status = attempt.wait()
            key = str(status)
            self.result.statuses[key] = self.result.statuses.get(key, 0) + 1
            if status == 0:
                return
            allowed = {PREEMPTED, -signal.SIGKILL, *(-number for number in STOPS), *([1] if was_full else [])}
            if status not in allowed:
                self.problem(f"{name}: an attempt ended with {status}: {attempt.last_words()}")
                if status == 2:
                    return

    def cause(self, fault: str, attempt: Attempt, run_dir: Path) -> bool:
        """One fault; whether the disk was full."""
        self.result.faults[fault] += 1
        if fault == "kill":
            attempt.send(signal.SIGKILL)
        elif fault == "stop":
            attempt.send(self.random.choice(STOPS))
        elif fault == "full disk":
            ballast = self.disk / "ballast"
            fill(ballast)
            self.watch(attempt, self.random.uniform(5, 30))
            ballast.unlink()
            return True
        else:
            attempt.send(signal.SIGKILL)
            attempt.wait()
            root = run_dir / "checkpoints"
            steps = Store(root, writable=False).steps() if root.is_dir() else []
            if len(steps) > 1:
                path = self.random.choice(list_files(root / f"step_{steps[-1]}"))
                damage_file(path, self.random.choice(("flip", "truncate", "delete")), self.random)
        attempt.wait()
        return False

    def watch(self, attempt: Attempt, seconds: float, into: list[tuple[float, int]] | None = None) -> None:
        """Sample the memory of an attempt for some time, or until it ends."""
        samples, until = attempt.samples, time.monotonic() + seconds
        while attempt.is_running() and time.monotonic() < until:
            resident = read_resident_bytes(attempt.pid)
            if resident:
                samples.append((time.monotonic() - attempt.started, resident, attempt.log.stat().st_size))
            attempt.wait(min(SAMPLE_SECONDS, max(until - time.monotonic(), 0.0)))
        # Every step is told: where the log has grown, it was training, and not compiling or evaluating.
        training = [after[:2] for before, after in itertools.pairwise(samples) if after[2] > before[2]][SETTLING:]
        if not attempt.is_running() and len(training) > 5:
            self.result.peak_bytes.append(max(size for _, size in training))
            self.result.growth.append(60 * find_slope(training))
        if into is not None:
            into += [(round(at, 1), size) for at, size, _ in samples]

    def compare(self, name: str, run_dir: Path) -> None:
        """A disturbed run that has ended, beside the undisturbed one."""
        clean, before = self.work / "clean", len(self.result.problems)
        step = newest(clean / "checkpoints")
        result = compare_steps(clean / "checkpoints", run_dir / "checkpoints", step)
        if result["different"]:
            self.problem(
                f"{name}: {result['different']} of {result['leaves']} leaves differ, the first {result['first']}"
            )
        if read_losses(clean) != read_losses(run_dir):
            self.problem(f"{name}: its losses are others")
        if effective_history(read_log(clean)) != effective_history(read_log(run_dir)):
            self.problem(f"{name}: it saw other sequences")
        if debris := list_debris(run_dir):
            self.problem(f"{name}: left behind: {debris[:5]}")
        if len(kept := Store(run_dir / "checkpoints", writable=False).steps()) != 3:
            self.problem(f"{name}: keeps the checkpoints {kept}")
        lines = read_metrics(run_dir / FILE)
        self.result.equal += len(self.result.problems) == before
        events = collections.Counter(line["event"] for line in lines if line["kind"] == "event")
        self.result.events = dict(collections.Counter(self.result.events) + events)
        skipped = [line["skipped"] for line in lines if line["kind"] == "train"][-1]
        expected = load_config(self.options.config, self.options.set).train.steps // NAN_EVERY
        if skipped != expected:
            self.problem(f"{name}: {skipped} steps were skipped, {expected} were bad")

    def problem(self, text: str) -> None:
        """Note it, and go on."""
        self.result.problems.append(text)


def fill(ballast: Path) -> None:
    """Take all room there is."""
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            while True:
                try:
                    if not file.write(bytes(size)):
                        break
                except OSError:
                    break


def find_slope(samples: list[tuple[float, int]]) -> float:
    """Of the line through (seconds, bytes) with the least squares, in bytes per second."""
    n = len(samples)
    mean_x, mean_y = sum(x for x, _ in samples) / n, sum(y for _, y in samples) / n
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread if spread else 0.0


if __name__ == "__main__":
    sys.exit(run_command(main))
