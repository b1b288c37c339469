# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Train the model that a configuration describes: CONFIG -> checkpoints, metrics, a report and a few samples.

examples:
  python device_train.py configs/quickstart.toml
      train on the Python standard library's source; run it again after Ctrl-C and it continues
  python device_train.py configs/quickstart.toml --set mesh.cpu_devices=8 --set mesh.fsdp=2 --set mesh.tensor=2
      the same run on eight devices made of this CPU (2 replicas x 2 pieces of the state x 2 pieces of each layer)

exit status: 0 done, 1 failed, 2 wrong usage or configuration, 75 preempted (run again to continue)
"""

import shlex
import sys
from pathlib import Path

from mesh_transformer.cli import add_set_option, make_parser, run_command
from mesh_transformer.config import ConfigError, config_to_toml, load_config
from mesh_transformer.distributed.stop import StopRequest


def main(arguments: list[str]) -> int:
    """Parse, open, train, show."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, such as configs/quickstart.toml")
    add_set_option(parser)
    parser.add_argument(
        "--fresh", action="store_true", help="start over; an earlier run folder is kept under another name"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--look", type=int, metavar="N", help="print the first N training sequences as text and stop")
    parser.add_argument("--profile", metavar="A:B", help="write a trace of steps A to B into the run folder")
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.set)
    if options.print_config:
        print(config_to_toml(config, mark_changes=True), end="")
        return 0
    profile = _parse_profile(options.profile) if options.profile else None

    with StopRequest() as stop:
        # JAX and what needs it come after the options: --help and errors in them answer at once.
        from mesh_transformer.data.dataset import preview_sequences, open_data
        from mesh_transformer.distributed.bootstrap import join_processes
        from mesh_transformer.distributed.coordination import process_count, process_index
        from mesh_transformer.distributed.preemption import watch_preemption
        from mesh_transformer.evaluate.callback import train_measured
        from mesh_transformer.mesh import init_devices
        from mesh_transformer.sample.training_samples import log_training_samples

        if options.look is not None:
            with stop.interruptible("the data was made"):
                print(preview_sequences(config, open_data(config), options.look))
            return 0
        with join_processes(config.mesh), watch_preemption(stop, print):
            run_dir = train_measured(config, init_devices(config.mesh), stop, fresh=options.fresh, profile=profile)
            is_alone, is_first = process_count() == 1, process_index() == 0
        if is_alone:  # else the model may be too large for one host
            log_training_samples(config)
    if not is_first:
        return 0
    same = shlex.join(["python", Path(sys.argv[0]).name, options.config, *(f"--set={item}" for item in options.set)])
    print(f"""
continue    {same} --set train.steps={2 * config.train.steps}
resume      {same}      (after Ctrl-C, a crash or a preemption)
sample      python device_sample.py {run_dir}
plan        {same.replace("device_train", "device_plan")}
report      {run_dir / "report.html"}""")
    return 0


def _parse_profile(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ConfigError(f"--profile {text}: expected FIRST:LAST, for example 10:13")
    return int(first), int(last)


if __name__ == "__main__":
    sys.exit(run_command(main))
