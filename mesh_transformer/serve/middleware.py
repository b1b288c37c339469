# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""ASGI middleware for every route: authentication, body size and slow-client timeouts."""

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

from mesh_transformer.serve.completions import error_json
from mesh_transformer.serve.protocol import MAX_QUOTED, ApiError

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
PUBLIC_PATH = "/health"  # needs no token


class RequestLimits:
    """ASGI middleware that checks the token or the Host header, reads the body within limits, and counts responses."""

    def __init__(
        self,
        app: Any,  # an ASGI application
        *,
        token: str | None,
        max_body_bytes: int,
        body_timeout_seconds: float,
        count: Callable[[str, int], None],
    ):
        """Without a `token`, the Host header must name this machine, which excludes web pages of other sites."""
        self._app = app
        self._token = token
        self._max_body_bytes = max_body_bytes
        self._body_timeout_seconds = body_timeout_seconds
        self._count = count

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # reported if the client disconnects before the response starts

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._authorize(scope)
            body = await self._read_body(scope, receive)
            if body is not None:
                await self._app(scope, _replay(body, receive), counting_send)
        except ApiError as error:
            await send_error(error, counting_send)
        finally:
            route = scope.get("route")
            self._count(getattr(route, "path", "unknown"), status)

    def _authorize(self, scope: Message) -> None:
        headers = dict(scope["headers"])  # the last value of a repeated header
        if scope["path"] == PUBLIC_PATH:
            return
        if self._token is None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            if host.rpartition(":")[0] not in LOCAL_HOSTS and host not in LOCAL_HOSTS:
                raise ApiError(
                    403,
                    f"the Host header is {host[:MAX_QUOTED]!r}; without --token-file, the server accepts only 127.0.0.1, localhost "
                    "and [::1]; use one of these addresses",
                    code="host",
                )
        elif not hmac.compare_digest(_find_token(headers.get(b"authorization", b"")), self._token.encode()):
            error = ApiError(
                401,
                "missing or wrong token; send the header Authorization: Bearer TOKEN with the token of --token-file",
                code="invalid_api_key",
            )
            # For the web page, browsers show a login form: the password is the token, and the user name is ignored.
            error.headers["WWW-Authenticate"] = 'Basic realm="mesh transformer"' if scope["path"] == "/" else "Bearer"
            raise error

    async def _read_body(self, scope: Message, receive: Receive) -> bytes | None:
        """Return the full body, or None if the client disconnects."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            raise self._too_large(length.decode("latin-1")[:MAX_QUOTED])
        chunks, n_bytes = [], 0
        try:
            async with asyncio.timeout(self._body_timeout_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    n_bytes += len(message.get("body", b""))
                    if n_bytes > self._max_body_bytes:
                        raise self._too_large(f"at least {n_bytes}")
                    chunks.append(message.get("body", b""))
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            message = (
                f"the request body did not arrive within {self._body_timeout_seconds:g} s; send it faster, or raise "
                "serve.body_timeout_seconds"
            )
            raise ApiError(408, message, code="timeout") from None

    def _too_large(self, n_bytes: str) -> ApiError:
        return ApiError(
            413,
            f"the request body has {n_bytes} bytes; the maximum is {self._max_body_bytes} (serve.max_body_bytes); shorten it",
            code="too_large",
        )


async def send_error(error: ApiError, send: Send) -> None:
    """Send a complete error response."""
    body = json.dumps(error_json(error)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    if error.status == 408:
        headers["Connection"] = "close"
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _find_token(authorization: bytes) -> bytes:
    scheme, _, rest = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` function that returns the body first, then the remaining messages, such as a disconnect."""
    pending = True

    async def replayed() -> Message:
        nonlocal pending
        if pending:
            pending = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed
