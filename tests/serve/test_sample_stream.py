# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Pieces of a sample put together are its text, and offsets say which characters a token begins with."""

import math

from mesh_transformer.data.tokenizers import ByteTokenizer
from mesh_transformer.sample.engine.requests import Event, Score
from mesh_transformer.serve.sample_stream import SampleStream, join_deltas, token_text


def events(data, finish="length"):
    last = len(data) - 1
    return [
        Event(0, byte, -float(i), finish if i == last else None, [(byte, -float(i))]) for i, byte in enumerate(data)
    ]


def make_choice(**options):
    return SampleStream(ByteTokenizer(), "né", list("né".encode()), **{**dict(stops=(), n_top=1, echo=False), **options})


def test_pieces_are_the_whole_however_cut():
    data = "aé😀b".encode() + b"\xe2"
    wholes = []
    for size in (1, 2, 3, len(data)):
        choice, drawn = make_choice(), events(data)
        pieces = [choice.push(drawn[i : i + size]) for i in range(0, len(data), size)]
        assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        wholes.append(join_deltas(pieces))
    assert all(whole == wholes[0] for whole in wholes)
    text, logprobs, finish = wholes[0]
    assert (text, finish) == ("aé😀b\ufffd", "length")
    assert logprobs["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3, 4]
    assert logprobs["tokens"][:2] == ["a", "bytes:\\xc3"]
    assert logprobs["top_logprobs"][0] == {"a": 0.0}
    assert logprobs["token_logprobs"] == [-float(i) for i in range(9)]


def test_tokens_of_a_stop_string_are_not_shown():
    choice = make_choice(stops=["end"])
    piece = choice.push(events(b"a friend, the end", finish=None))
    assert (piece.text, piece.finish) == ("a fri", "stop")
    assert "".join(piece.logprobs["tokens"]) == "a fri"
    assert choice.done
    held = make_choice(stops=["end"])
    pieces = [held.push([event]) for event in events(b"then", finish="length")]
    assert [piece.text for piece in pieces] == ["t", "h", "", "en"]
    assert [len(piece.logprobs["tokens"]) for piece in pieces] == [1, 1, 0, 2]


def test_end_of_text_is_not_shown():
    piece = make_choice().push([*events(b"ab", finish=None), Event(0, 256, -1.0, "stop", [(256, -1.0)])])
    assert (piece.text, piece.finish, piece.logprobs["tokens"]) == ("ab", "stop", ["a", "b"])
    assert token_text(ByteTokenizer(), 256) == "<|endoftext|>"


def test_echo_begins_with_the_prompt_and_its_scores():
    scores = [Score(-0.5, [(0xC3, -0.5)]), Score(-0.25, [(0xA9, -0.25)])]
    first, second = events(b"ab")
    piece = make_choice(echo=True).push([first._replace(prompt_scores=scores), second])
    assert piece.text == "néab"
    assert piece.logprobs["token_logprobs"] == [None, -0.5, -0.25, -0.0, -1.0]
    assert piece.logprobs["text_offset"] == [0, 1, 1, 2, 3]
    silent = make_choice(echo=True, empty=True).push([first._replace(prompt_scores=scores)])
    assert (silent.text, len(silent.logprobs["tokens"]), silent.finish) == ("né", 3, "length")
    assert math.isclose(sum(silent.logprobs["token_logprobs"][1:]), -0.75)
