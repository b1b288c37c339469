# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""ChatTemplate with OpenAI's own client: completions of what the template writes, whole or streamed; and a server that gets ready."""

import json
import re
import time

import openai
import pytest
from test_server import Server, save_model

from mesh_transformer.data.tokenizers import FileTokenizer
from mesh_transformer.data.vocabularies import make_byte_alphabet

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'developer' %}{{ raise_exception('there are no developers here') }}{% endif %}
<|{{ message.role }}|>{{ message.content }}<|end|>
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
MARKS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
END_OF_TURN = 256 + MARKS.index("<|end|>")
GO_ON = {str(256 + i): -100 for i in range(len(MARKS))}  # no end before the last token that may be drawn
TALK = [{"role": "user", "content": "Say <|end|>"}]
PROMPT = [256, 257, None, 259, 10, 258]  # None: what is said


def make_tokenizer():
    tokens = [*sorted(make_byte_alphabet()), *MARKS]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return FileTokenizer(
        {
            "version": "1.0",
            "added_tokens": [dict(flags, id=256 + i, content=mark) for i, mark in enumerate(MARKS)],
            "pre_tokenizer": level,
            "decoder": level,
            "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []},
        }
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "talker"
    settings = dict(bos_token="<|endoftext|>", eos_token="<|end|>", chat_template=TEMPLATE)
    save_model(folder, make_tokenizer(), carried={"tokenizer_config.json": json.dumps(settings)})
    server = Server(folder)
    server.before = watch_health(server)
    server.wait()
    yield server
    server.kill()


def watch_health(server):
    """Answers of /health from the first one on until it is well, and what came of a request meanwhile."""
    while not (found := re.search(r"http://127.0.0.1:([0-9]+)/health", server.stderr.read_text())):
        assert server.process.poll() is None
        time.sleep(0.01)
    server.port = int(found[1])
    answers = [server.call("GET", "/health", token=None)]
    answers.append(server.call("POST", "/v1/completions", dict(prompt="early", max_tokens=2)))
    answers.append(server.call("GET", "/health", token=None))
    return [(status, answer) for status, _, answer in answers]


def ask(server, **wishes):
    wishes = dict(model="talker", messages=TALK, seed=3, max_completion_tokens=12) | wishes
    return server.client.chat.completions.create(**wishes)


def test_ready_when_programs_are_compiled(server):
    (first, health), (early, answer), (later, well) = server.before
    assert (first, health["status"], early, later, well) == (503, "compiling", 200, 200, {"status": "ok"})
    assert re.fullmatch("programs are being compiled.*", health["reason"])
    assert answer["usage"]["completion_tokens"] == 2


def test_a_chat_is_a_completion_of_its_prompt(server):
    said = make_tokenizer().encode("Say <|end|>")
    assert END_OF_TURN not in said
    prompt = [token for part in PROMPT for token in (said if part is None else [part])]
    wishes = dict(temperature=0.9, top_p=0.95, presence_penalty=0.1, frequency_penalty=0.1, logit_bias=GO_ON, n=2)
    chat = ask(server, **wishes, user="somebody")
    plain = server.client.completions.create(model="talker", prompt=prompt, seed=3, max_tokens=12, **wishes)
    assert [choice.message.content for choice in chat.choices] == [choice.text for choice in plain.choices]
    assert chat.choices[0].message.content != chat.choices[1].message.content
    assert [choice.finish_reason for choice in chat.choices] == ["length", "length"]
    assert chat.choices[0].message.role == "assistant"
    assert chat.usage == plain.usage
    assert chat.usage
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (len(prompt), 24)
    assert (chat.object, chat.id[:9]) == ("chat.completion", "chatcmpl-")


def test_streamed_is_whole(server):
    wishes = dict(logprobs=True, top_logprobs=3, n=2, logit_bias=GO_ON)
    whole = ask(server, **wishes)
    chunks = list(ask(server, **wishes, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        pieces = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert [piece.delta.role for piece in pieces] == ["assistant", *[None] * (len(pieces) - 1)]
        assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
        scores = choice.logprobs.content
        streamed = [token for piece in pieces if piece.logprobs for token in piece.logprobs.content]
        assert [token.token for token in streamed] == [token.token for token in scores]
        assert len(scores) == 12
        for mine, other in zip(streamed, scores, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert len(mine.top_logprobs) == 3
            assert mine.logprob <= mine.top_logprobs[0].logprob + 1e-4
        assert (
            bytes(byte for token in scores for byte in token.bytes).decode(errors="replace") == choice.message.content
        )
    assert chunks[-1].usage == whole.usage
    text = whole.choices[0].message.content
    wishes = dict(model="talker", messages=TALK, seed=3, logit_bias=GO_ON, stop=text[3:5])
    with server.client.chat.completions.stream(**wishes) as stream:  # the client's own way to put pieces together
        [again] = stream.get_final_completion().choices
    assert (again.message.content, again.finish_reason) == (text[: text.index(text[3:5])], "stop")


def test_what_ends_an_answer(server):
    ended = ask(server, logit_bias={str(END_OF_TURN): 100})
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.usage.completion_tokens == 1
    wishes = dict(extra_body={"guided_regex": "[ab]{60}"}, max_completion_tokens=40)
    text = ask(server, **wishes).choices[0].message.content
    cut = ask(server, **wishes, stop=["never", text[10:14]])
    assert cut.choices[0].message.content == text[: text.index(text[10:14])]
    assert cut.choices[0].finish_reason == "stop"
    endless = server.client.chat.completions.create(model="talker", messages=TALK, logit_bias=GO_ON)
    assert endless.usage.total_tokens == 256, "as long as there is room"


def test_answers_by_a_schema(server):
    schema = dict(type="object", properties=dict(n=dict(enum=[1, 22])), required=["n"], additionalProperties=False)
    options = dict(temperature=0.3, logit_bias={str(i): -100 for i in make_tokenizer().encode(" \n\t\r")})
    wanted = dict(type="json_schema", json_schema=dict(name="x", schema=schema, strict=True))
    answer = ask(server, response_format=wanted, max_completion_tokens=80, **options)
    assert json.loads(answer.choices[0].message.content)["n"] in (1, 22)
    assert answer.choices[0].finish_reason == "stop"
    begun = ask(server, response_format={"type": "json_object"}, max_completion_tokens=1, **options)
    assert begun.choices[0].message.content == "{"


def test_answers_can_be_sent_back(server):
    first = ask(server, logit_bias=GO_ON).choices[0].message
    more = {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": "more"}]}
    answers = [ask(server, messages=[*TALK, again, more]) for again in (first, first.model_dump())]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    said = make_tokenizer().encode(TALK[0]["content"] + first.content + "and\nmore")
    assert answers[0].usage.prompt_tokens == len(said) + 2 + 3 * 3  # begin, assistant; role, end and line of each


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        (dict(messages=[]), "messages", "at least 1 item"),
        (
            dict(messages=[dict(role="tool", content="a")]),
            "messages.0.role",
            "'system', 'developer', 'user' or 'assistant'",
        ),
        (dict(messages=[dict(role="user", content=None)]), "messages.0.content", "string"),
        (dict(messages=[dict(role="user", content=[dict(type="image_url")])]), "messages.0.content", "'text'"),
        (dict(messages=[dict(role="developer", content="a")]), "messages", "there are no developers here"),
        (dict(messages=[dict(role="user", content="\ufdd0")]), "messages", "no character"),
        (dict(messages=[dict(role="user", content="a" * 9999)]), "messages", "longer than the model reads"),
        (dict(messages=[dict(role="user", content="a" * 250)]), "messages", "seq_len=256"),
        (dict(max_tokens=2, max_completion_tokens=2), None, "give one"),
        (dict(max_tokens=0), "max_tokens", "greater than or equal to 1"),
        (dict(top_logprobs=2), None, "top_logprobs needs logprobs"),
        (dict(logprobs=3), "logprobs", "boolean"),
        (dict(tools=[dict(type="function")]), None, "tools are not supported"),
        (dict(stream_options={}), None, "needs stream"),
        (dict(message="a"), "message", "did you mean messages?"),
        (dict(logit_bias={"260": 1}), "logit_bias", "vocabulary is 0..259"),
        (dict(n=7), "n", "there can be 6"),
    ],
    ids=str,
)
def test_refused_in_words(server, change, param, words):
    status, _, answer = server.call("POST", "/v1/chat/completions", dict(messages=TALK) | change)
    error = answer["error"]
    assert (status, error["param"]) == (400, param), error
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_other_errors(server):
    with pytest.raises(openai.NotFoundError, match="served here is talker"):
        ask(server, model="other")
    with pytest.raises(openai.BadRequestError, match="no developers"):  # before a stream begins
        ask(server, stream=True, messages=[dict(role="developer", content="a")])
