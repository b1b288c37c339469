# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Soak test: train for an hour under kills, stops, damaged checkpoints, full disks and NaN batches, without losing anything.

examples:
  python scripts/stress/soak.py --minutes 60
      train the quickstart once without faults, then repeatedly with a fault every --pause seconds on average
  python scripts/stress/soak.py configs/tiny.toml --minutes 3 --json
      a short test

Faults: SIGKILL; SIGTERM, SIGINT and SIGUSR1; a file of the latest checkpoint with a flipped bit, truncated or deleted
while no process runs; a full disk for 5 to 30 seconds (on a tmpfs; without permission to mount it, this fault is left out,
which the result reports). One batch in 50 has a NaN loss, also in the run without faults. Each run with faults must end with
the bits, losses and data of the run without faults, and without temporary files. Memory is sampled throughout.

exit status: 0 nothing was lost, 1 something was lost, 2 wrong usage
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
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from mesh_transformer.scripts.stress.corruption import DAMAGES, damage_file, list_files
from mesh_transformer.scripts.stress.fault_injection import (
    STOP_SIGNALS,
    Attempt,
    MemorySample,
    compare_checkpoints,
    latest_step,
    list_temporary_files,
    read_resident_bytes,
    start_attempt,
    start_fork_server,
)
from mesh_transformer.scripts.stress.resume import read_losses

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.cli import PREEMPTED, add_set_option, make_parser, run_command
from mesh_transformer.config import load_config
from mesh_transformer.reports.metrics_log import FILE, read_metrics
from mesh_transformer.train.data_log import effective_history, read_log

NAN_EVERY = 50  # one batch in this many has a NaN loss
DISK_BYTES = 200_000_000  # size of the tmpfs
SAMPLE_SECONDS = 5.0  # between two memory samples
WARMUP_SAMPLES = 4  # ignored memory samples of a training process, after which its memory should be constant
FAULTS = ("kill", "stop", "damage", "full disk")


@dataclasses.dataclass
class Result:
    """Counts of a soak test, and the problems it found."""

    minutes: float = 0.0
    runs: int = 0  # runs with faults that finished
    equal: int = 0  # runs with faults that have the bits, losses and data of the run without faults
    attempts: int = 0
    faults: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    statuses: dict[str, int] = dataclasses.field(default_factory=dict)  # exit status -> attempts
    events: dict[str, int] = dataclasses.field(default_factory=dict)  # event in metrics.jsonl -> count, all runs
    peak_bytes: list[int] = dataclasses.field(default_factory=list)  # peak memory of each attempt with enough samples
    growth: list[float] = dataclasses.field(default_factory=list)  # of each attempt after the warm-up, bytes per minute
    # samples (seconds, bytes) of the run without faults
    memory: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Run the soak test and print its result."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        default="configs/quickstart.toml",
        help="TOML file of the run; default: %(default)s",
    )
    add_set_option(parser)
    parser.add_argument("--minutes", type=float, default=60.0, help="approximate total time; default: %(default)s")
    parser.add_argument("--pause", type=float, default=40.0, help="mean seconds between faults; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults and their times; default: %(default)s")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    steps = min(max(round(4 * options.minutes), 24), 510)
    options.set = [f"train.steps={steps}", "train.evaluate_every=0", "checkpoint.every=8", *options.set]
    load_config(options.config, options.set)
    work = options.work or Path(tempfile.mkdtemp(prefix="soak-"))
    disk = work / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    is_mounted = mount_tmpfs(disk)
    try:
        result = SoakTest(options, work, disk, is_mounted).run()
    finally:
        if is_mounted:
            subprocess.run(["umount", str(disk)], check=False)
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(dataclasses.asdict(result)) if options.json else format_result(result))
    return 1 if result.problems else 0


def mount_tmpfs(folder: Path) -> bool:
    """Mount a tmpfs of DISK_BYTES at `folder`; return whether it was mounted."""
    if os.geteuid() or not shutil.which("mount"):
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def format_counts(counts: dict[str, int]) -> str:
    """Return counts by name on one line."""
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def format_result(result: Result) -> str:
    """Return the counts and problems of a stress test as lines of text."""
    growth = max(result.growth, default=0.0)
    shown = [result.memory[i * (len(result.memory) - 1) // 9] for i in range(10)] if result.memory else []
    lines = [
        f"{result.minutes:.1f} minutes, {result.attempts} attempts, faults: {format_counts(result.faults)}",
        f"exit statuses of the attempts: {format_counts(result.statuses)}",
        f"{result.equal} of {result.runs} runs with faults equal the run without faults, bit for bit",
        f"events: {format_counts(result.events)}",
        f"memory of {len(result.peak_bytes)} attempts after the warm-up: at most "
        f"{max(result.peak_bytes, default=0) / 1e6:.0f} MB, growing by at most {growth / 1e6:.2f} MB per minute",
        "memory of the run without faults: " + ", ".join(f"{at:.0f} s {size / 1e6:.0f} MB" for at, size in shown),
        *result.notes,
        *(f"PROBLEM: {problem}" for problem in result.problems),
    ]
    return "\n".join([*lines, *([] if result.problems else ["nothing was lost"])])


class SoakTest:
    """A run without faults, and runs with faults that must equal it."""

    def __init__(self, options: Namespace, work: Path, disk: Path, is_mounted: bool):
        self.options = options
        self.work = work
        self.disk = disk
        self.result = Result()
        self.random = random.Random(options.seed)
        self.faults = FAULTS if is_mounted else tuple(fault for fault in FAULTS if fault != "full disk")
        if not is_mounted:
            self.result.notes.append(
                "full disks were not tested, because no tmpfs could be mounted; run as root to test them"
            )
        self.started = time.monotonic()
        self.attempt_seconds = 0.0  # of the run without faults
        start_fork_server(str(work / "compiled"))

    def run(self) -> Result:
        attempt = self.start("clean", self.work / "clean")
        self.sample_memory(attempt, float("inf"))
        self.result.memory = [(round(sample.seconds, 1), sample.resident_bytes) for sample in attempt.samples]
        if status := attempt.wait():
            raise RuntimeError(f"the run without faults ended with status {status}:\n{attempt.log_tail()}")
        self.attempt_seconds = time.monotonic() - attempt.started
        deadline = self.started + 60 * self.options.minutes
        while not self.result.runs or deadline - time.monotonic() > 1.5 * self.attempt_seconds:
            name = f"run_{self.result.runs}"
            self.run_with_faults(name, self.disk / name, deadline - self.attempt_seconds)
            self.result.runs += 1
            self.compare(name, self.disk / name)
            shutil.rmtree(self.disk / name)
        self.result.minutes = (time.monotonic() - self.started) / 60
        return self.result

    def start(self, name: str, run_dir: Path) -> Attempt:
        overrides = [
            *self.options.set,
            f"run.dir={json.dumps(str(run_dir))}",
            'checkpoint.resume="latest-valid"',
            "checkpoint.keep_last=3",
            "track.sequences=true",
            "train.log_every=1",
        ]
        self.result.attempts += 1
        return start_attempt(self.options.config, overrides, self.work / f"{name}.log", nan_every=NAN_EVERY)

    def run_with_faults(self, name: str, run_dir: Path, faults_until: float) -> None:
        """Start attempts at a run and inject faults until one attempt finishes it; no faults after `faults_until`."""
        for _ in range(10**6):
            attempt = self.start(name, run_dir)
            was_full = False
            while attempt.is_running():
                pause = self.random.uniform(0.2, 1.8) * self.options.pause
                self.sample_memory(attempt, pause if time.monotonic() < faults_until else float("inf"))
                if attempt.is_running():
                    fault = self.random.choice(self.faults)
                    self.inject(fault, attempt, run_dir)
                    was_full |= fault == "full disk"
            status = attempt.wait()
            self.result.statuses[str(status)] = self.result.statuses.get(str(status), 0) + 1
            if status == 0:
                return
            allowed = {PREEMPTED, -signal.SIGKILL, *(-number for number in STOP_SIGNALS), *([1] if was_full else [])}
            if status not in allowed:
                self.add_problem(
                    f"{name}: an attempt ended with status {status}, expected one of {sorted(allowed)}: {attempt.log_tail()}"
                )
                if status == 2:
                    return

    def inject(self, fault: str, attempt: Attempt, run_dir: Path) -> None:
        """Inject one of FAULTS; except for a full disk, wait until the attempt has ended."""
        self.result.faults[fault] += 1
        match fault:
            case "kill":
                attempt.send_signal(signal.SIGKILL)
            case "stop":
                attempt.send_signal(self.random.choice(STOP_SIGNALS))
            case "damage":
                attempt.send_signal(signal.SIGKILL)
                attempt.wait()
                self.damage_latest(run_dir / "checkpoints")
            case "full disk":
                ballast = self.disk / "ballast"
                fill_disk(ballast)
                self.sample_memory(attempt, self.random.uniform(5, 30))
                ballast.unlink()
                return
        attempt.wait()

    def damage_latest(self, root: Path) -> None:
        """Damage a file of the latest checkpoint, if there is an earlier one."""
        steps = Store(root, writable=False).steps() if root.is_dir() else []
        if len(steps) > 1:
            path = self.random.choice(list_files(root / f"step_{steps[-1]}"))
            damage_file(path, self.random.choice(DAMAGES), self.random)

    def sample_memory(self, attempt: Attempt, seconds: float) -> None:
        """Sample the memory of an attempt for `seconds`, or until it ends."""
        samples = attempt.samples
        until = time.monotonic() + seconds
        while attempt.is_running() and time.monotonic() < until:
            resident = read_resident_bytes(attempt.pid)
            if resident:
                log_bytes = attempt.log.stat().st_size
                samples.append(MemorySample(time.monotonic() - attempt.started, resident, log_bytes))
            attempt.wait(min(SAMPLE_SECONDS, max(until - time.monotonic(), 0.0)))
        # Every step is logged: while the log grows, the process trains; otherwise it compiles or evaluates.
        training = [after for before, after in itertools.pairwise(samples) if after.log_bytes > before.log_bytes]
        training = training[WARMUP_SAMPLES:]
        if not attempt.is_running() and len(training) > 5:
            self.result.peak_bytes.append(max(sample.resident_bytes for sample in training))
            self.result.growth.append(60 * fit_slope([(sample.seconds, sample.resident_bytes) for sample in training]))

    def compare(self, name: str, run_dir: Path) -> None:
        """Compare a finished run with the run without faults."""
        clean = self.work / "clean"
        n_problems = len(self.result.problems)
        diff = compare_checkpoints(clean / "checkpoints", run_dir / "checkpoints", latest_step(clean / "checkpoints"))
        if diff.n_different:
            self.add_problem(f"{name}: {diff.n_different} of {diff.n_arrays} arrays differ, the first is {diff.first}")
        if read_losses(clean) != read_losses(run_dir):
            self.add_problem(f"{name}: its losses differ from those of the run without faults")
        if effective_history(read_log(clean)) != effective_history(read_log(run_dir)):
            self.add_problem(f"{name}: it was trained on other sequences than the run without faults")
        if leftovers := list_temporary_files(run_dir):
            self.add_problem(f"{name}: temporary files remain: {leftovers[:5]}")
        if len(steps := Store(run_dir / "checkpoints", writable=False).steps()) != 3:
            self.add_problem(f"{name}: expected 3 checkpoints, found steps {steps}")
        lines = read_metrics(run_dir / FILE)
        self.result.equal += len(self.result.problems) == n_problems
        events = collections.Counter(line["event"] for line in lines if line["kind"] == "event")
        self.result.events = dict(collections.Counter(self.result.events) + events)
        skipped = [line["skipped"] for line in lines if line["kind"] == "train"][-1]
        expected = load_config(self.options.config, self.options.set).train.steps // NAN_EVERY
        if skipped != expected:
            self.add_problem(f"{name}: {skipped} steps were skipped, {expected} had a NaN loss")

    def add_problem(self, text: str) -> None:
        self.result.problems.append(text)


def fill_disk(ballast: Path) -> None:
    """Write a file that fills its file system."""
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            while True:
                try:
                    if not file.write(bytes(size)):
                        break
                except OSError:
                    break


def fit_slope(samples: Sequence[tuple[float, int]]) -> float:
    """Return the slope of the least-squares line through (x, y) samples; 0 if all x are equal."""
    n = len(samples)
    mean_x = sum(x for x, _ in samples) / n
    mean_y = sum(y for _, y in samples) / n
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread if spread else 0.0


if __name__ == "__main__":
    sys.exit(run_command(main))
