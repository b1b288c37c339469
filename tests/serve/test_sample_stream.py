# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Sample streams: concatenated deltas are the full output, and offsets locate the tokens in the text."""

import math

from mesh_transformer.data.tokenizers import ByteTokenizer
from mesh_transformer.sample.engine.requests import Event, Score
from mesh_transformer.serve.sample_stream import OutputOptions, SampleStream, join_deltas, token_text


def events(data, finish="length"):
    last = len(data) - 1
    return [
        Event(0, byte, -float(i), finish if i == last else None, [(byte, -float(i))]) for i, byte in enumerate(data)
    ]


def make_stream(**options):
    return SampleStream(ByteTokenizer(), "né", list("né".encode()), OutputOptions(**{"top_logprobs": 1, **options}))


def test_deltas_concatenate_to_the_full_output():
    data = "aé😀b".encode() + b"\xe2"
    outputs = []
    for size in (1, 2, 3, len(data)):
        stream, generated = make_stream(), events(data)
        deltas = [stream.push(generated[i : i + size]) for i in range(0, len(data), size)]
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        outputs.append(join_deltas(deltas))
    assert all(output == outputs[0] for output in outputs)
    text, logprobs, finish_reason = outputs[0]
    assert (text, finish_reason) == ("aé😀b\ufffd", "length")
    assert logprobs["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3, 4]
    assert logprobs["tokens"][:2] == ["a", "bytes:\\xc3"]
    assert logprobs["top_logprobs"][0] == {"a": 0.0}
    assert logprobs["token_logprobs"] == [-float(i) for i in range(9)]


def test_tokens_of_a_stop_string_are_not_output():
    stream = make_stream(stops=["end"])
    delta = stream.push(events(b"a friend, the end", finish=None))
    assert (delta.text, delta.finish_reason) == ("a fri", "stop")
    assert "".join(delta.logprobs["tokens"]) == "a fri"
    assert stream.done
    held_back = make_stream(stops=["end"])
    deltas = [held_back.push([event]) for event in events(b"then", finish="length")]
    assert [delta.text for delta in deltas] == ["t", "h", "", "en"]
    assert [len(delta.logprobs["tokens"]) for delta in deltas] == [1, 1, 0, 2]


def test_end_of_text_is_not_output():
    delta = make_stream().push([*events(b"ab", finish=None), Event(0, 256, -1.0, "stop", [(256, -1.0)])])
    assert (delta.text, delta.finish_reason, delta.logprobs["tokens"]) == ("ab", "stop", ["a", "b"])
    assert token_text(ByteTokenizer(), 256) == "<|endoftext|>"


def test_echo_begins_with_the_prompt_and_its_logprobs():
    scores = [Score(-0.5, [(0xC3, -0.5)]), Score(-0.25, [(0xA9, -0.25)])]
    first, second = events(b"ab")
    delta = make_stream(echo=True).push([first._replace(prompt_scores=scores), second])
    assert delta.text == "néab"
    assert delta.logprobs["token_logprobs"] == [None, -0.5, -0.25, -0.0, -1.0]
    assert delta.logprobs["text_offset"] == [0, 1, 1, 2, 3]
    empty = make_stream(echo=True, empty=True).push([first._replace(prompt_scores=scores)])
    assert (empty.text, len(empty.logprobs["tokens"]), empty.finish_reason) == ("né", 3, "length")
    assert math.isclose(sum(empty.logprobs["token_logprobs"][1:]), -0.75)
