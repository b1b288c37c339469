# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Stress test of resuming: an interrupted run must end with the same bits and data as an uninterrupted run.

examples:
  python scripts/stress/resume.py configs/tiny.toml --kills 200 --terms 20
      half of the kills at a random moment of an attempt, half during a save (--in-save); the parameters, the optimizer
      state and all other arrays of the last checkpoint are then compared bit for bit
  python scripts/stress/resume.py configs/tiny.toml --kills 20 --mesh-after fsdp=2,tensor=2,cpu_devices=4 --json
      every second attempt continues on that mesh: bits may differ, losses may differ by --tolerance, data may not

An interrupted run is one run folder, in which attempts start until one of them finishes the run; runs are started until all
kills are sent. After every kill the latest checkpoint must be intact and, on the same mesh, equal to the
uninterrupted run's checkpoint of that step; the next attempt must resume from it. A stop (SIGTERM, SIGINT and SIGUSR1 in turn)
must end with status 75 and a checkpoint of the last step that was started.

exit status: 0 passed, 1 failed, 2 wrong usage
"""

import collections
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from mesh_transformer.scripts.stress.fault_injection import (
    STOP_SIGNALS,
    Attempt,
    CheckpointDiff,
    compare_checkpoints,
    latest_step,
    list_temporary_files,
    list_unfinished_saves,
    start_attempt,
    start_fork_server,
)

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.cli import PREEMPTED, add_set_option, make_parser, run_command
from mesh_transformer.config import Config, ConfigError, load_config
from mesh_transformer.reports.metrics_log import FILE, read_metrics
from mesh_transformer.train.data_log import BatchRecord, effective_history, read_log

SAVE_SECONDS = 0.08  # a kill during a save is sent within this time after the save began
MAX_ATTEMPT_SECONDS = 3600.0


@dataclasses.dataclass
class Result:
    """Counts of a stress test, and the problems it found."""

    kills: int = 0
    in_save: int = 0  # kills during a save, after which an unfinished save remains
    stops: int = 0
    runs: int = 0
    resumes: int = 0
    not_from_latest: int = 0  # resumes from a step that was not the latest committed step
    equal_checkpoints: int = 0  # latest checkpoints after a kill or stop that equal the uninterrupted run's
    checkpoints: int = 0  # latest checkpoints that were compared
    slowest_stop: float = 0.0  # seconds from a signal to the end of the process
    repeated_sequences: int = 0
    missing_sequences: int = 0
    first_different: str = ""  # name of the first array that differs
    ulps: int = 0
    relative_difference: float = 0.0  # largest difference divided by the largest absolute value of its array
    loss_difference: float = 0.0  # largest relative difference of a loss
    problems: list[str] = dataclasses.field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Run the stress test and print its result."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the run, for example configs/tiny.toml")
    add_set_option(parser)
    parser.add_argument("--kills", type=int, default=10, help="total number of kills (SIGKILL); default: %(default)s")
    parser.add_argument(
        "--in-save",
        type=float,
        default=0.5,
        metavar="FRACTION",
        help="minimum fraction of kills during a save; default: %(default)s",
    )
    parser.add_argument(
        "--terms", type=int, default=2, help="total number of stops by SIGTERM, SIGINT or SIGUSR1; default: %(default)s"
    )
    parser.add_argument(
        "--mesh-after", metavar="AXES", help="mesh of every second attempt, for example fsdp=2,cpu_devices=4"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="relative tolerance of losses on another mesh; default: %(default)s",
    )
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="send no kills or stops after this many minutes; default: no limit"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times; default: %(default)s")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    axes = parse_axes(options.mesh_after) if options.mesh_after else []
    load_config(options.config, [*options.set, *axes])
    work = options.work or Path(tempfile.mkdtemp(prefix="stress-resume-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        result = ResumeTest(options, work, axes).run()
    finally:
        if not options.work:
            shutil.rmtree(work)
    print(json.dumps(dataclasses.asdict(result)) if options.json else format_result(result, bool(axes)))
    return 1 if result.problems else 0


def parse_axes(text: str) -> list[str]:
    """Return the config overrides for `fsdp=2,cpu_devices=4`. Raises ConfigError for text of another form."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and number.isdigit() for name, _, number in pairs):
        raise ConfigError(f"--mesh-after {text}: expected AXIS=SIZE,..., for example fsdp=2,tensor=2,cpu_devices=4")
    return [f"mesh.{name}={number}" for name, _, number in pairs]


def format_result(result: Result, other_mesh: bool) -> str:
    """Return the counts and problems of a stress test as lines of text."""
    lines = [
        f"{result.runs} interrupted runs: {result.kills} kills, {result.in_save} of them during a save; "
        f"{result.stops} stops, the slowest took {result.slowest_stop:.1f} s",
        f"{result.resumes} resumes, {result.not_from_latest} of them not from the latest committed step",
        f"{result.equal_checkpoints} of {result.checkpoints} checkpoints after a kill or stop equal the uninterrupted "
        "run's, bit for bit",
        f"sequences used more often than in the uninterrupted run: {result.repeated_sequences}, less often: "
        f"{result.missing_sequences}",
        f"first array that differs: {result.first_different or 'none'}; largest difference: {result.ulps} ulps, "
        f"{result.relative_difference:.3g} of the array's largest value",
        f"largest relative difference of a loss: {result.loss_difference:.3g}"
        + (" (two meshes)" if other_mesh else ""),
        *(f"PROBLEM: {problem}" for problem in result.problems),
    ]
    return "\n".join([*lines, "failed" if result.problems else "passed"])


class ResumeTest:
    """Two uninterrupted runs, and interrupted runs that must equal the first."""

    def __init__(self, options: Namespace, work: Path, axes: list[str]):
        self.options = options
        self.work = work
        self.axes = axes  # overrides of every second attempt
        self.result = Result()
        self.random = random.Random(options.seed)
        self.uninterrupted = work / "uninterrupted"
        self.n_starts: dict[Path, int] = {}  # attempts of each run that started training
        self.attempt_seconds = 0.0  # of an uninterrupted attempt
        self.deadline = time.monotonic() + 60 * options.minutes
        start_fork_server(str(work / "compiled"))

    def run(self) -> Result:
        every = self.config(self.uninterrupted).checkpoint.every
        attempt = self.start(self.uninterrupted, [f"checkpoint.keep_every={every}"], self.work / "uninterrupted.log")
        if attempt.wait(MAX_ATTEMPT_SECONDS):
            raise RuntimeError(f"the uninterrupted run failed:\n{attempt.log_tail()}")
        self.check_data_log(self.uninterrupted)
        if self.axes:  # compile the steps of the other mesh before anything is timed
            self.start(self.work / "other-mesh", self.axes, self.work / "other-mesh.log").wait(MAX_ATTEMPT_SECONDS)
        # A second run with the same seed must be equal, and measures an attempt with a warm compilation cache.
        attempt = self.start(self.work / "again", [], self.work / "again.log")
        if attempt.wait(MAX_ATTEMPT_SECONDS):
            raise RuntimeError(f"the second uninterrupted run failed:\n{attempt.log_tail()}")
        self.attempt_seconds = time.monotonic() - attempt.started
        self.compare_runs(self.work / "again", same_mesh=True)
        while self.has_faults_left() and self.result.runs < 10 + 2 * (self.options.kills + self.options.terms):
            self.interrupt_run(self.work / f"run_{self.result.runs}")
            self.result.runs += 1
        if self.has_faults_left():
            self.add_problem(
                f"{self.result.runs} runs ended before all kills and stops were sent ({self.result.kills} kills, "
                f"{self.result.stops} stops); set a larger train.steps or checkpoint.every"
            )
        return self.result

    def has_faults_left(self) -> bool:
        """Return whether kills or stops remain to be sent."""
        if time.monotonic() > self.deadline:
            return False
        wanted_in_save = round(self.options.in_save * self.options.kills)
        return (
            self.result.kills < self.options.kills
            or self.result.in_save < wanted_in_save
            or self.result.stops < self.options.terms
        )

    def config(self, run_dir: Path) -> Config:
        return load_config(self.options.config, self.overrides(run_dir))

    def overrides(self, run_dir: Path) -> list[str]:
        """Return the config overrides that all runs of the test have in common."""
        return [*self.options.set, f"run.dir={json.dumps(str(run_dir))}", "track.sequences=true", "train.log_every=1"]

    def start(self, run_dir: Path, overrides: list[str], log: Path) -> Attempt:
        return start_attempt(self.options.config, [*self.overrides(run_dir), *overrides], log)

    def interrupt_run(self, run_dir: Path) -> None:
        """Start and interrupt attempts at one run until one finishes it, then compare the run."""
        root = run_dir / "checkpoints"
        log = self.work / f"{run_dir.name}.log"
        for number in range(10**6):
            latest = latest_step(root)
            attempt = self.start(run_dir, self.axes if number % 2 else [], log)
            if self.has_faults_left():
                self.interrupt(attempt, root)
            status = attempt.wait(MAX_ATTEMPT_SECONDS)
            self.check_first_step(run_dir, number, latest)
            if status == 0:
                break
            if status not in (PREEMPTED, -signal.SIGKILL):
                self.add_problem(
                    f"{run_dir.name}: attempt {number} ended with status {status}, expected 0, {PREEMPTED} or {-signal.SIGKILL}: "
                    f"{attempt.log_tail()}"
                )
                return
            self.check_latest(root)
        self.compare_runs(run_dir, same_mesh=not self.axes)
        if not self.result.problems:
            shutil.rmtree(run_dir)

    def interrupt(self, attempt: Attempt, root: Path) -> None:
        """Kill or stop an attempt at a random moment, and count the fault if the attempt was still running."""
        result = self.result
        kills_left = self.options.kills - result.kills
        stops_left = self.options.terms - result.stops
        is_stop = self.random.random() * max(kills_left + stops_left, 1) < stops_left
        if not is_stop and result.in_save < self.options.in_save * max(result.kills, 1):
            wait_for_save(attempt, root, self.random.randint(1, 4))
            time.sleep(self.random.uniform(0, SAVE_SECONDS))
        else:
            attempt.wait(self.random.uniform(0, self.attempt_seconds))
        if not attempt.is_running():
            return
        if is_stop:
            self.stop(attempt, STOP_SIGNALS[result.stops % len(STOP_SIGNALS)])
            return
        attempt.send_signal(signal.SIGKILL)
        if attempt.wait(MAX_ATTEMPT_SECONDS) == -signal.SIGKILL:
            result.kills += 1
            result.in_save += bool(list_unfinished_saves(root))

    def stop(self, attempt: Attempt, number: signal.Signals) -> None:
        """Send a stop signal, and count the stop if the attempt ends as preempted."""
        sent = time.monotonic()
        attempt.send_signal(number)
        status = attempt.wait(MAX_ATTEMPT_SECONDS)
        if status == PREEMPTED:
            self.result.stops += 1
            self.result.slowest_stop = max(self.result.slowest_stop, time.monotonic() - sent)
        elif status and status != -number:  # -number: the signal arrived before the program installed its handler
            self.add_problem(
                f"{number.name} ended the attempt with status {status}, expected {PREEMPTED}: {attempt.log_tail()}"
            )

    def check_latest(self, root: Path) -> None:
        """Check that the latest checkpoint is intact and, on the same mesh, equals the uninterrupted run's."""
        step = latest_step(root)
        if not step:
            return
        if problems := Store(root, writable=False).verify(step):
            self.add_problem(f"{root.parent.name}: step {step} is damaged: {problems[0]}")
        elif not self.axes and (self.uninterrupted / "checkpoints" / f"step_{step}").is_dir():
            self.result.checkpoints += 1
            diff = compare_checkpoints(self.uninterrupted / "checkpoints", root, step)
            self.result.equal_checkpoints += not diff.n_different
            self.check_equal(diff, root.parent.name)

    def check_first_step(self, run_dir: Path, number: int, latest: int) -> None:
        """Check that an attempt, if it started training, resumed from the latest step at its start."""
        attempts = read_log(run_dir)
        if len(attempts) <= self.n_starts.get(run_dir, 0):
            return
        self.n_starts[run_dir] = len(attempts)
        if not number:
            return
        self.result.resumes += 1
        first_step = attempts[-1][0]
        if first_step != latest:
            self.result.not_from_latest += 1
            self.add_problem(
                f"{run_dir.name}: attempt {number} resumed from step {first_step}, but the latest committed step was {latest}"
            )

    def compare_runs(self, run_dir: Path, *, same_mesh: bool) -> None:
        """Compare a finished run with the uninterrupted one: bits, losses, data, temporary files."""
        steps = self.config(run_dir).train.steps
        diff = compare_checkpoints(self.uninterrupted / "checkpoints", run_dir / "checkpoints", steps)
        if same_mesh:
            self.check_equal(diff, run_dir.name)
        else:
            self.record_diff(diff)
        expected = read_losses(self.uninterrupted)
        losses = read_losses(run_dir)
        if list(losses) != list(expected):
            first = list(losses)[:3]
            last = list(losses)[-3:]
            self.add_problem(
                f"{run_dir.name}: the metrics log has the steps {first} ... {last}, the uninterrupted run's 1 to {max(expected)}"
            )
        differences = [abs(losses[step] / expected[step] - 1) for step in expected if step in losses]
        self.result.loss_difference = max([self.result.loss_difference, *differences])
        if self.result.loss_difference > (0.0 if same_mesh else self.options.tolerance):
            self.add_problem(
                f"{run_dir.name}: a loss differs by {self.result.loss_difference:.3g} (relative), more than allowed"
            )
        self.compare_data(
            effective_history(read_log(self.uninterrupted)), effective_history(read_log(run_dir)), run_dir.name
        )
        if leftovers := list_temporary_files(run_dir):
            self.add_problem(f"{run_dir.name}: temporary files remain: {leftovers[:5]}")

    def compare_data(self, expected: dict[int, BatchRecord], used: dict[int, BatchRecord], name: str) -> None:
        """Check that every step used the same sequences as in the uninterrupted run."""
        expected_counts = count_sequences(expected)
        used_counts = count_sequences(used)
        self.result.repeated_sequences += (used_counts - expected_counts).total()
        self.result.missing_sequences += (expected_counts - used_counts).total()
        if expected != used:
            steps = [step for step in expected.keys() | used.keys() if expected.get(step) != used.get(step)]
            self.add_problem(f"{name}: {len(steps)} steps used other sequences, the first is step {min(steps)}")

    def check_data_log(self, run_dir: Path) -> None:
        """Check the token digests in the data log against the sequences that it lists."""
        from mesh_transformer.data.dataset import open_data
        from mesh_transformer.train.data_log import digest_tokens

        loader = open_data(self.config(run_dir)).train
        for step, batch in effective_history(read_log(run_dir)).items():
            if digest_tokens(loader.read_sequences(batch.sequences).tokens) != batch.digest:
                self.add_problem(
                    f"{run_dir.name}: step {step}: the digest in the data log differs from the digest of the logged sequences"
                )
                return

    def check_equal(self, diff: CheckpointDiff, name: str) -> None:
        """Record a problem if any array differs."""
        if diff.n_different:
            self.record_diff(diff)
            self.add_problem(
                f"{name}: step {diff.step}: {diff.n_different} of {diff.n_arrays} arrays differ, the first is "
                f"{diff.first}; at most {diff.ulps} ulps"
            )

    def record_diff(self, diff: CheckpointDiff) -> None:
        result = self.result
        result.first_different = result.first_different or diff.first
        result.ulps = max(result.ulps, diff.ulps)
        result.relative_difference = max(result.relative_difference, diff.relative)

    def add_problem(self, text: str) -> None:
        self.result.problems.append(text)


def count_sequences(history: dict[int, BatchRecord]) -> collections.Counter[tuple[int, int]]:
    """Return how often each (source, sequence) is used."""
    return collections.Counter(sequence for batch in history.values() for sequence in batch.sequences)


def read_losses(run_dir: Path) -> dict[int, float]:
    """Return the losses in metrics.jsonl by step."""
    return {line["step"]: line["loss"] for line in read_metrics(run_dir / FILE) if line["kind"] == "train"}


def wait_for_save(attempt: Attempt, root: Path, count: int) -> None:
    """Wait until the attempt has begun its `count`-th save, or has ended."""
    names: set[str] = set()
    mark = f"-{attempt.pid}-"
    while len(names) < count and attempt.is_running():
        names |= {name for name in (os.listdir(root) if root.is_dir() else ()) if ".tmp-" in name and mark in name}
        time.sleep(0.0005)


if __name__ == "__main__":
    sys.exit(run_command(main))
