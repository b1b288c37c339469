# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of mesh_transformer/cli.py: exit statuses, one-line errors and --help of the programs."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import mesh_transformer
from mesh_transformer.__main__ import COMMANDS, main
from mesh_transformer.cli import PROGRAM, RENAMED_FLAGS
from mesh_transformer.config import ConfigError

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
from mesh_transformer.cli import Preempted, make_parser, run_command
from mesh_transformer.config import ConfigError
def main(arguments):
    make_parser("Test.").parse_args(arguments)
    {body}
    return 0
sys.exit(run_command(main))
"""


def run(body: str, *arguments: str) -> subprocess.CompletedProcess:
    program = SCRIPT.format(body=body)
    return subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("pass", 0, ""),
        ("raise ConfigError('train.stepz is not a field')", 2, "error: train.stepz is not a field\n"),
        ("raise ValueError('bad data')", 1, "error: bad data  (--debug shows the traceback)\n"),
        ("open('/nonexistent/file')", 1, "error: /nonexistent/file: No such file"),
        ("raise Preempted('saved step 3')", 75, "preempted: saved step 3\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ],
)
def test_exit_status_and_one_line_message(body, status, message):
    done = run(body)
    assert done.returncode == status
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1


def test_debug_shows_the_traceback_and_unknown_flags_are_wrong_usage():
    assert "Traceback" in run("raise ValueError('bad')", "--debug").stderr
    assert run("pass", "--nonsense").returncode == 2


def test_a_closed_output_pipe_is_not_an_error():
    program = SCRIPT.format(body="[print('x' * 1000) for _ in range(10000)]")
    done = subprocess.run(
        f"{sys.executable} -c '{program.replace(chr(39), chr(34))}' | head -n 1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "x" * 1000 + "\n"
    assert done.stderr == ""


@pytest.mark.parametrize("program", ["device_train.py", "device_sample.py", "device_plan.py"])
def test_help_has_two_examples_and_needs_no_jax(program):
    code = f"""
import runpy, sys
sys.argv = ['{program}', '--help']
try:
    runpy.run_path('{program}', run_name='__main__')
except SystemExit as end:
    assert end.code in (0, None)
assert 'jax' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"python {program}") >= 2


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("device_train", "train"),
        ("device_evaluate", "evaluate"),
        ("device_plan", "plan"),
        ("mesh_transformer.scripts.inspect_corpus", "inspect_corpus"),
        ("mesh_transformer.scripts.launch.supervise", "supervise"),
    ],
)
def test_a_renamed_flag_is_refused_with_the_new_name(module, name, monkeypatch, capsys):
    program = importlib.import_module(module)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    for old, new in RENAMED_FLAGS[name].items():
        with pytest.raises(SystemExit) as stopped:
            program.main(["something", old])
        assert stopped.value.code == 2
        assert f"{old} was renamed: use {new}" in capsys.readouterr().err


def test_training_is_planned_from_a_file(tmp_path):
    program = importlib.import_module("device_plan")
    with pytest.raises(ConfigError, match=r"to plan training, give a TOML file .* to plan decoding .* add --decode"):
        program.main([str(tmp_path)])
    with pytest.raises(ConfigError, match="no such file"):
        program.main([str(tmp_path / "missing")])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_installed_program_prints_its_help(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [PROGRAM])
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {PROGRAM} {name}")
    assert "examples:" in out


def test_the_installed_program_lists_its_commands(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{PROGRAM} {mesh_transformer.__version__}\n"
    assert main(["trian"]) == 2
    assert "'trian' is not a command; did you mean 'train'?" in capsys.readouterr().err
