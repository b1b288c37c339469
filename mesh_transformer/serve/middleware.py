# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What stands in front of every route: who may ask, how much, and how slowly."""

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

from mesh_transformer.serve.completions import error_json
from mesh_transformer.serve.protocol import ApiError

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
LOCAL = ("127.0.0.1", "localhost", "[::1]")
OPEN_PATH = "/health"


class RequestLimits:
    """ASGI in front of ASGI: checks the token or the host's name, reads the body within limits, counts answers."""

    def __init__(
        self,
        app: Any,  # an ASGI application
        *,
        token: str | None,
        max_body_bytes: int,
        body_timeout_seconds: float,
        count: Callable[[str, int], None],
    ):
        """Without a `token` only requests to this machine's own name are let in: a page elsewhere may not ask for it."""
        self._app, self._token, self._max_body, self._body_seconds = app, token, max_body_bytes, body_timeout_seconds
        self._count = count

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # for a client that was gone before it got any

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._admit(scope)
            body = await self._read_body(scope, receive)
            if body is not None:
                await self._app(scope, _replay(body, receive), noting)
        except ApiError as error:
            await send_error(error, noting)
        finally:
            route = scope.get("route")
            self._count(getattr(route, "path", "unknown"), status)

    def _admit(self, scope: Message) -> None:
        headers = dict(scope["headers"])  # of a repeated one the last
        if scope["path"] == OPEN_PATH:
            return
        if self._token is None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            if host.rpartition(":")[0] not in LOCAL and host not in LOCAL:
                raise ApiError(403, "without a token this server answers only to 127.0.0.1 and localhost", code="host")
        elif not hmac.compare_digest(_find_token(headers.get(b"authorization", b"")), self._token.encode()):
            error = ApiError(401, "a bearer token is needed: Authorization: Bearer ...", code="invalid_api_key")
            # For the page, browsers ask for a name, which does not matter, and a password: the token.
            error.headers["WWW-Authenticate"] = 'Basic realm="mesh transformer"' if scope["path"] == "/" else "Bearer"
            raise error

    async def _read_body(self, scope: Message, receive: Receive) -> bytes | None:
        """All of it; None if the client leaves meanwhile."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    if size > self._max_body:
                        raise self._too_large()
                    parts.append(message.get("body", b""))
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {self._body_seconds:g} s", code="timeout") from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a request has at most {self._max_body} bytes", code="too_large")


async def send_error(error: ApiError, send: Send) -> None:
    """The envelope as a whole response."""
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
    """First the body, then whatever else comes: that the client leaves."""
    pending = True

    async def replayed() -> Message:
        nonlocal pending
        if pending:
            pending = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed
