# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Stop strings end texts exactly, and device_sample.py prints completions and their statistics."""

import json

import pytest

from mesh_transformer.sample.repl import set_option
from mesh_transformer.sample.text_generation import StopStrings, complete_texts


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
def test_stop_strings_do_not_depend_on_how_the_text_is_split(stops, text, shown):
    for size in (1, 2, 3, len(text)):
        stop, out = StopStrings(stops), ""
        for first in range(0, len(text), size):
            out += stop.push(text[first : first + size])
            assert shown.startswith(out), "shown too early"
        assert out + stop.finish() == shown
        assert stop.complete == (shown != text)


def test_stop_string_ends_a_text(model):
    engine, config, defaults = model.engine, model.config, model.defaults
    [free] = complete_texts(engine, defaults, ["abc"], config.sample, seed=1)
    stop = free.text[4:6]
    [cut] = complete_texts(engine, defaults, ["abc"], config.sample, seed=1, stops=[stop])
    assert cut.text == free.text[: free.text.index(stop)]
    assert (free.finish, cut.finish) == ("length", "stop")
    assert cut.tokens == free.tokens[: len(cut.tokens)] != free.tokens


def test_device_sample_prints_json_and_one_line_errors(run, model, device_sample):
    engine, config, defaults = model.engine, model.config, model.defaults
    done = device_sample(run, "--prompt", "ab", "--n", 2, "--max-tokens", 5, "--json", "--seed", 7)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    expected = complete_texts(engine, defaults, ["ab"], set_option(config.sample, "max_tokens 5"), n=2, seed=7)
    assert [line["tokens"] for line in lines] == [completion.tokens for completion in expected]
    assert set(lines[0]) == {"prompt", "text", "tokens", "logprobs", "finish"}
    missing = device_sample(f"{run}-not", "--prompt", "a")
    assert missing.returncode != 0
    assert missing.stderr.count("\n") == 1
    assert "no such" in missing.stderr
    clipped = device_sample(run, "--prompt", "x" * 2040, "--stop", "no such text")
    assert clipped.stderr == "note: stopped after 8 tokens, at the maximum length model.seq_len=2048\n"


def test_device_sample_decodes_speculatively(run, model, device_sample):
    engine, config, defaults = model.engine, model.config, model.defaults
    greedy = ["--prompt", "abcabcabc", "--temperature", 0, "--json"]
    done = device_sample(run, *greedy, "--speculative", "prompt-lookup")
    assert done.returncode == 0, done.stderr
    [line] = [json.loads(line) for line in done.stdout.splitlines()]
    [expected] = complete_texts(engine, defaults, ["abcabcabc"], set_option(config.sample, "temperature 0"))
    assert line["tokens"] == expected.tokens
    assert 0 <= line["speculative"]["accepted_tokens"] <= line["speculative"]["draft_tokens"]
    assert line["speculative"]["draft_tokens"] > 0
    refused = device_sample(run, *greedy, "--speculative", "draft-model")
    assert refused.returncode == 2
    assert 'speculative="draft-model" requires draft_model' in refused.stderr
