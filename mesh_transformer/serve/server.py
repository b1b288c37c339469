# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The server process: one engine thread, one event loop, and graceful shutdown."""

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
from mesh_transformer.sample.loading import LoadedModel
from mesh_transformer.serve.app import make_app
from mesh_transformer.serve.completions import Service
from mesh_transformer.serve.engine_thread import EngineThread
from mesh_transformer.serve.metrics import ServerMetrics
from mesh_transformer.serve.middleware import RequestLimits
from mesh_transformer.serve.protocol import ApiError
from mesh_transformer.serve.structured_output import GrammarCompiler

MIN_TOKEN_LENGTH = 16  # characters
FINAL_SEND_SECONDS = 1.5  # seconds for the last output after responses are terminated


def serve(loaded: LoadedModel, *, name: str, host: str, port: int, token: str | None) -> bool:
    """Serve requests until SIGTERM or SIGINT. The address is printed after the programs are compiled.

    Returns whether the engine ran without failure. Raises ConfigError if other machines can reach `host` and there is no
    `token`, or if the model has an encoder.
    """
    check_host(host, token)
    limits = loaded.config.serve
    service = _make_service(loaded, name)
    engine_thread = service.engine_thread
    app = make_app(service, request_timeout_seconds=limits.request_timeout_seconds)
    limited_app = RequestLimits(
        app,
        token=token,
        max_body_bytes=limits.max_body_bytes,
        body_timeout_seconds=limits.body_timeout_seconds,
        count=lambda path, status: service.metrics.requests.labels(path, str(status)).inc(),
    )

    class Protocol(H11Protocol):
        """HTTP with a timeout for the request line and headers."""

        def connection_made(self, transport):  # pyright: ignore[reportIncompatibleMethodOverride]
            super().connection_made(transport)
            self.loop.call_later(limits.body_timeout_seconds, lambda: self.cycle is None and transport.close())

    config = uvicorn.Config(
        limited_app,
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.drain_seconds + FINAL_SEND_SECONDS + 0.5),
    )
    server = _Server(config)
    # Writing to a client whose disconnect was not noticed yet is not an error.
    logging.getLogger("asyncio").addFilter(lambda record: "socket.send() raised" not in record.getMessage())

    def drain() -> None:
        if app.state.draining:
            server.force_exit = True  # second signal
            return
        print(
            f"draining: no new requests are accepted; running requests have {limits.drain_seconds:g} s to finish",
            file=sys.stderr,
            flush=True,
        )
        app.state.draining = server.should_exit = True
        asyncio.get_running_loop().call_later(
            limits.drain_seconds,
            engine_thread.fail_all,
            ApiError(503, "the server is shutting down; retry when it has restarted", code="draining"),
        )

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, drain)
        engine_thread.start(loop)
        watching = asyncio.ensure_future(_watch(server, engine_thread))
        try:
            await server.serve()
        finally:
            watching.cancel()

    # The engine thread must release the GIL often, so that the event loop can respond.
    sys.setswitchinterval(0.001)
    asyncio.run(run())
    if engine_thread.failure:
        print(f"error: the engine failed: {engine_thread.failure}", file=sys.stderr)
    if not engine_thread.stop():
        # The thread is compiling, which cannot be interrupted; a normal interpreter exit would abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(DONE)
    return engine_thread.failure is None


def read_token(path: Path) -> str:
    """Read a token from a file. Raises ConfigError if the file is unreadable, or the token is short or not visible ASCII."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--token-file {path}: cannot be read ({error}); it must be a readable text file with the token"
        ) from None
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"--token-file {path}: contains {len(token)} characters; a token needs at least {MIN_TOKEN_LENGTH} visible ASCII "
            "characters without spaces; "
            f"generate one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return token


def check_host(host: str, token: str | None) -> None:
    """Raise ConfigError if other machines can reach `host` and there is no token."""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local and token is None:
        raise ConfigError(
            f"--host {host}: other machines can reach this address, which requires a token; pass --token-file, or use "
            "--host 127.0.0.1"
        )


def _make_service(loaded: LoadedModel, name: str) -> Service:
    tokenizer, limits, n_vocab = loaded.tokenizer, loaded.config.serve, loaded.config.model.n_vocab
    engine = require_decoder_only(loaded.engine, "serving")
    engine_thread = EngineThread(engine, capacity=limits.slots + limits.max_queue, warmup_tokens=limits.warmup_tokens)
    return Service(
        loaded_model=loaded,
        engine_thread=engine_thread,
        metrics=ServerMetrics(engine_thread),
        grammar_compiler=GrammarCompiler(loaded.defaults, n_vocab),
        name=name,
        max_token_bytes=max(len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)),
        chat_template=ChatTemplate(tokenizer, loaded.meta),
    )


async def _watch(server: uvicorn.Server, engine_thread: EngineThread) -> None:
    """Print the server's address, and stop the server if its engine fails."""
    while not server.started:
        await asyncio.sleep(0.02)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if engine_thread.compiling:
        print(
            f"compiling programs: until this is done, requests wait and {address}/health returns 503",
            file=sys.stderr,
            flush=True,
        )
    while engine_thread.compiling and not engine_thread.failure:
        await asyncio.sleep(0.02)
    if not engine_thread.failure:
        print(f"serving on {address}", flush=True)
    while not engine_thread.failure:
        await asyncio.sleep(0.2)
    server.should_exit = True


class _Server(uvicorn.Server):
    """Uvicorn server without its signal handlers, which raise the signal again after the shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield
