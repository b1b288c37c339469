# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""How every program of ours is called and ends: one grammar, one-line errors, exit statuses.

0 done, 1 failed, 2 wrong usage or configuration, 75 preempted (run again to continue), 130 interrupted.
"""

import argparse
import os
import select
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
    """Call `main` with the command line; its result, or the exit status of what it raised, said in one line on stderr.

    With --debug what was raised goes on, and Python prints its traceback; not so a preemption or a reader that left.
    SystemExit of argparse (0 after --help, 2 after wrong usage) goes on as well.
    """
    arguments = sys.argv[1:]
    try:
        try:
            return main(arguments)
        finally:
            sys.stdout.flush()  # here, not at exit, where Python could no longer be quiet about a reader that left
    except BrokenPipeError as error:
        if _reader_left():
            return FAILED
        return _report_or_raise(error, arguments)
    except (Exception, KeyboardInterrupt) as error:
        return _report_or_raise(error, arguments)


def _report_or_raise(error: BaseException, arguments: list[str]) -> int:
    if "--debug" in arguments and not isinstance(error, Preempted):
        raise error
    match error:
        case Preempted():
            return _say(PREEMPTED, f"preempted: {error}")
        case ConfigError():  # one line for every mistake in the file
            return _say(WRONG_USAGE, *(f"error: {line}" for line in _describe(error).splitlines()))
        case KeyboardInterrupt():
            return _say(INTERRUPTED, "interrupted")
        case ValueError() if type(error).__module__.startswith("mesh_transformer."):  # a list is meant to be read whole
            return _say(FAILED, f"error: {_describe(error)}  (--debug shows where)")
        case _:
            return _say(FAILED, f"error: {_first_line(_describe(error))}  (--debug shows where)")


def _say(status: int, *lines: str) -> int:
    print(*lines, sep="\n", file=sys.stderr)
    return status


def _describe(error: BaseException) -> str:
    """What an error says, with its kind where the words alone would be a riddle."""
    kind, text = type(error).__name__, str(error).strip()
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | RuntimeError) and text:
        return text
    return f"{kind}: {text}" if text else kind


def _first_line(text: str) -> str:
    first, _, more = text.partition("\n")
    return f"{first.rstrip()} [...]" if more else first


def _reader_left() -> bool:
    """Whether it is the reader of our output that left, as `| head` does; if so, what is still buffered goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # POLLERR is always reported: a pipe that nobody reads any more
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return True
