# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""How every program of ours is called and ends: one grammar, one-line errors, exit statuses.

0 done, 1 failed, 2 wrong usage or configuration, 75 preempted (run again to continue), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable

from mesh_transformer.config import ConfigError

DONE, FAILED, WRONG_USAGE, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130


class Preempted(Exception):
    """A run stopped before its end with everything saved; the message says how to go on."""


def make_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose --help is the program's own docstring, examples and all."""
    parser = argparse.ArgumentParser(
        description=docstring.strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """`--set section.field=value`, repeatable; checked like the file itself."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a field, for example train.steps=20; repeatable",
    )


def run_command(main: Callable[[list[str]], int]) -> int:
    """Call `main` with the command line; its result, or the exit status of what it raised, said in one line on stderr."""
    arguments = sys.argv[1:]
    try:
        return main(arguments)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments and not isinstance(error, Preempted):
            raise
        return _report(error)


def _report(error: BaseException) -> int:
    match error:
        case Preempted():
            print(f"preempted: {error}", file=sys.stderr)
            return PREEMPTED
        case ConfigError():
            print(f"error: {error}", file=sys.stderr)
            return WRONG_USAGE
        case KeyboardInterrupt():
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        case BrokenPipeError():  # the reader of our output left, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        case _:
            kind = "" if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: "
            print(f"error: {kind}{error or type(error).__name__}  (--debug shows where)", file=sys.stderr)
            return FAILED
