# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Command-line conventions that all programs share: parser, `--set`, one-line errors and exit statuses.

Exit status: 0 done, 1 failed, 2 invalid usage or configuration, 75 preempted (run again to continue), 130 interrupted.
"""

import argparse
import os
import re
import select
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mesh_transformer.config import ConfigError

DONE = 0
FAILED = 1
WRONG_USAGE = 2
PREEMPTED = 75  # EX_TEMPFAIL
INTERRUPTED = 130

PROGRAM = "mesh-transformer"  # the installed command; see __main__.py

# Renamed flags by program; the old flag is rejected with the new name.
RENAMED_FLAGS: dict[str, dict[str, str]] = {
    "train": {"--fresh": "--restart", "--look": "--show-data"},
    "evaluate": {"--shots": "--num-fewshot", "--examples": "--fewshot-data"},
    "plan": {"--picture": "--plot", "--fast": "--low-effort", "--sample": "--decode"},
    "plan_all": {"--fresh": "--no-cache"},
    "inspect_corpus": {"--near": "--duplicates-of"},
    "bench_sample": {"--weights": "--weight-dtype", "--cache": "--kv-cache-dtype", "--tokens": "--max-tokens"},
    "bench_data": {"--whole-mb": "--build-mb"},
    "quantization": {"--tokens": "--max-tokens"},
    "supervise": {"--tries": "--max-failures", "--leave-preempted": "--no-restart-on-preemption"},
    "processes": {"--leg-steps": "--phase-steps"},
}


class Preempted(Exception):
    """A run stopped before its end after saving a checkpoint; the message says how to continue."""


def command_line(name: str, *arguments: str) -> str:
    """Return a shell command that runs a device program ("train", "sample", ...).

    It starts with the installed command or with a script of the clone, like the command of the running program.
    """
    program = [PROGRAM, name] if Path(sys.argv[0]).name.startswith(PROGRAM) else ["python", f"device_{name}.py"]
    return shlex.join([*program, *arguments])


class Parser(argparse.ArgumentParser):
    """An argument parser that rejects abbreviated flags, and renamed ones with their new names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2; a message about a renamed flag is replaced by one with its new name."""
        name = Path(self.prog).stem.split()[-1].removeprefix("device_").replace("-", "_")
        renamed = RENAMED_FLAGS.get(name, {})
        for old, new in renamed.items():
            if re.search(rf"(?<![\w-]){re.escape(old)}(?![\w-])", message):
                message = f"{old} was renamed: use {new}"
        super().error(message)


def make_parser(docstring: str) -> argparse.ArgumentParser:
    """Return an argument parser whose --help is the program's docstring, with its examples."""
    parser = Parser(description=docstring.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return parser


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """Add the repeatable option `--set section.field=value`, which overrides a field of the configuration."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a field, for example train.steps=20; repeatable",
    )


def run_command(main: Callable[[list[str]], int]) -> int:
    """Call `main` with the command line and return its exit status.

    An exception is printed as one line on stderr and turned into an exit status. With --debug it is raised again, except
    for a preemption or a closed output pipe. SystemExit of argparse (0 after --help, 2 after wrong usage) passes through.
    """
    arguments = sys.argv[1:]
    try:
        try:
            return main(arguments)
        finally:
            sys.stdout.flush()  # not left to the interpreter's exit, which prints a traceback for a closed pipe
    except BrokenPipeError as error:
        if _output_pipe_closed():
            return FAILED
        return _report_or_raise(error, arguments)
    except (Exception, KeyboardInterrupt) as error:
        return _report_or_raise(error, arguments)


def _report_or_raise(error: BaseException, arguments: list[str]) -> int:
    if "--debug" in arguments and not isinstance(error, Preempted):
        raise error
    match error:
        case Preempted():
            return _print_error(PREEMPTED, f"preempted: {error}")
        case ConfigError():  # one line per mistake
            return _print_error(WRONG_USAGE, *(f"error: {line}" for line in _describe(error).splitlines()))
        case KeyboardInterrupt():
            return _print_error(INTERRUPTED, "interrupted")
        case ValueError() if type(error).__module__.startswith("mesh_transformer."):  # message of one or more lines
            return _print_error(FAILED, f"error: {_describe(error)}  (--debug shows the traceback)")
        case _:
            return _print_error(FAILED, f"error: {_first_line(_describe(error))}  (--debug shows the traceback)")


def _print_error(status: int, *lines: str) -> int:
    print(*lines, sep="\n", file=sys.stderr)
    return status


def _describe(error: BaseException) -> str:
    """Return the message of an error, with its type if the message alone is not clear (KeyError: 'x')."""
    kind = type(error).__name__
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | RuntimeError) and text:
        return text
    return f"{kind}: {text}" if text else kind


def _first_line(text: str) -> str:
    first, _, more = text.partition("\n")
    return f"{first.rstrip()} [...]" if more else first


def _output_pipe_closed() -> bool:
    """Return whether the reader of stdout closed the pipe, as `| head` does; if so, discard buffered output."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # 0: report only errors; POLLERR of a pipe means that it has no reader
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
    return True
