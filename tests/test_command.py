# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""How programs end, seen from outside: real processes, their exit statuses and what they say."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = '''"""Do as the first argument says.

examples:
  program.py done
  program.py wait --set train.steps=2
"""
import sys
import time
from mesh_transformer.command import Preempted, add_set_option, make_parser, run_command
from mesh_transformer.config import ConfigError

RAISES = {
    "config": ConfigError("run.toml: train.steps: not positive; use 1 or more"),
    "mistakes": ConfigError("run.toml: train.steps: bad\\nrun.toml: model.n_layers: bad"),
    "value": ValueError("seq_len is odd; use an even one"),
    "empty": ValueError(),
    "assertion": AssertionError(),
    "key": KeyError("w_q"),
    "lines": RuntimeError("out of memory\\nbuffer 1\\nbuffer 2"),
    "preempted": Preempted("saved step 7; run the same command again to continue"),
    "pipe": BrokenPipeError(32, "Broken pipe"),
}


def main(arguments):
    parser = make_parser(__doc__)
    parser.add_argument("what")
    add_set_option(parser)
    options = parser.parse_args(arguments)
    if options.what == "status":
        return 1
    if options.what == "set":
        print(options.set)
    if options.what == "file":
        open("/nowhere/to/be/found")
    if options.what == "print":
        for i in range(100_000):
            print(i)
    if options.what == "little":
        print("little")
        sys.stdin.read()
    if options.what == "wait":
        print("waiting", flush=True)
        time.sleep(60)
    if options.what in RAISES:
        raise RAISES[options.what]
    return 0


sys.exit(run_command(main))
'''


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("command") / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path)]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return kept | {"PYTHONPATH": str(ROOT)} | more


def call(program: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*program, *arguments], capture_output=True, text=True, env=environment(), timeout=60)


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("done", 0, ""),
        ("status", 1, ""),
        ("config", 2, "error: run.toml: train.steps: not positive; use 1 or more\n"),
        ("mistakes", 2, "error: run.toml: train.steps: bad\nerror: run.toml: model.n_layers: bad\n"),
        ("value", 1, "error: seq_len is odd; use an even one  (--debug shows where)\n"),
        ("empty", 1, "error: ValueError  (--debug shows where)\n"),
        ("assertion", 1, "error: AssertionError  (--debug shows where)\n"),
        ("key", 1, "error: KeyError: 'w_q'  (--debug shows where)\n"),
        ("lines", 1, "error: out of memory [...]  (--debug shows where)\n"),
        ("file", 1, "error: /nowhere/to/be/found: No such file or directory  (--debug shows where)\n"),
        ("preempted", 75, "preempted: saved step 7; run the same command again to continue\n"),
        # Not our reader's pipe, for it is still there: an error like any other.
        ("pipe", 1, "error: BrokenPipeError: [Errno 32] Broken pipe  (--debug shows where)\n"),
    ],
)
def test_an_outcome_is_a_status_and_a_line(program, what, status, said):
    ended = call(program, what)
    assert (ended.returncode, ended.stderr, ended.stdout) == (status, said, "")


def test_debug_shows_where(program):
    ended = call(program, "value", "--debug")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "raise RAISES" in ended.stderr
    assert "Traceback" not in call(program, "value").stderr


def test_a_preemption_is_no_bug_to_be_traced(program):
    ended = call(program, "preempted", "--debug")
    assert ended.returncode == 75
    assert "Traceback" not in ended.stderr


def test_wrong_usage_is_2_and_help_is_the_docstring(program):
    wrong = call(program, "done", "--no-such-option")
    assert wrong.returncode == 2
    assert "--no-such-option" in wrong.stderr
    asked = call(program, "--help")
    assert asked.returncode == 0
    assert "examples:\n  program.py done\n  program.py wait --set train.steps=2\n" in asked.stdout
    assert "--debug" in asked.stdout


def test_set_is_repeatable_and_left_to_the_configuration(program):
    ended = call(program, "set", "--set", "a.b=1", "--set", 'c="x=y"')
    assert ended.stdout == "['a.b=1', 'c=\"x=y\"']\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("what", ["print", "little"])
def test_a_reader_that_left_is_no_error_to_report(program, what, unbuffered):
    writer = subprocess.Popen(
        [*program, what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(PYTHONUNBUFFERED=unbuffered),
    )
    assert writer.stdin and writer.stdout and writer.stderr
    writer.stdout.close()
    writer.stdin.close()
    assert writer.wait(60) == 1
    assert writer.stderr.read() == b""
    writer.stderr.close()


def test_an_interrupt_ends_in_a_word(program):
    with subprocess.Popen(
        [*program, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as waiting:
        assert waiting.stdout and waiting.stderr
        assert waiting.stdout.readline() == "waiting\n"
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(60) == 130
        assert waiting.stderr.read() == "interrupted\n"


def test_help_does_not_wait_for_jax(program):
    asked = subprocess.run(
        [sys.executable, "-X", "importtime", program[1], "--help"], capture_output=True, text=True, env=environment()
    )
    imported = {line.split("|")[-1].strip() for line in asked.stderr.splitlines()}
    assert "mesh_transformer.command" in imported
    assert not imported & {"jax", "haiku", "rich", "numpy"}
