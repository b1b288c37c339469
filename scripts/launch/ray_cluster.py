# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Ray launcher: start one supervised process on each of N nodes of a Ray cluster.

Ray only selects the nodes; the supervisors restart processes. On every node the project must be in the folder from which
this program is called. run.dir must be on a file system that all nodes share, or in a bucket.

examples:
  python scripts/launch/ray_cluster.py 4 --gpus 8 -- run.toml --set 'run.dir="s3://bucket/run"'
      four nodes with eight GPUs each, in the cluster at RAY_ADDRESS (default: the cluster of this node)
  python scripts/launch/ray_cluster.py 2 --dry-run -- run.toml
      print the command of each node

exit status: 0 all done, 75 all preempted, 2 wrong usage, else the first status that is neither 0 nor 75
"""

import importlib
import os
import shlex
import subprocess
import sys
from argparse import Namespace
from typing import Any

from mesh_transformer.cli import DONE, PREEMPTED, make_parser, run_command
from mesh_transformer.config import ConfigError

PORT = 8476


def main(arguments: list[str]) -> int:
    """Reserve the nodes, start a process on each, and wait."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("nodes", type=int, metavar="N", help="number of nodes")
    parser.add_argument("--cpus", type=float, default=1.0, help="CPUs to reserve per node; default: %(default)s")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs to reserve per node; default: %(default)s")
    parser.add_argument(
        "--port", type=int, default=PORT, help="port of the coordinator in process 0; default: %(default)s"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command of each node and exit")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    train_arguments = arguments[split + 1 :]
    if not train_arguments:
        parser.error("no arguments for device_train.py; put them after --, for example: ray_cluster.py 4 -- run.toml")
    if options.nodes < 1:
        parser.error(f"N is {options.nodes}, but must be at least 1")
    command = [sys.executable, "scripts/launch/supervise.py", "--", sys.executable, "device_train.py", *train_arguments]
    if options.dry_run:
        for index in range(options.nodes):
            variables = process_environment("NODE_0", options.port, options.nodes, index)
            print(*(f"{name}={value}" for name, value in variables.items()), shlex.join(command))
        return DONE
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"this launcher needs the package ray, which is not installed: pip install ray ({error})"
        ) from None
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"))
    statuses = run_on_nodes(ray, command, options)
    if set(statuses) <= {DONE} or set(statuses) == {PREEMPTED}:
        return statuses[0]
    return next(status for status in statuses if status not in (DONE, PREEMPTED))


def process_environment(host: str, port: int, nodes: int, index: int) -> dict[str, str]:
    """Return the environment variables that identify process `index` of a run."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"{host}:{port}",
        "JAX_NUM_PROCESSES": str(nodes),
        "JAX_PROCESS_ID": str(index),
    }


def run_on_nodes(ray: Any, command: list[str], options: Namespace) -> list[int]:
    """Run the command on `options.nodes` nodes, and return the exit status of each."""
    resources = {"CPU": options.cpus} | ({"GPU": options.gpus} if options.gpus else {})
    group = ray.util.placement_group([resources] * options.nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    folder = os.getcwd()

    def run(variables: dict[str, str]) -> int:
        return subprocess.run(command, cwd=folder, env={**os.environ, **variables}, check=False).returncode

    def remote_on(node: int, function: Any) -> Any:
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, node)
        return ray.remote(function).options(
            num_cpus=options.cpus, num_gpus=options.gpus, max_retries=0, scheduling_strategy=strategy
        )

    host = ray.get(remote_on(0, ray.util.get_node_ip_address).remote())
    environments = [process_environment(host, options.port, options.nodes, index) for index in range(options.nodes)]
    return ray.get([remote_on(index, run).remote(variables) for index, variables in enumerate(environments)])


if __name__ == "__main__":
    sys.exit(run_command(main))
