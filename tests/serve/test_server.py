# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""One small model behind HTTP, asked by OpenAI's own client, by hostile sockets and by a browser; then told to end."""

import base64
import contextlib
import http.client
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.config import config_to_dict, parse_config
from mesh_transformer.data.tokenizers import ByteTokenizer
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.transformer import make_model
from mesh_transformer.model.shapes import describe_params

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-for-the-tests-only"
SLOTS, QUEUE, MAX_BODY, BODY_SECONDS = 2, 4, 20_000, 1.5
SLOW = dict(guided_regex="[a-z]*", logit_bias={"256": -100.0}, max_tokens=240, prompt="slow", seed=1)  # a token a turn

# Pressed in the page itself: a tiny model is done before a key comes from outside.
ESCAPE_AT_FIRST_TOKEN = """
new MutationObserver((_, observer) => {
  if (!document.querySelector(".token")) return;
  observer.disconnect();
  dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
}).observe(document.querySelector("#results"), {childList: true, subtree: true});
"""


class Server:
    """The process and a way to ask it."""

    def __init__(self, folder: Path):
        limits = dict(
            slots=SLOTS, queue=QUEUE, max_body_bytes=MAX_BODY, body_timeout_seconds=BODY_SECONDS, drain_seconds=3.0
        )
        command = [sys.executable, "device_serve.py", str(folder), "--port", "0", "--token-file", str(folder / "token")]
        command += [f"--set=serve.{name}={value}" for name, value in limits.items()]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}
        self.errors, self.client = (folder / "stderr").open("w+"), None
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        self.stderr = folder / "stderr"

    def wait(self):
        """Until it is ready."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith("serving on http://127.0.0.1:"), (line, self.stderr.read_text())
        self.port = int(line.rsplit(":", 1)[1])
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=TOKEN, max_retries=0, timeout=120
        )

    def kill(self):
        """Whatever it does."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()
        self.errors.close()
        if self.client:
            self.client.close()

    def call(self, method, path, body=None, token=TOKEN, **headers):
        """Status, headers, and the answer, from JSON if it is that."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            if token:
                headers["Authorization"] = f"Bearer {token}"
            if isinstance(body, dict):
                body, headers["Content-Type"] = json.dumps(body), headers.get("Content-Type", "application/json")
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            data = response.read()
            is_json = response.headers.get("content-type") == "application/json"
            return response.status, response.headers, json.loads(data) if is_json else data

    def complete(self, **body):
        status, _, answer = self.call("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer

    def measure(self, name):
        """The sum of a metric's samples."""
        _, _, text = self.call("GET", "/metrics")
        families = text_string_to_metric_families(text.decode())
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    def raw(self, data: bytes):
        """Status and length of the answer to some bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(data)
            response = http.client.HTTPResponse(connection)
            response.begin()
            return response.status, len(response.read())

    def noise(self, data: bytes) -> bytes:
        """Whatever comes back for some bytes and the end of them, perhaps nothing."""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection,
            contextlib.suppress(ConnectionError),
        ):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))
        return b""

    def wait_until_free(self) -> float:
        """Seconds until nobody is being answered."""
        start = time.monotonic()
        while self.measure("mesh_transformer_slots_used") or self.measure("mesh_transformer_open_samples"):
            assert time.monotonic() - start < 30
            time.sleep(0.05)
        return time.monotonic() - start


def save_model(folder, tokenizer, **meta):
    """A model that nobody has trained, as the checkpoint of a run, and the server's token."""
    model = dict(n_layers=1, d_model=16, n_heads=2, n_vocab=tokenizer.n_vocab, seq_len=256)
    data = dict(train=dict(a=dict(path="a")))
    config = parse_config(dict(model=model, train=dict(steps=1, batch_size=1), data=data), where="test")
    params = jax.jit(make_model(config.model).init)(jax.random.key(0))
    params = jax.tree.map(lambda array: 12.0 * array, params)  # what is probable depends on the whole context
    arrays = {f"params/{name}": array for name, array in flatten_names(params).items()}
    axes = {f"params/{name}": info.axes for name, info in flatten_names(describe_params(config.model)).items()}
    store = Store(folder / "checkpoints")
    store.save(7, arrays, axes=axes, meta={"config": config_to_dict(config), "tokenizer": tokenizer.to_json(), **meta})
    store.wait()
    (folder / "token").write_text(TOKEN + "\n")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    save_model(folder, ByteTokenizer())
    server = Server(folder)
    server.wait()
    yield server
    server.kill()


def test_openai_client(server):
    client = server.client
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "mesh-transformer"
    wishes = dict(model="tiny", prompt="def f(", max_tokens=12, seed=3, temperature=0.9, top_p=0.95)
    wishes |= dict(presence_penalty=0.1, frequency_penalty=0.1, user="somebody", logit_bias={"256": -100}, logprobs=3)
    done = client.completions.create(**wishes, n=2, stop=["\0\0"])
    assert [choice.index for choice in done.choices] == [0, 1]
    assert done.choices[0].text != done.choices[1].text
    assert done.usage
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (6, 24)
    chunks = list(client.completions.create(**wishes, n=2, stream=True, stream_options={"include_usage": True}))
    for choice in done.choices:
        pieces = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces][-1] == choice.finish_reason == "length"
        assert choice.logprobs
        assert choice.logprobs.tokens
        assert len(choice.logprobs.tokens) == 12
        for name in ("tokens", "text_offset", "top_logprobs"):
            streamed = [x for piece in pieces if piece.logprobs for x in getattr(piece.logprobs, name)]
            expected = getattr(choice.logprobs, name)
            if name == "top_logprobs":  # the last bits depend on how many rows are decoded together
                expected = [pytest.approx(top, abs=1e-4) for top in expected]
            assert streamed == expected
    assert chunks[-1].choices == []
    assert chunks[-1].usage == done.usage
    with pytest.raises(openai.NotFoundError, match="served here is tiny"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="seq_len=256"):
        client.completions.create(model="tiny", prompt="a" * 300)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_a_prompt_in_four_forms(server):
    wishes = dict(max_tokens=6, seed=5)
    tokens = list(b"one"), list(b"two")
    texts = [server.complete(prompt=prompt, **wishes)["choices"][0]["text"] for prompt in ("one", "two")]
    assert texts[0] != texts[1]
    assert server.complete(prompt=tokens[1], **wishes)["choices"][0]["text"] == texts[1]
    for prompts in (["one", "two"], list(tokens)):
        both = server.complete(prompt=prompts, **wishes)
        assert [choice["text"] for choice in both["choices"]] == texts
    unseeded = server.complete(prompt=["one", "one"], max_tokens=12, temperature=5.0)["choices"]
    assert unseeded[0]["text"] != unseeded[1]["text"]


def test_alone_is_among_others(server):
    wishes = [dict(prompt=f"text {i}", max_tokens=30, seed=i, temperature=0.5 + i / 5) for i in range(SLOTS)]
    alone = [server.complete(**wish)["choices"][0]["text"] for wish in wishes]
    assert len(set(alone)) == SLOTS
    together = [""] * SLOTS

    def ask(i):
        together[i] = server.complete(**wishes[i])["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(SLOTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_scores_of_a_prompt_are_those_of_drawing_it(server):
    drawn = server.complete(prompt="Say", max_tokens=10, seed=2, logprobs=1)["choices"][0]["logprobs"]
    ids = [name[0] if len(name := token.encode("latin-1")) == 1 else int(token[-2:], 16) for token in drawn["tokens"]]
    body = dict(prompt=[[*b"Say", *ids]], echo=True, logprobs=1, max_tokens=1, temperature=0.0)
    echoed = server.complete(**body)["choices"][0]["logprobs"]  # how harnesses ask for likelihoods
    assert echoed["token_logprobs"][0] is echoed["top_logprobs"][0] is None
    assert echoed["token_logprobs"][3:-1] == pytest.approx(drawn["token_logprobs"], abs=1e-4)
    assert echoed["tokens"][:3] == ["S", "a", "y"]
    assert len(echoed["tokens"]) == 14
    only = server.complete(**{**body, "max_tokens": 0})
    assert only["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx([*echoed["token_logprobs"][:-1]], abs=1e-4)
    assert only["usage"]["completion_tokens"] == 0


def test_best_of_answers_the_likeliest(server):
    wishes = dict(prompt="x", max_tokens=8, seed=9, logprobs=0, temperature=5.0)
    each = server.complete(**wishes, n=4)["choices"]
    means = [sum(choice["logprobs"]["token_logprobs"]) for choice in each]
    assert len(set(means)) == 4
    best = server.complete(**wishes, n=1, best_of=4)
    assert best["choices"][0]["text"] == each[means.index(max(means))]["text"]
    assert best["usage"]["completion_tokens"] == 32


def test_stop_strings_cut_exactly(server):
    wishes = dict(prompt="stop", max_tokens=40, seed=4, guided_regex="[ab]{60}")
    text = server.complete(**wishes)["choices"][0]["text"]
    stop = text[10:14]
    for stream in (False, True):
        body = {**wishes, "stop": ["never", stop], "logprobs": 0, "stream": stream}
        if stream:
            chunks = list(server.client.completions.create(model="tiny", **_extra(body)))
            shown, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
        else:
            [choice] = server.complete(**body)["choices"]
            shown, reason = choice["text"], choice["finish_reason"]
            assert "".join(choice["logprobs"]["tokens"]) == shown
        assert (shown, reason) == (text[: text.index(stop)], "stop")


def _extra(body):
    ours = {name: body[name] for name in ("guided_regex", "top_k", "min_p") if name in body}
    return {**{name: value for name, value in body.items() if name not in ours}, "extra_body": ours}


def test_constraints(server):
    texts = server.complete(prompt="", guided_regex="[0-9]{3}-(ab|é)", max_tokens=20, n=3)["choices"]
    assert all(re.fullmatch("[0-9]{3}-(ab|é)", choice["text"]) for choice in texts), texts
    schema = dict(type="object", properties=dict(on=dict(type="boolean"), n=dict(enum=[1, 22])), required=["on", "n"])
    wanted = dict(type="json_schema", json_schema=dict(name="x", schema={**schema, "additionalProperties": False}))
    options = dict(temperature=0.3, logit_bias={str(space): -100.0 for space in b" \n\t\r"})
    [choice] = server.complete(prompt="", response_format=wanted, max_tokens=80, **options)["choices"]
    answer = json.loads(choice["text"])
    assert set(answer) == {"on", "n"}
    assert isinstance(answer["on"], bool)
    assert answer["n"] in (1, 22)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (dict(promt="a"), "promt", "did you mean prompt?"),
        (dict(prompt="a", max_tokens="5"), "max_tokens", "integer"),
        (dict(prompt="a", max_tokens=True), "max_tokens", "integer"),
        (dict(prompt="a", max_tokens=-1), "max_tokens", "greater than or equal to 0"),
        (dict(prompt="a", temperature=float("nan")), "temperature", "finite"),
        (dict(prompt="a", temperature=float("inf")), "temperature", "finite"),
        (dict(prompt="a", top_p=0), "top_p", "greater than 0"),
        (dict(prompt="a", n=129), "n", "128"),
        (dict(prompt="a", n=7), "n", "there can be 6"),
        (dict(prompt="a", logprobs=21), "logprobs", "20"),
        (dict(prompt="a", stop=["x"] * 17), "stop", "16"),
        (dict(prompt="a", stop=""), "stop", "at least 1"),
        (dict(prompt="a", suffix="b"), None, "suffix is not supported"),
        (dict(prompt="a", best_of=2, n=3), None, "at least n"),
        (dict(prompt="a", best_of=2, stream=True), None, "cannot be streamed"),
        (dict(prompt="a", max_tokens=0), None, "needs echo"),
        (dict(prompt="a", max_tokens=10**400), None, ""),
        (dict(prompt="a", seed=2**63), "seed", "less than"),
        (dict(prompt="a", logit_bias={"257": 1}), "logit_bias", "vocabulary is 0..256"),
        (dict(prompt="a", logit_bias={"-1": 1}), "logit_bias", "pattern"),
        (dict(prompt="a", guided_regex="(["), "guided_regex", "unclosed"),
        (dict(prompt="a", response_format=dict(type="json_schema")), "response_format", "json_schema"),
        (dict(prompt=[]), "prompt", "a list of token ids"),
        (dict(prompt=[[]]), "prompt", "a list of token ids"),
        (dict(prompt=["a", 1]), "prompt", "a list of token ids"),
        (dict(prompt=[1.0]), "prompt", "a list of token ids"),
        (dict(prompt=[257]), "prompt", "vocabulary is 0..256"),
        (dict(prompt=[-1]), "prompt", "a list of token ids"),
        (dict(prompt="a" * 9999), "prompt", "9999 characters is longer"),
        (dict(prompt=[1] * 5000), "prompt", "5000 tokens is longer"),
        (dict(prompt="\ud800"), None, ""),
    ],
    ids=str,
)
def test_refused_in_words(server, body, param, words):
    status, _, answer = server.call("POST", "/v1/completions", body)
    assert status == 400
    error = answer["error"]
    assert words in error["message"]
    assert param is None or (error["param"] or "").startswith(param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert len(json.dumps(answer)) < 1000


def test_sizes_and_slowness(server):
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + TOKEN.encode()
    post += b"\r\nContent-Type: application/json\r\n"
    assert server.call("POST", "/v1/completions", dict(prompt="a" * MAX_BODY))[0] == 413
    assert server.raw(post + b"Content-Length: 99999999999\r\n\r\n{}")[0] == 413
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    assert server.raw(post + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 4 + b"0\r\n\r\n")[0] == 413
    deep = b"[" * (MAX_BODY // 2)
    for body in (deep, b'{"prompt":' * 1500, b'{"prompt": "\xff"}', b"", b"null", b"1" * 9000, b'{"prompt": 1e999}'):
        status, length = server.raw(post + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert status == 400, body[:20]
        assert length < 1000
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
        slow.sendall(post + b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in slow.recv(1000)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
        slow.sendall(b"GET /health HT")
        assert slow.recv(1000) == b""  # closed
    assert time.monotonic() - start > 2 * BODY_SECONDS - 0.2


def test_every_route_needs_the_token(server):
    _, _, schema = server.call("GET", "/openapi.json")
    routes = [(method, path) for path, methods in schema["paths"].items() for method in methods]
    assert {path for _, path in routes} >= {"/", "/metrics", "/health", "/v1/completions", "/v1/models", "/complete"}
    routes += [("get", "/openapi.json"), ("get", "/docs"), ("get", "/nothing"), ("options", "/v1/completions")]
    basic = base64.b64encode(b"anybody:wrong").decode()
    for method, path in routes:
        wanted = 200 if path == "/health" else 401
        for header in ({}, dict(Authorization=f"Bearer {TOKEN[:-1]}"), dict(Authorization=f"Bearer {TOKEN}x")):
            status, headers, _ = server.call(method.upper(), path, token=None, **header)
            assert status == wanted, (method, path, header)
        for value in ("Bearer", "Basic !", f"Basic {basic}", TOKEN, "Bearer \xff"):
            assert server.call(method.upper(), path, token=None, Authorization=value)[0] == wanted
    assert headers["WWW-Authenticate"] == "Bearer"
    basic = base64.b64encode(f"anybody:{TOKEN}".encode()).decode()
    assert server.call("GET", "/", token=None, Authorization=f"Basic {basic}")[0] == 200
    assert server.call("GET", "/", token=None)[1]["WWW-Authenticate"].startswith("Basic")


def test_no_way_to_files_and_no_other_origin(server):
    for path in (
        "/v1/models/../../../etc/passwd",
        "/v1/models/%2e%2e%2fetc%2fpasswd",
        "/..%2f..%2fetc/passwd",
        "//etc",
    ):
        status, _, answer = server.call("GET", path)
        assert status == 404, path
        assert b"root:" not in str(answer).encode()
    status, headers, _ = server.call("GET", "/v1/models", Origin="https://elsewhere.example")
    assert status == 200
    assert not [name for name in headers if name.lower().startswith("access-control")]
    body = json.dumps(dict(prompt="a"))  # what a page elsewhere can send without asking
    assert server.call("POST", "/v1/completions", body, Content_Type="text/plain")[0] == 400


def test_the_originals_request(server):
    status, _, answer = server.call("POST", "/complete", dict(context="Hello", top_p=0.9, temp=0.75))
    assert (status, list(answer)) == (200, ["completion"])
    assert len(answer["completion"].encode()) >= 200 or answer["completion"]
    assert server.call("POST", "/complete", dict(context="Hello"))[0] == 400


def test_full_is_429_and_the_rest_goes_on(server):
    server.wait_until_free()
    both = [server.client.completions.create(model="tiny", stream=True, n=n, **_extra(SLOW)) for n in (SLOTS, QUEUE)]
    status, headers, answer = server.call("POST", "/v1/completions", dict(prompt="a"))
    assert status == 429, answer
    assert 1 <= int(headers["Retry-After"]) <= 60
    start = time.monotonic()
    assert server.call("GET", "/health", token=None)[0] == 200
    assert time.monotonic() - start < 2.0
    tokens = [sum(len(choice.text) for chunk in stream for choice in chunk.choices) for stream in both]
    assert tokens == [SLOTS * 240, QUEUE * 240]
    server.wait_until_free()


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_slots(server, stream):
    server.wait_until_free()
    drawn, cancelled = (server.measure(f"mesh_transformer_{name}_total") for name in ("drawn_tokens", "cancelled"))
    body = json.dumps({**SLOW, "n": SLOTS, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (TOKEN.encode(), len(body), body)
        )
        while not server.measure("mesh_transformer_slots_used"):
            time.sleep(0.01)
    assert server.wait_until_free() < 1.0
    assert server.measure("mesh_transformer_cancelled_total") == cancelled + 1
    assert server.measure("mesh_transformer_drawn_tokens_total") - drawn < SLOTS * 240


def test_malformed_requests(server):
    rng = random.Random(0)
    seeds = [
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n" + b'{"prompt": "abc"}',
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ]
    for _ in range(60):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(0, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        answer = server.noise(bytes(data[: rng.randint(1, len(data))]) + rng.randbytes(rng.choice([0, 0, 50])))
        assert not re.match(rb"HTTP/1.1 5", answer), (data, answer)
        assert len(answer) < 4096
    assert server.call("GET", "/health")[2] == {"status": "ok"}


@pytest.fixture
def browser(tmp_path):
    """Chromium without a window, at the size of a desk."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("the page is tried in Chromium where chromium and chromedriver are installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for name in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{name}")
    for name in ("disable-background-networking", "disable-component-update", "disable-dev-shm-usage"):
        options.add_argument(f"--{name}")
    options.add_argument(f"--user-data-dir={tmp_path}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def _resize(browser, width, height):
    sizes = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)


def test_page(server, browser):
    find = lambda name: browser.find_element("css selector", name)  # noqa: E731
    wait = WebDriverWait(browser, 180, poll_frequency=0.1)
    address = f"http://anybody:{TOKEN}@127.0.0.1:{server.port}/"
    browser.get(address)
    wait.until(lambda _: "tiny, step 7" in find("#model").text)
    for name, value in dict(prompt="def f(", n="2", max_tokens="20", seed="3", guided_regex="[a-z]*").items():
        find(f"#{name}").clear()
        find(f"#{name}").send_keys(value)
    find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait.until(lambda _: find("#go").is_enabled() and "first after" in find("#status").text)
    shown = [element.get_property("textContent") for element in browser.find_elements("css selector", ".text")]
    wishes = dict(prompt="def f(", n=2, max_tokens=20, seed=3, temperature=0.8, guided_regex="[a-z]*", logprobs=1)
    choices = server.complete(**wishes)["choices"]
    assert shown == ["def f(" + choice["text"] for choice in choices]
    # Probabilities, by keyboard.
    find(".text").send_keys(Keys.HOME)
    first = find("#tip").text
    scores = choices[0]["logprobs"]
    assert f"\N{BLACK RIGHT-POINTING SMALL TRIANGLE} {scores['tokens'][0]} " in first
    assert f" {100 * math.exp(max(scores['top_logprobs'][0].values())):.1f} %" in first
    find(".text").send_keys(Keys.ARROW_RIGHT)
    assert find("#tip").text != first
    ActionChains(browser).move_to_element(find(".token")).perform()
    assert find("#tip").text == first
    # The address holds the settings.
    shared = browser.current_url
    assert "seed=3" in shared
    browser.get("about:blank")
    browser.get(shared)
    wait.until(lambda _: "tiny" in find("#model").text)
    wanted = [find(f"#{name}").get_property("value") for name in ("prompt", "n", "max_tokens", "seed")]
    assert wanted == ["def f(", "2", "20", "3"]
    # It stops.
    find("#max_tokens").clear()
    find("#max_tokens").send_keys("200")
    find("#guided_regex").clear()
    find("#guided_regex").send_keys("[a-z]{200}")  # it does not end by itself before it is stopped
    browser.execute_script(ESCAPE_AT_FIRST_TOKEN)
    find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait.until(lambda _: "stopped after" in find("#status").text)
    server.wait_until_free()
    # Wrong wishes are told, the page fits a phone, and both themes are there.
    find("#guided_regex").send_keys("([")
    find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait.until(lambda _: "guided_regex" in find("#status").text)
    paper = lambda: browser.execute_script("return getComputedStyle(document.body).backgroundColor")  # noqa: E731
    before = paper()
    find("#theme").click()
    assert paper() != before
    _resize(browser, 360, 740)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("400 (Bad Request)" in message for message in severe), severe


def test_sigterm_lets_answers_end(server):
    server.wait_until_free()
    stream = iter(server.client.completions.create(model="tiny", stream=True, **_extra(SLOW)))
    length = len(next(stream).choices[0].text)
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    length += sum(len(chunk.choices[0].text) for chunk in stream)
    assert length == 240
    assert server.process.wait(timeout=15) == 0
    assert time.monotonic() - start < 10
    with pytest.raises(ConnectionError):
        server.call("GET", "/health")
    server.errors.seek(0)
    assert [line for line in server.errors if not re.search("step_7|compiling|draining", line)] == []
