# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What one training step of a configuration needs, from the compiled step and before anything is paid for.

examples:
  python device_plan.py configs/quickstart.toml
      memory and arithmetic on the devices of this machine
  python device_plan.py configs/quickstart.toml --topology cpu-8 --set mesh.fsdp=2 --set mesh.tensor=2 --json
      the same for eight devices made of this CPU, as one JSON object
"""

import sys

from mesh_transformer.command import add_set_option, make_parser, run_command
from mesh_transformer.config import load_config


def main(arguments: list[str]) -> int:
    """Parse, compile, print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, such as configs/quickstart.toml")
    add_set_option(parser)
    parser.add_argument(
        "--topology", default="local", help="local (the devices of this machine) or cpu-N; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)

    from mesh_transformer.plan import format_plan, parse_topology, plan_to_json, plan_training, with_cpu_devices

    config = with_cpu_devices(load_config(options.config, options.set), parse_topology(options.topology))

    from mesh_transformer.mesh import start_devices

    layout = start_devices(config.mesh)
    plan, table = plan_training(config, layout)
    print(plan_to_json(plan) if options.json else format_plan(plan, table))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
