# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Cloud TPU launcher: start one supervised process on every host of a TPU, with gcloud over ssh.

The project and its packages must be in --folder on every host; `--setup` installs the packages first. run.dir must be in
a bucket (gs://...), because the hosts share no disk. The output of all processes is printed here. JAX detects the
other hosts (mesh.processes="auto").

examples:
  python scripts/launch/tpu_vms.py my-pod --zone us-central2-b -- run.toml --set 'run.dir="gs://bucket/run"'
      train on my-pod
  python scripts/launch/tpu_vms.py my-pod --zone us-central2-b --dry-run -- run.toml
      print the command

exit status: the status of gcloud, 2 wrong usage
"""

import shlex
import subprocess
import sys

from mesh_transformer.cli import DONE, make_parser, run_command

SETUP = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,remote]'"


def main(arguments: list[str]) -> int:
    """Build the gcloud command, and print or run it."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("name", metavar="NAME", help="name of the TPU")
    parser.add_argument("--zone", required=True, help="zone of the TPU")
    parser.add_argument("--project", help="Google Cloud project; default: the project in gcloud's configuration")
    parser.add_argument(
        "--worker",
        default="all",
        help="number of the host on which to run the command; default: %(default)s, which training requires",
    )
    parser.add_argument(
        "--folder", default="mesh-transformer", help="folder of the project on the hosts; default: %(default)s"
    )
    parser.add_argument("--setup", action="store_true", help="install the project's packages first")
    parser.add_argument("--dry-run", action="store_true", help="print the command and exit")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    train_arguments = arguments[split + 1 :]
    if not train_arguments:
        parser.error(
            "no arguments for device_train.py; put them after --, for example: tpu_vms.py NAME ... -- run.toml"
        )
    python = ".venv/bin/python"
    supervised = [python, "scripts/launch/supervise.py", "--", python, "device_train.py", *train_arguments]
    on_host = [f"cd {shlex.quote(options.folder)}", *([SETUP] if options.setup else [])]
    on_host.append(shlex.join([*supervised, "--set", 'mesh.processes="auto"']))
    command = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", options.name, f"--zone={options.zone}"]
    command += [f"--project={options.project}"] if options.project else []
    command += [f"--worker={options.worker}", f"--command={' && '.join(on_host)}"]
    if options.dry_run:
        print(shlex.join(command))
        return DONE
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(run_command(main))
