# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A run on all hosts of a Cloud TPU, over ssh: gcloud starts a supervised process on each, which finds the others.

The project and its packages are expected on every host, in --folder; `--setup` installs them there first. run.dir must
be in a bucket (gs://...), because the hosts share no disk. What the processes print comes back here; that of one host
alone with --worker.

examples:
  python scripts/launch/tpu_vms.py my-pod --zone us-central2-b -- run.toml --set 'run.dir="gs://bucket/run"'
      train on my-pod
  python scripts/launch/tpu_vms.py my-pod --zone us-central2-b --dry-run -- run.toml
      print the command

exit status: that of gcloud, 2 wrong usage
"""

import shlex
import subprocess
import sys

from mesh_transformer.cli import DONE, make_parser, run_command

SETUP = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,remote]'"


def main(arguments: list[str]) -> int:
    """Make the command, print or run it."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("name", help="of the TPU")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="default: gcloud's own")
    parser.add_argument("--worker", default="all", help="host; default: %(default)s, as a run needs")
    parser.add_argument(
        "--folder", default="mesh-transformer", help="of the project on the hosts; default: %(default)s"
    )
    parser.add_argument("--setup", action="store_true", help="install the project's packages first")
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, train = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if not train:
        parser.error("what device_train.py is given follows behind --")
    python = ".venv/bin/python"
    supervised = [python, "scripts/launch/supervise.py", "--", python, "device_train.py", *train]
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
