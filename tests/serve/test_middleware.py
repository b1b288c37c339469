# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Middleware: access without and with a token, timeouts, disconnects, and failures of the engine."""

import asyncio

import jax
import pytest

from mesh_transformer.config import ConfigError, ModelConfig, SampleConfig
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.requests import RequestParams
from mesh_transformer.serve.app import ClientDisconnected, run_until_disconnect
from mesh_transformer.serve.engine_thread import EngineThread
from mesh_transformer.serve.middleware import RequestLimits
from mesh_transformer.serve.protocol import ApiError
from mesh_transformer.serve.server import check_host, read_token


def test_only_loopback_addresses_without_a_token():
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        check_host(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        with pytest.raises(ConfigError, match="pass --token-file"):
            check_host(host, None)
        check_host(host, "a token")


def test_token_files(tmp_path):
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    assert read_token(path) == "0123456789abcdef"
    for text in ("", "short\n", "0123456789 abcdef", "é" * 20):
        path.write_text(text)
        with pytest.raises(ConfigError, match="visible ASCII"):
            read_token(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "none")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"127.0.0.1:8000", 200),
        (b"localhost", 200),
        (b"LOCALHOST:1", 200),
        (b"[::1]:8000", 200),
        (b"evil.example:8000", 403),
        (b"127.0.0.1.evil.example", 403),
        (b"", 403),
    ],
)
def test_without_a_token_other_host_headers_are_refused(host, status):
    """A site whose name resolves to this machine cannot use the server through a visitor's browser (DNS rebinding)."""
    assert asyncio.run(call_limits(headers=[(b"host", host)])) == status


async def call_limits(headers):
    statuses = []

    async def app(scope, receive, send):
        assert (await receive())["body"] == b"body"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    parts = [dict(type="http.request", body=b"bo", more_body=True), dict(type="http.request", body=b"dy")]

    async def receive():
        return parts.pop(0)

    async def send(message):
        statuses.append(message.get("status"))

    limits = RequestLimits(app, token=None, max_body_bytes=5, body_timeout_seconds=1.0, count=lambda path, status: None)
    await limits(dict(type="http", path="/v1/models", headers=headers), receive, send)
    return statuses[0]


class FakeRequest:
    """A client that disconnects after some seconds."""

    def __init__(self, seconds):
        self._seconds = seconds

    async def receive(self):
        await asyncio.sleep(self._seconds)
        return {"type": "http.disconnect"}


def test_timeout_and_disconnect_cancel_the_work():
    ended = []

    async def work(seconds):
        try:
            await asyncio.sleep(seconds)
            return "done"
        finally:
            ended.append(seconds)

    assert asyncio.run(run_until_disconnect(work(0.0), FakeRequest(9.0), 9.0)) == "done"
    with pytest.raises(ClientDisconnected):
        asyncio.run(run_until_disconnect(work(8.0), FakeRequest(0.0), 9.0))
    with pytest.raises(ApiError, match=r"not complete after 0\.01 s") as error:
        asyncio.run(run_until_disconnect(work(7.0), FakeRequest(9.0), 0.01))
    assert error.value.status == 503
    assert ended == [0.0, 8.0, 7.0]


class Exploding:
    """A constraint that raises an exception."""

    def allowed(self):
        raise RuntimeError("no such mask")

    def accept(self, token):
        """Never called."""


def test_engine_failure_is_raised_in_all_waiting_tasks():
    config = ModelConfig(n_layers=1, d_model=8, n_heads=1, n_vocab=16, seq_len=32)
    engine = DecoderOnlyEngine(config, jax.jit(make_model(config).init)(jax.random.key(0)))

    async def trial():
        thread = EngineThread(engine, capacity=3)
        thread.start(asyncio.get_running_loop())
        pending = thread.submit([engine.make_request([1], RequestParams(SampleConfig(max_tokens=5)))])
        tokens = [event.token async for events in pending.events() for event in events]
        thread.close(pending)
        assert (len(tokens), pending.n_generated, thread.n_pending) == (5, 5, 0)
        with pytest.raises(ApiError) as refused:
            thread.check_capacity(4)
        assert refused.value.status == 400
        failing = thread.submit(
            [engine.make_request([1], RequestParams(SampleConfig(max_tokens=5), constraint=Exploding()))]
        )
        with pytest.raises(ApiError, match="engine has failed"):
            async for _ in failing.events():
                pass
        with pytest.raises(ApiError) as refused:
            thread.submit([engine.make_request([1], RequestParams(SampleConfig(max_tokens=5)))])
        return thread.failure, refused.value.status

    assert asyncio.run(trial()) == ("RuntimeError: no such mask", 503)
