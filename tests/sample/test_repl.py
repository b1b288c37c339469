# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The interactive prompt checks its commands and options, over pipes and at a real terminal."""

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mesh_transformer.config import SampleConfig
from mesh_transformer.sample.loading import load_model
from mesh_transformer.sample.repl import Repl, ReplError, set_option
from mesh_transformer.sample.text_generation import complete_texts

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def test_options_are_checked():
    options = SampleConfig()
    assert set_option(options, "temperature 0.5").temperature == 0.5
    assert set_option(options, "top_k = 3").top_k == 3
    for assignment, message in {
        "temprature 1": "did you mean temperature",
        "top_p 1.5": "less than or equal to 1",
        "top_k many": "expected a number",
        "prompts 3": "unknown option",
    }.items():
        with pytest.raises(ReplError, match=message):
            set_option(options, assignment)


def test_session_over_pipes(model, monkeypatch, capsys):
    engine, config, defaults = model.engine, model.config, model.defaults
    lines = ["one\\", "two", "/set temprature 1", "/set temperature 0", "/seed 0", '"""', "/a", "b", '"""']
    lines += ["/seed 0", "/reset", "one\\", "two", "/show", "/quit", "not read"]
    typed = "\n".join(lines) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    Repl(engine, defaults, config.sample).run()
    out, err = capsys.readouterr()
    warm = complete_texts(engine, defaults, ["one\ntwo"], config.sample)[0].text
    cold = complete_texts(engine, defaults, ["/a\nb"], set_option(config.sample, "temperature 0"))[0].text
    assert warm != cold
    assert out.startswith(f"{warm}\n{cold}\n{warm}\nmax_tokens = 12\ntemperature = 0.8\n")
    assert "did you mean temperature" in err
    assert err.count("tokens/s") == 3


def test_session_shows_accepted_draft_tokens(run, monkeypatch, capsys):
    model = load_model(run, ['serve.speculative="prompt-lookup"'])
    engine = model.engine
    monkeypatch.setattr(sys, "stdin", io.StringIO("/set temperature 0\nabcabcabc\n"))
    Repl(engine, model.defaults, model.config.sample).run()
    stats = engine.speculative_stats
    assert stats.draft_tokens > 0
    assert f", {stats.accepted_tokens} of {stats.draft_tokens} draft tokens accepted" in capsys.readouterr().err


def test_control_keys_of_a_real_terminal(run):
    controller, terminal = pty.openpty()
    environment = ENVIRONMENT | {"TERM": "xterm"}
    # The controlling terminal of the program, so that keys send signals; set in a new process, because this one has threads.
    begin = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", begin, sys.executable, str(ROOT / "device_sample.py"), str(run)]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True
    )
    os.close(terminal)
    output = ""

    def wait_for(words: str) -> None:
        nonlocal output
        deadline = time.monotonic() + 90
        while words not in output:
            assert time.monotonic() < deadline, f"{words!r} was not printed: {output[-500:]!r}"
            if select.select([controller], [], [], 1.0)[0]:
                try:
                    output += os.read(controller, 65536).decode(errors="replace")
                except OSError:  # on Linux, the program has ended
                    pytest.fail(f"the program ended before {words!r}: {output[-1000:]}")
        output = output.partition(words)[2]

    try:
        wait_for("> ")
        os.write(controller, b"/set max_tokens 2000\n")
        wait_for("> ")
        os.write(controller, b"once upon a time\n")
        wait_for("time\r\n")
        time.sleep(0.5)
        os.write(controller, b"\x03")
        wait_for(", interrupted")
        wait_for("> ")
        os.write(controller, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
