# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Local launcher: start a command as several processes of one run on this machine, for tests or for one process per GPU.

Each process gets its index in the environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID). Output lines of
all processes except process 0 begin with the process index. Signals are forwarded to all processes. If one process fails,
the others have --grace seconds to exit before they are killed.

examples:
  python scripts/launch/local.py 2 -- python device_train.py configs/quickstart.toml --set mesh.cpu_devices=4
      two processes with four CPU devices each
  python scripts/launch/local.py 4 --port 9999 -- python device_train.py run.toml
      with a fixed port for the coordinator

exit status: 0 all done, 75 all preempted (run again to continue), else the status of the first process that failed
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

from mesh_transformer.cli import FAILED, PREEMPTED, make_parser, run_command
from mesh_transformer.distributed.stop import SIGNALS


def main(arguments: list[str]) -> int:
    """Start the processes, forward signals and output, and wait."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("processes", type=int, metavar="N", help="number of processes")
    parser.add_argument(
        "--port", type=int, default=0, help="port of the coordinator in process 0; default: a free port"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=60.0,
        help="time limit in seconds for the other processes to exit after one failed; default: %(default)s",
    )
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    command = arguments[split + 1 :]
    if not command:
        parser.error("no command; put it after --, for example: local.py 2 -- python device_train.py CONFIG")
    if options.processes < 1:
        parser.error(f"N is {options.processes}, but must be at least 1")
    processes = start_processes(command, options.processes, port=options.port)

    def forward(number: int, _frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, forward)
    return wait_for_all(processes, grace=options.grace)


def find_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_processes(
    command: Sequence[str], count: int, *, port: int = 0, output: IO[str] | None = None, **environment: str
) -> list[subprocess.Popen[str]]:
    """Start `command` as processes 0 to `count - 1` of a run; their lines go to `output` (default: stdout)."""
    address = f"127.0.0.1:{port or find_port()}"
    processes = []
    for index in range(count):
        variables = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment, **variables},
            start_new_session=True,  # so that it gets Ctrl-C once, forwarded by this process
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        threading.Thread(target=_copy_lines, args=(process, index, output or sys.stdout), daemon=True).start()
        processes.append(process)
    return processes


def wait_for_all(processes: Sequence[subprocess.Popen[str]], *, grace: float) -> int:
    """Wait for all processes, and return their common exit status as the module's docstring defines it."""
    first_failure = 0
    deadline = None
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.poll() not in (None, 0)]
        if failed and deadline is None:
            first_failure = failed[0]
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    statuses = [process.wait() for process in processes]
    if set(statuses) <= {0} or set(statuses) == {PREEMPTED}:
        return statuses[0]
    failure = first_failure or next(status for status in statuses if status)
    return failure if failure > 0 and failure != PREEMPTED else FAILED


def _copy_lines(process: subprocess.Popen[str], index: int, output: IO[str]) -> None:
    assert process.stdout is not None, "stdout is a pipe"
    for line in process.stdout:
        output.write(f"[{index}] {line}" if index else line)
        output.flush()


if __name__ == "__main__":
    sys.exit(run_command(main))
