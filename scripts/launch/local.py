# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""One command as several processes of one run on this machine: to try a run of many hosts, or for a process per GPU.

Each process finds its part in the environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID). Lines of all
but process 0 begin with the number of theirs. Signals are passed on to all. If one fails, the others get --grace seconds
to end by themselves before they are killed.

examples:
  python scripts/launch/local.py 2 -- python device_train.py configs/quickstart.toml --set mesh.cpu_devices=4
      eight devices made of this CPU, in two processes
  python scripts/launch/local.py 4 --port 9999 -- python device_train.py run.toml
      at a port of your choice

exit status: 0 all done, 75 all preempted (run again to continue), else that of the first process that failed
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from mesh_transformer.cli import FAILED, PREEMPTED, make_parser, run_command
from mesh_transformer.distributed.stop import SIGNALS


def main(arguments: list[str]) -> int:
    """Start, pass on signals and lines, wait."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("processes", type=int, metavar="N", help="how many")
    parser.add_argument(
        "--port", type=int, default=0, help="where process 0 listens for the others; default: a free one"
    )
    parser.add_argument(
        "--grace", type=float, default=60.0, help="seconds others have once one failed; default: %(default)s"
    )
    split = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:split], arguments[split + 1 :]
    options = parser.parse_args(own)
    if not command or options.processes < 1:
        parser.error("what is to be run follows behind --, as in: local.py 2 -- python device_train.py CONFIG")
    processes = start_processes(command, options.processes, port=options.port)
    for number in SIGNALS:
        signal.signal(number, lambda number, _: [p.send_signal(number) for p in processes if p.poll() is None])
    return wait_for_all(processes, grace=options.grace)


def find_port() -> int:
    """A port nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_processes(
    command: Sequence[str], count: int, *, port: int = 0, output: IO[str] | None = None, **environment: str
) -> list[subprocess.Popen[str]]:
    """`command` as processes 0 to `count - 1` of a run; what they print goes to `output` (default: ours), numbered."""
    address = f"127.0.0.1:{port or find_port()}"
    processes = []
    for number in range(count):
        part = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment, **part},
            start_new_session=True,  # a Ctrl-C reaches it through us, once
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        threading.Thread(target=_copy_lines, args=(process, number, output or sys.stdout), daemon=True).start()
        processes.append(process)
    return processes


def wait_for_all(processes: Sequence[subprocess.Popen[str]], *, grace: float) -> int:
    """The exit status of all together; see the module."""
    first_failure, deadline = 0, None
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.poll() not in (None, 0)]
        if failed and deadline is None:
            first_failure, deadline = failed[0], time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    codes = [process.wait() for process in processes]
    if set(codes) <= {0} or set(codes) == {PREEMPTED}:
        return codes[0]
    worst = first_failure or next(code for code in codes if code)
    return worst if worst > 0 and worst != PREEMPTED else FAILED


def _copy_lines(process: subprocess.Popen[str], number: int, output: IO[str]) -> None:
    assert process.stdout is not None, "it is a pipe"
    for line in process.stdout:
        output.write(f"[{number}] {line}" if number else line)
        output.flush()


if __name__ == "__main__":
    sys.exit(run_command(main))
