# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Keep a command going: start it again when it was preempted, crashed or hangs; every launcher here calls this.

On each host the supervisor runs one process of a run. A process that is lost ends the others within a minute
(mesh_transformer/distributed/bootstrap.py), so that all supervisors start theirs again, and training goes on from the newest
checkpoint. After a crash it pauses, twice as long each time up to five minutes; attempts that come no further than
starting are counted, and there are --tries of them. A run hangs when it passes no step for --hang-minutes: training
touches the file that MESH_TRANSFORMER_PROGRESS names at every step.

Signals are passed on to the command. Once it has been asked to stop in this way it is not started again.

examples:
  python scripts/launch/supervise.py -- python device_train.py configs/quickstart.toml
      until it is done, whatever happens meanwhile
  python scripts/launch/supervise.py --leave-preempted -- python device_train.py run.toml
      under a scheduler that starts it again itself when it exits with 75

exit status: 0 done, 2 wrong usage or configuration, 75 preempted, else that of the last try
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from mesh_transformer.cli import DONE, FAILED, PREEMPTED, WRONG_USAGE, make_parser, run_command
from mesh_transformer.distributed.stop import PROGRESS_VARIABLE, SIGNALS

LONGEST_PAUSE = 300.0
KILL_SECONDS = 30.0  # after SIGTERM to a command that hangs


def main(arguments: list[str]) -> int:
    """Parse and supervise."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--tries", type=int, default=10, help="in a row that fail without a step; default: %(default)s")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds after the first crash; default: %(default)s")
    parser.add_argument("--hang-minutes", type=float, default=30.0, help="without a step; default: %(default)s")
    parser.add_argument("--leave-preempted", action="store_true", help="exit with 75 instead of starting again")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run and stop")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if not command:
        parser.error("the command follows behind --, as in: supervise.py -- python device_train.py CONFIG")
    if options.dry_run:
        print(*command)
        return DONE
    with tempfile.TemporaryDirectory() as folder:
        return Supervisor(command, options, Path(folder) / "progress").run()


class Supervisor:
    """One command, again and again."""

    def __init__(self, command: list[str], options: Namespace, progress: Path):
        self.command, self.options, self.progress = command, options, progress
        self.child: subprocess.Popen[bytes] | None = None
        self.asked = False

    def run(self) -> int:
        """Until it is done, wrong, asked to stop, or out of tries; the exit status."""
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        tries, environment = 0, {**os.environ, PROGRESS_VARIABLE: str(self.progress)}
        while True:
            self.progress.unlink(missing_ok=True)
            status = self._run_once(environment)
            if status in (DONE, WRONG_USAGE) or self.asked:
                return status
            tries = 1 if self.progress.exists() else tries + 1
            if status == PREEMPTED and self.options.leave_preempted:
                return status
            if tries >= self.options.tries:
                say(f"gave up after {tries} tries without a step")
                return status
            pause = 0.0 if status == PREEMPTED else min(self.options.pause * 2 ** (tries - 1), LONGEST_PAUSE)
            say(f"ended with status {status}; starting again in {pause:g} s (try {tries + 1} of {self.options.tries})")
            end = time.monotonic() + pause
            while time.monotonic() < end and not self.asked:
                time.sleep(0.1)
            if self.asked:
                return PREEMPTED

    def _run_once(self, environment: Mapping[str, str]) -> int:
        started = time.time()
        self.child = subprocess.Popen(self.command, env=environment, start_new_session=True)
        if self.asked:  # between two tries
            self.child.terminate()
        while self.child.poll() is None:
            last = self.progress.stat().st_mtime if self.progress.exists() else started
            if time.time() - last > 60 * self.options.hang_minutes:
                say(f"no step for {self.options.hang_minutes:g} minutes: ending it")
                self._end()
            time.sleep(0.1)
        status = self.child.returncode
        self._kill_group()  # what it had started
        return status if status >= 0 else FAILED

    def _end(self) -> None:
        assert self.child is not None, "it runs"
        self.child.terminate()
        end = time.monotonic() + min(KILL_SECONDS, 60 * self.options.hang_minutes)
        while self.child.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        self._kill_group()
        self.child.wait()

    def _kill_group(self) -> None:
        assert self.child is not None, "it was started"
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:  # nothing is left of it
            return

    def _pass_on(self, number: int, _frame: object) -> None:
        self.asked = True
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)


def say(text: str) -> None:
    """One line on stderr."""
    print(f"supervise: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
