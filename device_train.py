# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Train the model of a configuration, and write checkpoints, metrics, a report and a few samples into its run folder.

examples:
  python device_train.py configs/quickstart.toml
      train on the source code of Python's standard library; run it again after Ctrl-C to continue
  python device_train.py configs/quickstart.toml --set mesh.cpu_devices=8 --set mesh.fsdp=2 --set mesh.tensor=2
      the same run on eight virtual CPU devices: 2-way data, fsdp and tensor parallelism

exit status: 0 done, 1 failed, 2 invalid usage or configuration, 75 preempted (run again to continue)
"""

import argparse
import sys

from mesh_transformer.cli import add_set_option, command_line, make_parser, run_command
from mesh_transformer.config import ConfigError, config_to_toml, load_config
from mesh_transformer.distributed.stop import StopRequest


def main(arguments: list[str]) -> int:
    """Train the configuration named on the command line, or print the configuration or its first training sequences."""
    options = _parse_arguments(arguments)
    config = load_config(options.config, options.set)
    if options.print_config:
        print(config_to_toml(config, mark_changes=True), end="")
        return 0
    profile = _parse_profile(options.profile) if options.profile else None

    with StopRequest() as stop:
        # JAX is imported after the arguments are parsed, so that --help and usage errors are fast.
        from mesh_transformer.data.dataset import open_data, preview_sequences
        from mesh_transformer.distributed.bootstrap import join_processes
        from mesh_transformer.distributed.coordination import process_count, process_index
        from mesh_transformer.distributed.preemption import watch_preemption
        from mesh_transformer.evaluate.callback import make_measure
        from mesh_transformer.mesh import init_devices
        from mesh_transformer.sample.training_samples import log_training_samples
        from mesh_transformer.train.session import train_config

        if options.show_data is not None:
            with stop.interruptible("building the data"):
                print(preview_sequences(config, open_data(config), options.show_data))
            return 0
        with join_processes(config.mesh), watch_preemption(stop, print):
            run_dir = train_config(
                config,
                init_devices(config.mesh),
                stop,
                restart=options.restart,
                profile=profile,
                measure=make_measure(config),
            )
            is_single_process = process_count() == 1
            is_main = process_index() == 0
        if is_single_process:  # the model of a multi-process run may be too large for one host
            log_training_samples(config)
    if is_main:
        _print_next_steps(options, config.train.steps, run_dir)
    return 0


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__ or "")
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, such as configs/quickstart.toml")
    add_set_option(parser)
    parser.add_argument(
        "--restart", action="store_true", help="start over; an earlier run folder is renamed, not deleted"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--show-data", type=int, metavar="N", help="print the first N training sequences as text and exit"
    )
    parser.add_argument(
        "--profile", metavar="FIRST:LAST", help="write a profiler trace of steps FIRST to LAST into the run folder"
    )
    return parser.parse_args(arguments)


def _parse_profile(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ConfigError(f"--profile {text}: expected FIRST:LAST with FIRST < LAST, for example 10:13")
    return int(first), int(last)


def _print_next_steps(options: argparse.Namespace, steps: int, run_dir: object) -> None:
    arguments = [options.config, *(f"--set={override}" for override in options.set)]
    command = command_line("train", *arguments)
    print(f"""
continue    {command} --set train.steps={2 * steps}
resume      {command}      (after Ctrl-C, a crash or a preemption)
sample      {command_line("sample", str(run_dir))}
plan        {command_line("plan", *arguments)}
report      {run_dir}/report.html""")


if __name__ == "__main__":
    sys.exit(run_command(main))
