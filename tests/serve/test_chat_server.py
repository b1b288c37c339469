# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Chat completions with OpenAI's client, complete and streamed; and the readiness of the server."""

import json
import re
import time

import pytest
from server_process import Server, save_model

from mesh_transformer.data.token_bytes import make_byte_alphabet
from mesh_transformer.data.tokenizers import FileTokenizer

openai = pytest.importorskip("openai")

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'developer' %}{{ raise_exception('there are no developers here') }}{% endif %}
<|{{ message.role }}|>{{ message.content }}<|end|>
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
SPECIAL_TOKENS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
END_OF_MESSAGE = 256 + SPECIAL_TOKENS.index("<|end|>")
NO_STOP = {str(256 + i): -100 for i in range(len(SPECIAL_TOKENS))}  # generation ends only at the token limit
TALK = [{"role": "user", "content": "Say <|end|>"}]
PROMPT = [256, 257, None, 259, 10, 258]  # None: the message


def make_tokenizer():
    tokens = [*sorted(make_byte_alphabet()), *SPECIAL_TOKENS]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return FileTokenizer(
        {
            "version": "1.0",
            "added_tokens": [dict(flags, id=256 + i, content=token) for i, token in enumerate(SPECIAL_TOKENS)],
            "pre_tokenizer": level,
            "decoder": level,
            "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []},
        }
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "talker"
    tokenizer_config = dict(bos_token="<|endoftext|>", eos_token="<|end|>", chat_template=TEMPLATE)
    save_model(folder, make_tokenizer(), carried={"tokenizer_config.json": json.dumps(tokenizer_config)})
    server = Server(folder)
    server.startup = watch_health(server)
    server.wait()
    yield server
    server.kill()


def watch_health(server):
    """Return status and body of /health at the start, of a request, and of /health after it."""
    while not (found := re.search(r"http://127.0.0.1:([0-9]+)/health", server.stderr.read_text())):
        assert server.process.poll() is None
        time.sleep(0.01)
    server.port = int(found[1])
    responses = [server.call("GET", "/health", token=None)]
    responses.append(server.call("POST", "/v1/completions", dict(prompt="early", max_tokens=2)))
    responses.append(server.call("GET", "/health", token=None))
    return [(status, body) for status, _, body in responses]


def chat(server, **params):
    params = dict(model="talker", messages=TALK, seed=3, max_completion_tokens=12) | params
    return server.client.chat.completions.create(**params)


def test_ready_when_programs_are_compiled(server):
    (first, health), (early, response), (later, ready) = server.startup
    assert (first, health["status"], early, later, ready) == (503, "compiling", 200, 200, {"status": "ok"})
    assert re.fullmatch("programs are being compiled.*", health["reason"])
    assert response["usage"]["completion_tokens"] == 2


def test_a_chat_is_a_completion_of_its_prompt(server):
    message = make_tokenizer().encode("Say <|end|>")
    assert END_OF_MESSAGE not in message
    prompt = [token for part in PROMPT for token in (message if part is None else [part])]
    params = dict(temperature=0.9, top_p=0.95, presence_penalty=0.1, frequency_penalty=0.1, logit_bias=NO_STOP, n=2)
    chatted = chat(server, **params, user="user")
    plain = server.client.completions.create(model="talker", prompt=prompt, seed=3, max_tokens=12, **params)
    assert [choice.message.content for choice in chatted.choices] == [choice.text for choice in plain.choices]
    assert chatted.choices[0].message.content != chatted.choices[1].message.content
    assert [choice.finish_reason for choice in chatted.choices] == ["length", "length"]
    assert chatted.choices[0].message.role == "assistant"
    assert chatted.usage == plain.usage
    assert chatted.usage
    assert (chatted.usage.prompt_tokens, chatted.usage.completion_tokens) == (len(prompt), 24)
    assert (chatted.object, chatted.id[:9]) == ("chat.completion", "chatcmpl-")


def test_stream_equals_full_response(server):
    params = dict(logprobs=True, top_logprobs=3, n=2, logit_bias=NO_STOP)
    full = chat(server, **params)
    chunks = list(chat(server, **params, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in full.choices:
        deltas = [delta for chunk in chunks for delta in chunk.choices if delta.index == choice.index]
        assert [delta.delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
        assert "".join(delta.delta.content or "" for delta in deltas) == choice.message.content
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
        scores = choice.logprobs.content
        streamed = [token for delta in deltas if delta.logprobs for token in delta.logprobs.content]
        assert [token.token for token in streamed] == [token.token for token in scores]
        assert len(scores) == 12
        for token, expected in zip(streamed, scores, strict=True):
            assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert len(token.top_logprobs) == 3
            assert token.logprob <= token.top_logprobs[0].logprob + 1e-4
        assert (
            bytes(byte for token in scores for byte in token.bytes).decode(errors="replace") == choice.message.content
        )
    assert chunks[-1].usage == full.usage
    text = full.choices[0].message.content
    params = dict(model="talker", messages=TALK, seed=3, logit_bias=NO_STOP, stop=text[3:5])
    with server.client.chat.completions.stream(**params) as stream:  # the client joins the deltas
        [again] = stream.get_final_completion().choices
    assert (again.message.content, again.finish_reason) == (text[: text.index(text[3:5])], "stop")


def test_stop_tokens_and_stop_strings(server):
    ended = chat(server, logit_bias={str(END_OF_MESSAGE): 100})
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.usage.completion_tokens == 1
    params = dict(extra_body={"guided_regex": "[ab]{60}"}, max_completion_tokens=40)
    text = chat(server, **params).choices[0].message.content
    cut = chat(server, **params, stop=["never", text[10:14]])
    assert cut.choices[0].message.content == text[: text.index(text[10:14])]
    assert cut.choices[0].finish_reason == "stop"
    endless = server.client.chat.completions.create(model="talker", messages=TALK, logit_bias=NO_STOP)
    assert endless.usage.total_tokens == 256, "limited only by seq_len"


def test_structured_output(server):
    schema = dict(type="object", properties=dict(n=dict(enum=[1, 22])), required=["n"], additionalProperties=False)
    options = dict(temperature=0.3, logit_bias={str(i): -100 for i in make_tokenizer().encode(" \n\t\r")})
    wanted = dict(type="json_schema", json_schema=dict(name="x", schema=schema, strict=True))
    answer = chat(server, response_format=wanted, max_completion_tokens=80, **options)
    assert json.loads(answer.choices[0].message.content)["n"] in (1, 22)
    assert answer.choices[0].finish_reason == "stop"
    begun = chat(server, response_format={"type": "json_object"}, max_completion_tokens=1, **options)
    assert begun.choices[0].message.content == "{"


def test_response_messages_can_be_sent_back(server):
    first = chat(server, logit_bias=NO_STOP).choices[0].message
    more = {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": "more"}]}
    answers = [chat(server, messages=[*TALK, again, more]) for again in (first, first.model_dump())]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    text = make_tokenizer().encode(TALK[0]["content"] + first.content + "and\nmore")
    assert (
        answers[0].usage.prompt_tokens == len(text) + 2 + 3 * 3
    )  # bos and assistant; role, end and line end of each message


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
        (dict(messages=[dict(role="user", content="a" * 9999)]), "messages", "more than the model's context"),
        (dict(messages=[dict(role="user", content="a" * 250)]), "messages", "seq_len=256"),
        (dict(max_tokens=2, max_completion_tokens=2), None, "give only one"),
        (dict(max_tokens=0), "max_tokens", "greater than or equal to 1"),
        (dict(top_logprobs=2), None, "top_logprobs requires logprobs"),
        (dict(logprobs=3), "logprobs", "boolean"),
        (dict(tools=[dict(type="function")]), None, "tools are not supported"),
        (dict(stream_options={}), None, "requires stream"),
        (dict(message="a"), "message", "did you mean messages?"),
        (dict(logit_bias={"260": 1}), "logit_bias", "vocabulary is 0..259"),
        (dict(n=7), "n", "the maximum is 6"),
    ],
    ids=str,
)
def test_invalid_requests_get_an_explanation(server, change, param, words):
    status, _, answer = server.call("POST", "/v1/chat/completions", dict(messages=TALK) | change)
    error = answer["error"]
    assert (status, error["param"]) == (400, param), error
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_other_errors(server):
    with pytest.raises(openai.NotFoundError, match="served model is talker"):
        chat(server, model="other")
    with pytest.raises(openai.BadRequestError, match="no developers"):  # before a stream begins
        chat(server, stream=True, messages=[dict(role="developer", content="a")])
