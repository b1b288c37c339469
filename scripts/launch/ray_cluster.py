# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A run on a Ray cluster: one supervised process on each of N nodes.

Ray chooses the nodes and restarts nothing: the supervisors do. The project is expected on every node in the folder this
program is called from, and run.dir where all nodes see the same files, or in a bucket.

examples:
  python scripts/launch/ray_cluster.py 4 --gpus 8 -- run.toml --set 'run.dir="s3://bucket/run"'
      on four nodes with eight GPUs each, of the cluster that RAY_ADDRESS names (default: the one this node is in)
  python scripts/launch/ray_cluster.py 2 --dry-run -- run.toml
      print what each node would run

exit status: 0 all done, 75 all preempted, else the first that is neither; 2 wrong usage
"""

import importlib
import os
import shlex
import subprocess
import sys
from typing import Any

from mesh_transformer.cli import DONE, PREEMPTED, make_parser, run_command
from mesh_transformer.config import ConfigError

PORT = 8476


def main(arguments: list[str]) -> int:
    """Reserve nodes, start a process on each, wait."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("nodes", type=int, metavar="N")
    parser.add_argument("--cpus", type=float, default=1.0, help="of each node to reserve; default: %(default)s")
    parser.add_argument("--gpus", type=float, default=0.0, help="of each node to reserve; default: %(default)s")
    parser.add_argument("--port", type=int, default=PORT, help="of process 0; default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the command of each node and stop")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, train = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if not train or options.nodes < 1:
        parser.error("what device_train.py is given follows behind --")
    command = [sys.executable, "scripts/launch/supervise.py", "--", sys.executable, "device_train.py", *train]
    if options.dry_run:
        for number in range(options.nodes):
            part = describe_part("NODE_0", options.port, options.nodes, number)
            print(*(f"{name}={value}" for name, value in part.items()), shlex.join(command))
        return DONE
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"a Ray cluster needs ray: pip install ray ({error})") from None
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"))
    statuses = run_on_nodes(ray, command, options.nodes, options.port, options)
    if set(statuses) <= {DONE} or set(statuses) == {PREEMPTED}:
        return statuses[0]
    return next(status for status in statuses if status not in (DONE, PREEMPTED))


def describe_part(host: str, port: int, nodes: int, number: int) -> dict[str, str]:
    """What process `number` finds in its environment."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"{host}:{port}",
        "JAX_NUM_PROCESSES": str(nodes),
        "JAX_PROCESS_ID": str(number),
    }


def run_on_nodes(ray: Any, command: list[str], nodes: int, port: int, options: Any) -> list[int]:
    """The exit status of every process."""
    resources = {"CPU": options.cpus} | ({"GPU": options.gpus} if options.gpus else {})
    group = ray.util.placement_group([resources] * nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    folder = os.getcwd()

    def start(part: dict[str, str]) -> int:
        return subprocess.run(command, cwd=folder, env={**os.environ, **part}, check=False).returncode

    def place(function: Any, number: int) -> Any:
        scheduling = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, number)
        wanted = dict(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=0, scheduling_strategy=scheduling)
        return ray.remote(function).options(**wanted)

    host = ray.get(place(ray.util.get_node_ip_address, 0).remote())
    parts = [describe_part(host, port, nodes, number) for number in range(nodes)]
    return ray.get([place(start, number).remote(part) for number, part in enumerate(parts)])


if __name__ == "__main__":
    sys.exit(run_command(main))
