# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The process: one engine thread, one event loop, an orderly end."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mesh_transformer.cli import DONE
from mesh_transformer.config import ConfigError
from mesh_transformer.data.chat_template import ChatTemplate
from mesh_transformer.sample.engine.decoder_only import require_decoder_only
from mesh_transformer.sample.loading import LoadedModel, read_meta
from mesh_transformer.serve.app import make_app
from mesh_transformer.serve.completions import Service
from mesh_transformer.serve.engine_thread import EngineThread
from mesh_transformer.serve.metrics import ServerMetrics
from mesh_transformer.serve.middleware import RequestLimits
from mesh_transformer.serve.protocol import ApiError
from mesh_transformer.serve.structured_output import GrammarCompiler

SHORTEST_TOKEN = 16  # characters
LAST_WORDS = 1.5  # seconds to send what is left once answers have been cut off


def serve(trained: LoadedModel, *, name: str, host: str, port: int, token: str | None) -> bool:
    """Answer until SIGTERM or SIGINT; whether the engine lived. Prints the address once programs are compiled.

    Raises ConfigError if others could reach `host` and there is no `token`, or if the model has an encoder.
    """
    check_host(host, token)
    if trained.config.model.n_encoder_layers is not None:
        raise ConfigError(
            "model.n_encoder_layers: the server continues texts with a decoder alone; use device_sample.py"
        )
    limits = trained.config.serve
    engine = require_decoder_only(trained.engine, "serving")
    worker = EngineThread(engine, capacity=limits.slots + limits.max_queue, warmup_tokens=limits.warmup_tokens)
    measures = ServerMetrics(worker)
    longest = max(len(trained.tokenizer.decode_bytes([i])) for i in range(trained.tokenizer.n_vocab))
    grammars = GrammarCompiler(trained.tokenizer, trained.config.model.n_vocab)
    chats = ChatTemplate(trained.tokenizer, read_meta(trained), n_vocab=trained.config.model.n_vocab)
    service = Service(trained, worker, measures, grammars, name, longest, chats)
    app = make_app(service, request_timeout_seconds=limits.request_timeout_seconds)
    guard = RequestLimits(
        app,
        token=token,
        max_body_bytes=limits.max_body_bytes,
        body_timeout_seconds=limits.body_timeout_seconds,
        count=lambda path, status: measures.requests.labels(path, str(status)).inc(),
    )

    class Protocol(H11Protocol):
        """HTTP that does not wait for ever for a request's first lines."""

        def connection_made(self, transport):  # pyright: ignore[reportIncompatibleMethodOverride]
            super().connection_made(transport)
            self.loop.call_later(limits.body_timeout_seconds, lambda: self.cycle is None and transport.close())

    config = uvicorn.Config(
        guard,
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.drain_seconds + LAST_WORDS + 0.5),
    )
    server = _Server(config)
    # What is still written to a client that left, before that is noticed; nobody's error.
    logging.getLogger("asyncio").addFilter(lambda record: "socket.send() raised" not in record.getMessage())

    def drain() -> None:
        if app.state.draining:
            server.force_exit = True  # asked twice
            return
        print("draining: no new requests; what is being answered may end", file=sys.stderr, flush=True)
        app.state.draining = server.should_exit = True
        asyncio.get_running_loop().call_later(
            limits.drain_seconds, worker.fail_all, ApiError(503, "the server is going down", code="draining")
        )

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, drain)
        worker.start(loop)
        watching = asyncio.ensure_future(_watch(server, worker))
        try:
            await server.serve()
        finally:
            watching.cancel()

    # The event loop answers between the engine's steps: let it have the interpreter soon.
    sys.setswitchinterval(0.001)
    asyncio.run(run())
    if worker.failure:
        print(f"error: the engine failed: {worker.failure}", file=sys.stderr)
    if not worker.stop():
        # In the middle of a compilation, which nothing interrupts; to take the interpreter down around it would abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(DONE)
    return worker.failure is None


def read_token(path: Path) -> str:
    """The token a file consists of. Raises ConfigError if it is too short to be secret."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path}: cannot be read: {error}") from None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"--token-file {path}: at least {SHORTEST_TOKEN} visible ASCII characters are wanted, "
            f"for example from: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return token


def check_host(host: str, token: str | None) -> None:
    """ConfigError if a server without a token could be reached from elsewhere."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and token is None:
        raise ConfigError(f"--host {host}: others can reach this address; give --token-file, or stay with 127.0.0.1")


async def _watch(server: uvicorn.Server, worker: EngineThread) -> None:
    """Say where the server is, and end it should its engine fail."""
    while not server.started:
        await asyncio.sleep(0.02)
    where = server.servers[0].sockets[0].getsockname()
    shown = f"[{where[0]}]" if ":" in where[0] else where[0]
    address = f"http://{shown}:{where[1]}"
    if worker.compiling:
        print(
            f"compiling; until it is done requests wait, and {address}/health answers 503", file=sys.stderr, flush=True
        )
    while worker.compiling and not worker.failure:
        await asyncio.sleep(0.02)
    if not worker.failure:
        print(f"serving on {address}", flush=True)
    while not worker.failure:
        await asyncio.sleep(0.2)
    server.should_exit = True


class _Server(uvicorn.Server):
    """Without uvicorn's signal handlers, which end the process by the signal once it has shut down."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing."""
        yield
