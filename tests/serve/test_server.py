# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The server with a small model: OpenAI's client, malformed and slow requests, the web page, and shutdown."""

import base64
import json
import math
import random
import re
import shutil
import signal
import socket
import threading
import time

import pytest
from server_process import BODY_SECONDS, MAX_BODY, QUEUE, SLOTS, TOKEN, Server, save_model

from mesh_transformer.data.tokenizers import ByteTokenizer

openai = pytest.importorskip("openai")

SLOW = dict(
    guided_regex="[a-z]*", logit_bias={"256": -100.0}, max_tokens=240, prompt="slow", seed=1
)  # one token per engine step

# The key is pressed by the page itself: a tiny model finishes before an external key press arrives.
PRESS_ESCAPE_AT_FIRST_TOKEN = """
new MutationObserver((_, observer) => {
  if (!document.querySelector(".token")) return;
  observer.disconnect();
  dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
}).observe(document.querySelector("#results"), {childList: true, subtree: true});
"""


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
    params = dict(model="tiny", prompt="def f(", max_tokens=12, seed=3, temperature=0.9, top_p=0.95)
    params |= dict(presence_penalty=0.1, frequency_penalty=0.1, user="user", logit_bias={"256": -100}, logprobs=3)
    done = client.completions.create(**params, n=2, stop=["\0\0"])
    assert [choice.index for choice in done.choices] == [0, 1]
    assert done.choices[0].text != done.choices[1].text
    assert done.usage
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (6, 24)
    chunks = list(client.completions.create(**params, n=2, stream=True, stream_options={"include_usage": True}))
    for choice in done.choices:
        deltas = [delta for chunk in chunks for delta in chunk.choices if delta.index == choice.index]
        assert "".join(delta.text for delta in deltas) == choice.text
        assert [delta.finish_reason for delta in deltas][-1] == choice.finish_reason == "length"
        assert choice.logprobs
        assert choice.logprobs.tokens
        assert len(choice.logprobs.tokens) == 12
        for name in ("tokens", "text_offset", "top_logprobs"):
            streamed = [x for delta in deltas if delta.logprobs for x in getattr(delta.logprobs, name)]
            expected = getattr(choice.logprobs, name)
            if name == "top_logprobs":  # the last bits depend on the batch size
                expected = [pytest.approx(top, abs=1e-4) for top in expected]
            assert streamed == expected
    assert chunks[-1].choices == []
    assert chunks[-1].usage == done.usage
    with pytest.raises(openai.NotFoundError, match="served model is tiny"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="seq_len=256"):
        client.completions.create(model="tiny", prompt="a" * 300)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_a_prompt_in_four_forms(server):
    params = dict(max_tokens=6, seed=5)
    tokens = list(b"one"), list(b"two")
    texts = [server.complete(prompt=prompt, **params)["choices"][0]["text"] for prompt in ("one", "two")]
    assert texts[0] != texts[1]
    assert server.complete(prompt=tokens[1], **params)["choices"][0]["text"] == texts[1]
    for prompts in (["one", "two"], list(tokens)):
        both = server.complete(prompt=prompts, **params)
        assert [choice["text"] for choice in both["choices"]] == texts
    unseeded = server.complete(prompt=["one", "one"], max_tokens=12, temperature=5.0)["choices"]
    assert unseeded[0]["text"] != unseeded[1]["text"]


def test_output_does_not_depend_on_concurrent_requests(server):
    requests = [dict(prompt=f"text {i}", max_tokens=30, seed=i, temperature=0.5 + i / 5) for i in range(SLOTS)]
    alone = [server.complete(**request)["choices"][0]["text"] for request in requests]
    assert len(set(alone)) == SLOTS
    together = [""] * SLOTS

    def complete(i):
        together[i] = server.complete(**requests[i])["choices"][0]["text"]

    threads = [threading.Thread(target=complete, args=(i,)) for i in range(SLOTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_logprobs_of_a_prompt_equal_those_of_generating_it(server):
    generated = server.complete(prompt="Say", max_tokens=10, seed=2, logprobs=1)["choices"][0]["logprobs"]
    ids = [
        name[0] if len(name := token.encode("latin-1")) == 1 else int(token[-2:], 16) for token in generated["tokens"]
    ]
    body = dict(prompt=[[*b"Say", *ids]], echo=True, logprobs=1, max_tokens=1, temperature=0.0)
    echoed = server.complete(**body)["choices"][0]["logprobs"]  # how evaluation harnesses request log-likelihoods
    assert echoed["token_logprobs"][0] is echoed["top_logprobs"][0] is None
    assert echoed["token_logprobs"][3:-1] == pytest.approx(generated["token_logprobs"], abs=1e-4)
    assert echoed["tokens"][:3] == ["S", "a", "y"]
    assert len(echoed["tokens"]) == 14
    only = server.complete(**{**body, "max_tokens": 0})
    assert only["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx([*echoed["token_logprobs"][:-1]], abs=1e-4)
    assert only["usage"]["completion_tokens"] == 0


def test_best_of_returns_the_most_probable(server):
    params = dict(prompt="x", max_tokens=8, seed=9, logprobs=0, temperature=5.0)
    each = server.complete(**params, n=4)["choices"]
    means = [sum(choice["logprobs"]["token_logprobs"]) for choice in each]
    assert len(set(means)) == 4
    best = server.complete(**params, n=1, best_of=4)
    assert best["choices"][0]["text"] == each[means.index(max(means))]["text"]
    assert best["usage"]["completion_tokens"] == 32


def test_stop_strings_end_the_output_exactly(server):
    params = dict(prompt="stop", max_tokens=40, seed=4, guided_regex="[ab]{60}")
    text = server.complete(**params)["choices"][0]["text"]
    stop = text[10:14]
    for stream in (False, True):
        body = {**params, "stop": ["never", stop], "logprobs": 0, "stream": stream}
        if stream:
            chunks = list(server.client.completions.create(model="tiny", **_extra(body)))
            shown, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
        else:
            [choice] = server.complete(**body)["choices"]
            shown, reason = choice["text"], choice["finish_reason"]
            assert "".join(choice["logprobs"]["tokens"]) == shown
        assert (shown, reason) == (text[: text.index(stop)], "stop")


def _extra(body):
    extensions = {name: body[name] for name in ("guided_regex", "top_k", "min_p") if name in body}
    return {**{name: value for name, value in body.items() if name not in extensions}, "extra_body": extensions}


def test_structured_output(server):
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
        (dict(prompt="a", n=7), "n", "the maximum is 6"),
        (dict(prompt="a", logprobs=21), "logprobs", "20"),
        (dict(prompt="a", stop=["x"] * 17), "stop", "16"),
        (dict(prompt="a", stop=""), "stop", "at least 1"),
        (dict(prompt="a", suffix="b"), None, "suffix is not supported"),
        (dict(prompt="a", best_of=2, n=3), None, "at least n"),
        (dict(prompt="a", best_of=2, stream=True), None, "cannot be streamed"),
        (dict(prompt="a", max_tokens=0), None, "requires echo"),
        (dict(prompt="a", max_tokens=10**400), None, ""),
        (dict(prompt="a", seed=2**63), "seed", "less than"),
        (dict(prompt="a", logit_bias={"257": 1}), "logit_bias", "vocabulary is 0..256"),
        (dict(prompt="a", logit_bias={"-1": 1}), "logit_bias", "pattern"),
        (dict(prompt="a", guided_regex="(["), "guided_regex", "unclosed"),
        (dict(prompt="a", response_format=dict(type="json_schema")), "response_format", "requires json_schema; add it"),
        (
            dict(prompt="a", response_format=dict(type="text", json_schema=dict(schema={}))),
            "response_format",
            'not "text"; change type, or remove json_schema',
        ),
        (dict(prompt=[]), "prompt", "a list of token ids"),
        (dict(prompt=[[]]), "prompt", "a list of token ids"),
        (dict(prompt=["a", 1]), "prompt", "a list of token ids"),
        (dict(prompt=[1.0]), "prompt", "a list of token ids"),
        (dict(prompt=[257]), "prompt", "vocabulary is 0..256"),
        (dict(prompt=[-1]), "prompt", "a list of token ids"),
        (dict(prompt="a" * 9999), "prompt", "has 9999 characters"),
        (dict(prompt=[1] * 5000), "prompt", "has 5000 tokens"),
        (dict(prompt="\ud800"), None, ""),
    ],
    ids=str,
)
def test_invalid_requests_get_an_explanation(server, body, param, words):
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
    basic = base64.b64encode(b"user:wrong").decode()
    for method, path in routes:
        wanted = 200 if path == "/health" else 401
        for header in ({}, dict(Authorization=f"Bearer {TOKEN[:-1]}"), dict(Authorization=f"Bearer {TOKEN}x")):
            status, headers, _ = server.call(method.upper(), path, token=None, **header)
            assert status == wanted, (method, path, header)
        for value in ("Bearer", "Basic !", f"Basic {basic}", TOKEN, "Bearer \xff"):
            assert server.call(method.upper(), path, token=None, Authorization=value)[0] == wanted
    assert headers["WWW-Authenticate"] == "Bearer"
    basic = base64.b64encode(f"user:{TOKEN}".encode()).decode()
    assert server.call("GET", "/", token=None, Authorization=f"Basic {basic}")[0] == 200
    assert server.call("GET", "/", token=None)[1]["WWW-Authenticate"].startswith("Basic")


def test_no_access_to_files_or_from_other_origins(server):
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
    body = json.dumps(dict(prompt="a"))  # a cross-origin page can send this without a preflight request
    assert server.call("POST", "/v1/completions", body, Content_Type="text/plain")[0] == 400


def test_legacy_complete_endpoint(server):
    status, _, answer = server.call("POST", "/complete", dict(context="Hello", top_p=0.9, temp=0.75))
    assert (status, list(answer)) == (200, ["completion"])
    assert len(answer["completion"].encode()) >= 200 or answer["completion"]
    assert server.call("POST", "/complete", dict(context="Hello"))[0] == 400


def test_full_queue_is_429_and_running_requests_continue(server):
    server.wait_until_idle()
    both = [server.client.completions.create(model="tiny", stream=True, n=n, **_extra(SLOW)) for n in (SLOTS, QUEUE)]
    status, headers, answer = server.call("POST", "/v1/completions", dict(prompt="a"))
    assert status == 429, answer
    assert 1 <= int(headers["Retry-After"]) <= 60
    start = time.monotonic()
    assert server.call("GET", "/health", token=None)[0] == 200
    assert time.monotonic() - start < 2.0
    tokens = [sum(len(choice.text) for chunk in stream for choice in chunk.choices) for stream in both]
    assert tokens == [SLOTS * 240, QUEUE * 240]
    server.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_disconnecting_frees_the_slots(server, stream):
    server.wait_until_idle()
    generated, canceled = (server.metric(f"mesh_transformer_{name}_total") for name in ("generated_tokens", "canceled"))
    body = json.dumps({**SLOW, "n": SLOTS, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (TOKEN.encode(), len(body), body)
        )
        while not server.metric("mesh_transformer_slots_used"):
            time.sleep(0.01)
    assert server.wait_until_idle() < 1.0
    assert server.metric("mesh_transformer_canceled_total") == canceled + 1
    assert server.metric("mesh_transformer_generated_tokens_total") - generated < SLOTS * 240


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
        answer = server.send_and_close(bytes(data[: rng.randint(1, len(data))]) + rng.randbytes(rng.choice([0, 0, 50])))
        assert not re.match(rb"HTTP/1.1 5", answer), (data, answer)
        assert len(answer) < 4096
    assert server.call("GET", "/health")[2] == {"status": "ok"}


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium with the default window size."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("chromium and chromedriver are not installed")
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
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    def find(name):
        return browser.find_element("css selector", name)

    def background():
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    wait = WebDriverWait(browser, 180, poll_frequency=0.1)
    address = f"http://user:{TOKEN}@127.0.0.1:{server.port}/"
    browser.get(address)
    wait.until(lambda _: "tiny, step 7" in find("#model").text)
    for name, value in dict(prompt="def f(", n="2", max_tokens="20", seed="3", guided_regex="[a-z]*").items():
        find(f"#{name}").clear()
        find(f"#{name}").send_keys(value)
    find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait.until(lambda _: find("#go").is_enabled() and "first token after" in find("#status").text)
    shown = [element.get_property("textContent") for element in browser.find_elements("css selector", ".text")]
    params = dict(prompt="def f(", n=2, max_tokens=20, seed=3, temperature=0.8, guided_regex="[a-z]*", logprobs=1)
    choices = server.complete(**params)["choices"]
    assert shown == ["def f(" + choice["text"] for choice in choices]
    # The keyboard shows probabilities.
    find(".text").send_keys(Keys.HOME)
    first = find("#tip").text
    scores = choices[0]["logprobs"]
    assert f"\N{BLACK RIGHT-POINTING SMALL TRIANGLE} {scores['tokens'][0]} " in first
    assert f" {100 * math.exp(max(scores['top_logprobs'][0].values())):.1f} %" in first
    find(".text").send_keys(Keys.ARROW_RIGHT)
    assert find("#tip").text != first
    ActionChains(browser).move_to_element(find(".token")).perform()
    assert find("#tip").text == first
    # The URL contains the settings.
    shared = browser.current_url
    assert "seed=3" in shared
    browser.get("about:blank")
    browser.get(shared)
    wait.until(lambda _: "tiny" in find("#model").text)
    wanted = [find(f"#{name}").get_property("value") for name in ("prompt", "n", "max_tokens", "seed")]
    assert wanted == ["def f(", "2", "20", "3"]
    # Escape stops the generation.
    find("#max_tokens").clear()
    find("#max_tokens").send_keys("200")
    find("#guided_regex").clear()
    find("#guided_regex").send_keys("[a-z]{200}")  # it does not finish before it is stopped
    browser.execute_script(PRESS_ESCAPE_AT_FIRST_TOKEN)
    find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait.until(lambda _: "stopped after" in find("#status").text)
    server.wait_until_idle()
    # Invalid settings are reported, the page fits a phone, and the theme can be switched.
    find("#guided_regex").send_keys("([")
    find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait.until(lambda _: "guided_regex" in find("#status").text)
    before = background()
    find("#theme").click()
    assert background() != before
    _resize(browser, 360, 740)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("400 (Bad Request)" in message for message in severe), severe


def test_sigterm_lets_running_requests_finish(server):
    server.wait_until_idle()
    stream = iter(server.client.completions.create(model="tiny", stream=True, **_extra(SLOW)))
    length = len(next(stream).choices[0].text)
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    length += sum(len(chunk.choices[0].text) for chunk in stream)
    assert length == 240
    assert server.process.wait(timeout=50) == 0
    assert time.monotonic() - start < 50  # the server ends with the last request, not after the 60 drain seconds
    with pytest.raises(ConnectionError):
        server.call("GET", "/health")
    server.errors.seek(0)
    assert [line for line in server.errors if not re.search("step_7|compiling|draining", line)] == []
