# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Stop strings cut exactly, settings are checked, and the program continues texts from a checkpoint on disk."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.config import SampleConfig, config_to_dict, parse_config
from mesh_transformer.data.tokenizers import load_tokenizer
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.transformer import make_model
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.sample.loading import load_model
from mesh_transformer.sample.repl import SettingError, Repl, change_setting
from mesh_transformer.sample.text_generation import StopStrings, complete_texts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    model = dict(n_layers=1, d_model=16, n_heads=2, n_vocab=257, seq_len=2048)
    table = dict(
        model=model,
        train=dict(steps=1, batch_size=1),
        data=dict(train=dict(a=dict(path="a"))),
        sample=dict(max_tokens=12),
    )
    config = parse_config(table, where="test")
    params = jax.jit(make_model(config.model).init)(jax.random.key(0))
    arrays = {f"params/{name}": array for name, array in flatten_names(params).items()}
    axes = {f"params/{name}": info.axes for name, info in flatten_names(describe_params(config.model)).items()}
    store = Store(folder / "checkpoints")
    meta = {"config": config_to_dict(config), "tokenizer": load_tokenizer("bytes").to_json(), "step": 1}
    store.save(1, arrays, axes=axes, meta=meta)
    store.wait()
    return folder


@pytest.fixture(scope="module")
def trained(run):
    return load_model(run)


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["end"], "a friend ends", "a fri"),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        (["abcd", "c"], "xabce", "xab"),
        (["aab"], "aaab", "a"),
        (["zz"], "z", "z"),
        ([], "all of it", "all of it"),
    ],
)
def test_stop_string_cuts_the_same_whatever_the_pieces(stops, text, shown):
    for size in (1, 2, 3, len(text)):
        stop, out = StopStrings(stops), ""
        for first in range(0, len(text), size):
            out += stop.push(text[first : first + size])
            assert shown.startswith(out), "shown too early"
        assert out + stop.finish() == shown
        assert stop.complete == (shown != text)


def test_stop_string_ends_a_text(trained):
    engine, tokenizer, config, *_ = trained
    [free] = complete_texts(engine, tokenizer, ["abc"], config.sample, seed=1)
    stop = free.text[4:6]
    [cut] = complete_texts(engine, tokenizer, ["abc"], config.sample, seed=1, stops=[stop])
    assert cut.text == free.text[: free.text.index(stop)]
    assert (free.finish, cut.finish) == ("length", "stop")
    assert cut.tokens == free.tokens[: len(cut.tokens)] != free.tokens


def test_settings_are_checked():
    options = SampleConfig()
    assert change_setting(options, "temperature 0.5").temperature == 0.5
    assert change_setting(options, "top_k = 3").top_k == 3
    for setting, message in {
        "temprature 1": "did you mean temperature",
        "top_p 1.5": "less than or equal to 1",
        "top_k many": "takes a number",
        "prompts 3": "no setting",
    }.items():
        with pytest.raises(SettingError, match=message):
            change_setting(options, setting)


def test_session_over_pipes(trained, monkeypatch, capsys):
    engine, tokenizer, config, *_ = trained
    lines = ["one\\", "two", "/set temprature 1", "/set temperature 0", "/seed 0", '"""', "/a", "b", '"""']
    lines += ["/seed 0", "/reset", "one\\", "two", "/show", "/quit", "not read"]
    typed = "\n".join(lines) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    Repl(engine, tokenizer, config.sample).run()
    out, err = capsys.readouterr()
    warm = complete_texts(engine, tokenizer, ["one\ntwo"], config.sample)[0].text
    cold = complete_texts(engine, tokenizer, ["/a\nb"], change_setting(config.sample, "temperature 0"))[0].text
    assert warm != cold
    assert out.startswith(f"{warm}\n{cold}\n{warm}\nmax_tokens = 12\ntemperature = 0.8\n")
    assert "did you mean temperature" in err
    assert err.count("tokens/s") == 3


def test_program_prints_json_and_one_line_errors(run, trained):
    engine, tokenizer, config, *_ = trained

    def call(*arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            [sys.executable, str(ROOT / "device_sample.py"), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )

    done = call(str(run), "--prompt", "ab", "--n", "2", "--max-tokens", "5", "--json", "--seed", "7")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    expected = complete_texts(engine, tokenizer, ["ab"], change_setting(config.sample, "max_tokens 5"), n=2, seed=7)
    assert [line["tokens"] for line in lines] == [completion.tokens for completion in expected]
    assert set(lines[0]) == {"prompt", "text", "tokens", "logprobs", "finish"}
    missing = call(str(run) + "-not", "--prompt", "a")
    assert missing.returncode != 0
    assert missing.stderr.count("\n") == 1
    assert "no such" in missing.stderr
    clipped = call(str(run), "--prompt", "x" * 2040, "--stop", "no such text")
    assert clipped.stderr == "note: seq_len=2048 left room for 8 tokens\n"


def test_control_keys_of_a_real_terminal(run):
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TERM": "xterm"}
    # The program's own terminal, so that its keys are its signals; set up in a new process, since this one has threads.
    begin = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", begin, sys.executable, str(ROOT / "device_sample.py"), str(run)]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen = ""

    def wait_for(words: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 90
        while words not in seen:
            assert time.monotonic() < deadline, f"{words!r} did not come: {seen[-500:]!r}"
            if select.select([ours], [], [], 1.0)[0]:
                try:
                    seen += os.read(ours, 65536).decode(errors="replace")
                except OSError:  # Linux says so where the other side has ended
                    pytest.fail(f"the program ended before {words!r}: {seen[-1000:]}")
        seen = seen.partition(words)[2]

    try:
        wait_for("> ")
        os.write(ours, b"/set max_tokens 2000\n")
        wait_for("> ")
        os.write(ours, b"once upon a time\n")
        wait_for("time\r\n")
        time.sleep(0.5)
        os.write(ours, b"\x03")
        wait_for(", interrupted")
        wait_for("> ")
        os.write(ours, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
