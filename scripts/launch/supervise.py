# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Supervisor: run a command and restart it when it is preempted, crashes or hangs. All other launchers use it.

On each host the supervisor runs one process of a run. If a process is lost, the others exit within a minute
(mesh_transformer/distributed/watchdog.py); all supervisors then restart their processes, and training resumes from the
latest checkpoint. After a crash the supervisor pauses; the pause doubles with each consecutive crash, up to five minutes. The
supervisor exits after --max-failures consecutive failures without a training step. A run counts as hung if it takes no step
for --hang-minutes: at every step, training touches the file in the environment variable MESH_TRANSFORMER_PROGRESS.

Signals are forwarded to the command. After a signal the command is not restarted.

examples:
  python scripts/launch/supervise.py -- python device_train.py configs/quickstart.toml
      train until the run is complete
  python scripts/launch/supervise.py --no-restart-on-preemption -- python device_train.py run.toml
      for a scheduler that restarts the job itself when it exits with 75

exit status: 0 done, 2 wrong usage or configuration, 75 preempted, else the status of the last attempt
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

MAX_PAUSE_SECONDS = 300.0
KILL_SECONDS = 30.0  # from SIGTERM to SIGKILL for a hung command


def main(arguments: list[str]) -> int:
    """Supervise the command that follows "--"."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "--max-failures",
        type=int,
        default=10,
        help="number of consecutive failures without a step after which to exit; default: %(default)s",
    )
    parser.add_argument(
        "--pause", type=float, default=5.0, help="seconds to pause after the first crash; default: %(default)s"
    )
    parser.add_argument(
        "--hang-minutes",
        type=float,
        default=30.0,
        help="minutes without a step after which to end and restart the command; default: %(default)s",
    )
    parser.add_argument(
        "--no-restart-on-preemption", action="store_true", help="exit with 75 instead of restarting the command"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and exit")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    command = arguments[split + 1 :]
    if not command:
        parser.error("no command; put it after --, for example: supervise.py -- python device_train.py CONFIG")
    if options.dry_run:
        print(*command)
        return DONE
    with tempfile.TemporaryDirectory() as folder:
        return Supervisor(command, options, Path(folder) / "progress").run()


class Supervisor:
    """Runs one command and restarts it."""

    def __init__(self, command: list[str], options: Namespace, progress: Path):
        self.command = command
        self.options = options
        self.progress = progress  # file that the command touches at every step
        self.child: subprocess.Popen[bytes] | None = None
        self.stop_requested = False

    def run(self) -> int:
        """Run the command until it is done, misconfigured, stopped, or failed too often; return its last exit status."""
        for number in SIGNALS:
            signal.signal(number, self._forward_signal)
        environment = {**os.environ, PROGRESS_VARIABLE: str(self.progress)}
        max_failures = self.options.max_failures
        failures = 0
        while True:
            self.progress.unlink(missing_ok=True)
            status = self._run_once(environment)
            if status in (DONE, WRONG_USAGE) or self.stop_requested:
                return status
            failures = 1 if self.progress.exists() else failures + 1
            if status == PREEMPTED and self.options.no_restart_on_preemption:
                return status
            if failures >= max_failures:
                log(
                    f"{failures} consecutive failures without a step (--max-failures {max_failures}), the last with exit status "
                    f"{status}; correct the error above, and run the same command again to resume"
                )
                return status
            pause = 0.0 if status == PREEMPTED else min(self.options.pause * 2 ** (failures - 1), MAX_PAUSE_SECONDS)
            reason = "preempted" if status == PREEMPTED else f"exit status {status}"
            log(f"{reason}; restarting in {pause:g} s (failure {failures} of {max_failures})")
            end = time.monotonic() + pause
            while time.monotonic() < end and not self.stop_requested:
                time.sleep(0.1)
            if self.stop_requested:
                return PREEMPTED

    def _run_once(self, environment: Mapping[str, str]) -> int:
        """Run the command until it ends or hangs, and return its exit status."""
        started = time.time()
        self.child = subprocess.Popen(self.command, env=environment, start_new_session=True)
        if self.stop_requested:  # a signal arrived just before the command started
            self.child.terminate()
        while self.child.poll() is None:
            last_step = self.progress.stat().st_mtime if self.progress.exists() else started
            if time.time() - last_step > 60 * self.options.hang_minutes:
                log(f"no step for {self.options.hang_minutes:g} minutes (--hang-minutes): ending the command")
                self._end()
            time.sleep(0.1)
        status = self.child.returncode
        self._kill_group()  # processes that the command started and did not end
        return status if status >= 0 else FAILED

    def _end(self) -> None:
        assert self.child is not None, "the command was started"
        self.child.terminate()
        end = time.monotonic() + min(KILL_SECONDS, 60 * self.options.hang_minutes)
        while self.child.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        self._kill_group()
        self.child.wait()

    def _kill_group(self) -> None:
        assert self.child is not None, "the command was started"
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:  # no process of the group is left
            return

    def _forward_signal(self, number: int, _frame: object) -> None:
        self.stop_requested = True
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)


def log(text: str) -> None:
    """Print a line on stderr."""
    print(f"supervise: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
