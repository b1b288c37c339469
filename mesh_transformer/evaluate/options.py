# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The flags of device_evaluate.py, each of which is short for something of [evaluate]."""

import argparse
import json
import re

from mesh_transformer.cli import add_set_option
from mesh_transformer.config import ConfigError

NAME = "[A-Za-z0-9_-]+"  # of a task or a component


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Its command line, with flags turned into overrides of [evaluate] in `set`; ConfigError for a flag that says nothing."""
    parser.add_argument(
        "run", metavar="RUN", help="a run folder, such as runs/quickstart, a checkpoint, or a model folder"
    )
    parser.add_argument("--task", action="append", default=[], metavar="NAME", help="what to measure; repeatable")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="the file of a task; with another name a component of text: file, folder or shard; repeatable",
    )
    parser.add_argument(
        "--shots", action="append", default=[], metavar="N|NAME=N", help="examples before every question; repeatable"
    )
    parser.add_argument(
        "--examples",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="what a task's shots are drawn from; repeatable",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the same as --set evaluate.limit=N")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, in the harness's form")
    add_set_option(parser)
    options = parser.parse_args(arguments)
    if options.task:
        options.set.append(f"evaluate.tasks={json.dumps(options.task)}")
    for flag in ("data", "examples"):
        for item in getattr(options, flag):
            name, equals, path = item.partition("=")
            if not (equals and path and re.fullmatch(NAME, name)):
                raise ConfigError(
                    f"--{flag} {item}: expected NAME=PATH, for example --{flag} hellaswag=hellaswag.jsonl"
                )
            options.set.append(f"evaluate.{flag}.{name}={json.dumps(path)}")
    for item in options.shots:
        name, _, count = item.rpartition("=")
        if not count.isdigit() or not re.fullmatch(f"({NAME})?", name):
            raise ConfigError(f"--shots {item}: expected N or NAME=N, for example --shots hellaswag=10")
        options.set.append(f"evaluate.num_fewshot_by_task.{name}={count}" if name else f"evaluate.num_fewshot={count}")
    if options.limit is not None:
        options.set.append(f"evaluate.limit={options.limit}")
    return options
