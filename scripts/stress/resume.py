# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Train without interruption, and again under kills and stops; prove that both end in the same bits and saw the same data.

examples:
  python scripts/stress/resume.py configs/tiny.toml --kills 200 --terms 20
      half of the kills at any moment of an attempt's life, half inside a save (--in-save); then the parameters,
      the optimizer's state and everything else in the last checkpoint are compared bit for bit
  python scripts/stress/resume.py configs/tiny.toml --kills 20 --mesh-after fsdp=2,tensor=2,cpu_devices=4 --json
      every other attempt goes on on that mesh: bits may differ there, losses by --tolerance, the data not at all

An interrupted run is one run folder with as many attempts as it takes; there are as many runs as the kills need. After
every kill the newest checkpoint must be whole and, on the same mesh, equal to that of the uninterrupted run at the same
step; the next attempt must begin from it. A stop (SIGTERM, SIGINT and SIGUSR1 in turn) must end with status 75 and a
checkpoint of the last step begun.

exit status: 0 proved, 1 not, 2 wrong usage
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
from pathlib import Path
from typing import Any

from mesh_transformer.scripts.stress.fault_injection import (
    Attempt,
    compare_steps,
    list_debris,
    list_unfinished,
    start_attempt,
    start_server,
)

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.cli import PREEMPTED, add_set_option, make_parser, run_command
from mesh_transformer.config import Config, ConfigError, load_config
from mesh_transformer.reports.metrics_log import FILE, read_metrics
from mesh_transformer.train.data_log import BatchRecord, read_log, effective_history

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAVE_SECONDS = 0.08  # within which after a save's beginning a kill meant for it comes
LONGEST = 3600.0  # seconds an attempt may take


@dataclasses.dataclass
class Tally:
    """What was counted, and what was wrong."""

    kills: int = 0
    in_save: int = 0  # kills that left an unfinished save
    stops: int = 0
    runs: int = 0
    resumes: int = 0
    not_newest: int = 0  # resumes from another step than the newest committed one
    equal_checkpoints: int = 0  # newest checkpoints after a kill or stop that equal the uninterrupted run's
    checkpoints: int = 0  # of so many compared
    slowest_stop: float = 0.0  # seconds from a signal to the end
    seen_twice: int = 0
    never_seen: int = 0
    first_differing: str = ""
    ulps: int = 0
    difference: float = 0.0  # the largest of a leaf, in shares of its largest value
    loss_difference: float = 0.0  # largest relative one
    problems: list[str] = dataclasses.field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Parse, prove, print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, such as configs/tiny.toml")
    add_set_option(parser)
    parser.add_argument("--kills", type=int, default=10, help="kill -9, so many in all")
    parser.add_argument("--in-save", type=float, default=0.5, metavar="SHARE", help="of them inside a save, at least")
    parser.add_argument("--terms", type=int, default=2, help="stops by SIGTERM, SIGINT and SIGUSR1, so many in all")
    parser.add_argument("--mesh-after", metavar="AXES", help="the mesh of every other attempt: fsdp=2,cpu_devices=4")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of losses on another mesh, relative")
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="after these no more kills, whatever is still to come"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, help="folder for the runs; by default a passing one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    axes = parse_axes(options.mesh_after) if options.mesh_after else []
    load_config(options.config, [*options.set, *axes])
    work = options.work or Path(tempfile.mkdtemp(prefix="prove-resume-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        tally = Proof(options, work, axes).run()
    finally:
        if not options.work:
            shutil.rmtree(work)
    print(json.dumps(dataclasses.asdict(tally)) if options.json else format_tally(tally, bool(axes)))
    return 1 if tally.problems else 0


def parse_axes(text: str) -> list[str]:
    """`fsdp=2,cpu_devices=4` as overrides; ConfigError if it is not of that form."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and number.isdigit() for name, _, number in pairs):
        raise ConfigError(f"--mesh-after {text}: expected AXIS=SIZE,..., for example fsdp=2,tensor=2,cpu_devices=4")
    return [f"mesh.{name}={number}" for name, _, number in pairs]


def format_tally(tally: Tally, other_mesh: bool) -> str:
    """A page for a person."""
    lines = [
        f"{tally.runs} interrupted runs: {tally.kills} kills, {tally.in_save} of them inside a save; {tally.stops} stops, "
        f"the slowest took {tally.slowest_stop:.1f} s",
        f"{tally.resumes} resumes, {tally.not_newest} of them not from the newest committed step",
        f"{tally.equal_checkpoints} of {tally.checkpoints} checkpoints left behind equal the uninterrupted run's, bit for bit",
        f"sequences seen twice: {tally.seen_twice}, never: {tally.never_seen}",
        f"first differing leaf: {tally.first_differing or 'none'}, {tally.ulps} ulps, {tally.difference:.3g} of its values; "
        "largest relative difference of a loss: "
        f"{tally.loss_difference:.3g}" + (" (two meshes)" if other_mesh else ""),
    ]
    return "\n".join(
        [*lines, *(f"PROBLEM: {problem}" for problem in tally.problems), *([] if tally.problems else ["proved"])]
    )


class Proof:
    """The uninterrupted run, and the interrupted ones beside it."""

    def __init__(self, options: Any, work: Path, axes: list[str]):
        self.options, self.work, self.axes = options, work, axes
        self.tally, self.random = Tally(), random.Random(options.seed)
        self.straight = work / "straight"
        self.begun: dict[Path, int] = {}  # attempts that came to train, by run
        self.life = 0.0  # seconds of an uninterrupted attempt
        self.until = time.monotonic() + 60 * options.minutes
        start_server(str(work / "compiled"))

    def run(self) -> Tally:
        """Everything in order."""
        every = self.config(self.straight).checkpoint.every
        attempt = self.start(self.straight, [f"checkpoint.keep_every={every}"], self.work / "straight.log")
        if attempt.wait(LONGEST):
            raise RuntimeError(f"the uninterrupted run failed:\n{attempt.last_words()}")
        self.check_data(self.straight)
        if self.axes:  # so that its steps are compiled before anything is timed
            self.start(self.work / "other-mesh", self.axes, self.work / "other-mesh.log").wait(LONGEST)
        attempt = self.start(self.work / "again", [], self.work / "again.log")  # the same seed twice; and timed
        if attempt.wait(LONGEST):
            raise RuntimeError(f"the second uninterrupted run failed:\n{attempt.last_words()}")
        self.life = time.monotonic() - attempt.started
        self.compare_runs(self.work / "again", same_mesh=True)
        while self.is_left() and self.tally.runs < 10 + 2 * (self.options.kills + self.options.terms):
            self.interrupt_run(self.work / f"run_{self.tally.runs}")
            self.tally.runs += 1
        if self.is_left():
            self.problem("the runs were over before all kills were placed; use more steps, or rarer saves")
        return self.tally

    def is_left(self) -> bool:
        """Whether kills or stops are still to come."""
        tally, options = self.tally, self.options
        if time.monotonic() > self.until:
            return False
        wanted = round(options.in_save * options.kills)
        return tally.kills < options.kills or tally.in_save < wanted or tally.stops < options.terms

    def config(self, run_dir: Path) -> Config:
        """The configuration of a run."""
        return load_config(self.options.config, self.overrides(run_dir))

    def overrides(self, run_dir: Path) -> list[str]:
        """What every run of the proof says otherwise than its file."""
        return [*self.options.set, f"run.dir={json.dumps(str(run_dir))}", "track.sequences=true", "train.log_every=1"]

    def start(self, run_dir: Path, more: list[str], log: Path) -> Attempt:
        """An attempt at a run."""
        return start_attempt(self.options.config, [*self.overrides(run_dir), *more], log)

    def interrupt_run(self, run_dir: Path) -> None:
        """One run: attempts, each killed or stopped, until one comes through; then everything is compared."""
        root, log = run_dir / "checkpoints", self.work / f"{run_dir.name}.log"
        for number in range(10**6):
            before = newest(root)
            attempt = self.start(run_dir, self.axes if number % 2 else [], log)
            if self.is_left():
                self.interrupt(attempt, root)
            status = attempt.wait(LONGEST)
            self.check_resume(run_dir, number, before)
            if status == 0:
                break
            if status not in (PREEMPTED, -signal.SIGKILL):
                return self.problem(f"{run_dir.name}: attempt {number} ended with {status}: {attempt.last_words()}")
            self.check_newest(root)
        self.compare_runs(run_dir, same_mesh=not self.axes)
        if not any(self.tally.problems):
            shutil.rmtree(run_dir)

    def interrupt(self, attempt: Attempt, root: Path) -> None:
        """Kill or stop an attempt at a random moment, and count it if it was still running."""
        tally, options = self.tally, self.options
        left = [options.kills - tally.kills, options.terms - tally.stops]
        stops = self.random.random() * max(sum(left), 1) < left[1]
        in_save = not stops and tally.in_save < options.in_save * max(tally.kills, 1)
        if in_save:
            wait_for_save(attempt, root, self.random.randint(1, 4))
            time.sleep(self.random.uniform(0, SAVE_SECONDS))
        else:
            attempt.wait(self.random.uniform(0, self.life))
        if not attempt.is_running():
            return
        if stops:
            number = STOPS[tally.stops % len(STOPS)]
            sent = time.monotonic()
            attempt.send(number)
            status = attempt.wait(LONGEST)
            if status == PREEMPTED:
                tally.stops += 1
                tally.slowest_stop = max(tally.slowest_stop, time.monotonic() - sent)
            elif status == -number:
                pass  # before the program itself had begun: nothing to stop, nothing lost
            elif status:
                self.problem(f"{number.name} ended with status {status}: {attempt.last_words()}")
            return
        attempt.send(signal.SIGKILL)
        if attempt.wait(LONGEST) == -signal.SIGKILL:
            tally.kills += 1
            tally.in_save += bool(list_unfinished(root))

    def check_newest(self, root: Path) -> None:
        """What a kill left must be whole, and on the same mesh what the uninterrupted run had at that step."""
        step = newest(root)
        if not step:
            return
        if problems := Store(root, writable=False).verify(step):
            self.problem(f"{root.parent.name}: step {step} is damaged: {problems[0]}")
        elif not self.axes and (self.straight / "checkpoints" / f"step_{step}").is_dir():
            self.tally.checkpoints += 1
            result = compare_steps(self.straight / "checkpoints", root, step)
            self.tally.equal_checkpoints += not result["different"]
            self.note_difference(result, root.parent.name)

    def check_resume(self, run_dir: Path, number: int, before: int) -> None:
        """The attempt began from what was newest when it started, if it came to begin."""
        attempts = read_log(run_dir)
        if len(attempts) > self.begun.get(run_dir, 0):
            if number:
                self.tally.resumes += 1
                if attempts[-1][0] != before:
                    self.tally.not_newest += 1
                    self.problem(f"{run_dir.name}: attempt {number} began from {attempts[-1][0]}, newest was {before}")
            self.begun[run_dir] = len(attempts)

    def compare_runs(self, run_dir: Path, *, same_mesh: bool) -> None:
        """The end of a run beside that of the first uninterrupted one: bits, losses, data, debris."""
        steps = self.config(run_dir).train.steps
        result = compare_steps(self.straight / "checkpoints", run_dir / "checkpoints", steps)
        if not same_mesh:
            self.tally.first_differing = self.tally.first_differing or result["first"] or ""
            self.tally.ulps = max(self.tally.ulps, result["ulps"])
            self.tally.difference = max(self.tally.difference, result["difference"])
        else:
            self.note_difference(result, run_dir.name)
        there, here = (read_losses(path) for path in (self.straight, run_dir))
        if list(here) != list(there):
            self.problem(f"{run_dir.name}: its metrics hold the steps {list(here)[:3]} ... {list(here)[-3:]}")
        differences = [abs(here[step] / there[step] - 1) for step in there if step in here]
        self.tally.loss_difference = max(self.tally.loss_difference, *differences)
        if self.tally.loss_difference > (0.0 if same_mesh else self.options.tolerance):
            self.problem(f"{run_dir.name}: a loss differs by {self.tally.loss_difference:.3g} of it")
        self.compare_data(effective_history(read_log(self.straight)), effective_history(read_log(run_dir)), run_dir.name)
        if debris := list_debris(run_dir):
            self.problem(f"{run_dir.name}: left behind: {debris[:5]}")

    def compare_data(self, there: dict[int, BatchRecord], here: dict[int, BatchRecord], name: str) -> None:
        """Every sequence as often as the uninterrupted run saw it, and in the same step."""
        counts = [
            collections.Counter(one for given in side.values() for one in given.sequences) for side in (there, here)
        ]
        twice, never = counts[1] - counts[0], counts[0] - counts[1]
        self.tally.seen_twice += sum(twice.values())
        self.tally.never_seen += sum(never.values())
        if there != here:
            steps = [step for step in there.keys() | here.keys() if there.get(step) != here.get(step)]
            self.problem(f"{name}: {len(steps)} steps saw other sequences, the first of them step {min(steps)}")

    def check_data(self, run_dir: Path) -> None:
        """The record says what the steps were given: its numbers lead to tokens with its digest."""
        from mesh_transformer.data.dataset import open_data
        from mesh_transformer.train.data_log import digest_tokens

        loader = open_data(self.config(run_dir)).train
        for step, given in effective_history(read_log(run_dir)).items():
            if digest_tokens(loader.read_sequences(given.sequences).tokens) != given.digest:
                return self.problem(f"{run_dir.name}: step {step} was given other tokens than its record says")

    def note_difference(self, result: dict[str, Any], name: str) -> None:
        """A difference where there must be none."""
        if result["different"]:
            self.tally.first_differing = self.tally.first_differing or result["first"]
            self.tally.ulps = max(self.tally.ulps, result["ulps"])
            self.problem(
                f"{name}: step {result['step']}: {result['different']} of {result['leaves']} leaves differ, the first "
                f"{result['first']}, {result['ulps']} ulps"
            )

    def problem(self, text: str) -> None:
        """Note it, and go on."""
        self.tally.problems.append(text)


def newest(root: Path) -> int:
    """The newest committed step, 0 if there is none."""
    return max(Store(root, writable=False).steps(), default=0)


def read_losses(run_dir: Path) -> dict[int, float]:
    """The losses of metrics.jsonl by step."""
    return {line["step"]: line["loss"] for line in read_metrics(run_dir / FILE) if line["kind"] == "train"}


def wait_for_save(attempt: Attempt, root: Path, count: int) -> None:
    """Until the attempt has begun to write so many checkpoints, or has ended."""
    seen: set[str] = set()
    mark = f"-{attempt.pid}-"
    while len(seen) < count and attempt.is_running():
        seen |= {name for name in (os.listdir(root) if root.is_dir() else ()) if ".tmp-" in name and mark in name}
        time.sleep(0.0005)


if __name__ == "__main__":
    sys.exit(run_command(main))
