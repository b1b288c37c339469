# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The ASGI application: routes, error responses and event streams."""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from mesh_transformer.serve.chat_completions import start_chat
from mesh_transformer.serve.completions import (
    ApiFormat,
    CompletionTask,
    Service,
    error_json,
    start_completion,
    unknown_model_error,
)
from mesh_transformer.serve.protocol import (
    MAX_QUOTED,
    ApiError,
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompleteRequest,
    CompleteResponse,
    CompletionRequest,
    CompletionResponse,
    ErrorResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    describe_validation_errors,
)

LEGACY_FORMAT = ApiFormat(default_max_tokens=256)  # number of tokens that mesh-transformer-jax's server generates
BODIES = {
    "/complete": CompleteRequest,
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}
ERRORS = {
    400: "invalid request",
    401: "missing or wrong token",
    403: "the Host header does not name this machine",
    404: "not found",
    405: "method not allowed",
    408: "the request body arrived too slowly",
    413: "the request body is too large",
    429: "no free capacity; retry after the seconds given by Retry-After",
    503: "the response took too long, or the server is shutting down",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in ERRORS.items()
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {}}}, "description": "the response, or its stream"}
}


StartFn = Callable[[], AbstractAsyncContextManager[CompletionTask]]  # starts one completion


class ClientDisconnected(Exception):
    """The client closed the connection."""


def make_app(service: Service, *, request_timeout_seconds: float) -> FastAPI:
    """Return the application without middleware. `app.state.draining` is set while the server shuts down."""
    app = FastAPI(title="Mesh Transformer", docs_url=None, redoc_url=None, responses=RESPONSES)
    app.state.draining = False
    _add_errors(app)
    _add_information(app, service)
    _add_page(app)

    @app.post("/v1/completions", response_model=CompletionResponse, responses=STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue text; OpenAI's format."""
        return await respond(partial(start_completion, service, body), bool(body.stream), request)

    @app.post("/v1/chat/completions", response_model=ChatCompletionResponse, responses=STREAM)
    async def chat(body: ChatCompletionRequest, request: Request) -> Response:
        """Respond to messages; OpenAI's format, for models whose tokenizer has a chat template."""
        return await respond(partial(start_chat, service, body), bool(body.stream), request)

    @app.post("/complete", response_model=CompleteResponse)
    async def complete(body: CompleteRequest, request: Request) -> Response:
        """Continue text by 256 tokens; the format of mesh-transformer-jax's server."""
        completion_request = CompletionRequest(prompt=body.context, top_p=body.top_p, temperature=body.temp)
        start = partial(start_completion, service, completion_request, LEGACY_FORMAT)
        response = await run_until_disconnect(full_response(start), request, request_timeout_seconds)
        return JSONResponse({"completion": response["choices"][0]["text"]})

    async def respond(start: StartFn, stream: bool, request: Request) -> Response:
        if stream:
            return EventStream(start, request_timeout_seconds)
        return JSONResponse(await run_until_disconnect(full_response(start), request, request_timeout_seconds))

    make_schema = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make_schema()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # validation errors have status 400 here
        return schema

    app.openapi = openapi
    return app


async def full_response(start: StartFn) -> dict[str, Any]:
    """Return the complete response of a completion."""
    async with start() as completion:
        return await completion.full_response()


async def run_until_disconnect(work: Any, request: Request, seconds: float) -> Any:
    """Return the result of the coroutine `work`.

    `work` is canceled if the client disconnects (ClientDisconnected is raised) or after `seconds` (ApiError 503 is raised).
    """
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(wait_disconnect(request.receive))
    try:
        done, _ = await asyncio.wait((task, disconnect), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise ClientDisconnected if disconnect in done else _timeout_error(seconds)
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.wait((task, disconnect))


async def wait_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    """Wait until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of a completion. An error before the first event is an ordinary error response."""

    def __init__(self, start: StartFn, seconds: float):
        super().__init__()
        self._start = start
        self._seconds = seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        disconnect = asyncio.ensure_future(wait_disconnect(receive))
        writing = asyncio.ensure_future(self._write(send))
        try:
            await asyncio.wait((disconnect, writing), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            disconnect.cancel()
            writing.cancel()
            await asyncio.wait((disconnect, writing))

    async def _write(self, send: Any) -> None:
        async with self._start() as completion:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            events = completion.stream()
            try:
                async with asyncio.timeout(self._seconds), contextlib.aclosing(events):
                    async for event in events:
                        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            except TimeoutError:
                error = json.dumps(error_json(_timeout_error(self._seconds)))
                body = f"data: {error}\n\ndata: [DONE]\n\n".encode()
                with contextlib.suppress(TimeoutError):  # the client may not be reading
                    await asyncio.wait_for(send({"type": "http.response.body", "body": body, "more_body": True}), 1.0)
            await send({"type": "http.response.body", "body": b""})


def _timeout_error(seconds: float) -> ApiError:
    return ApiError(
        503,
        f"the response was not complete after {seconds:g} s (serve.request_timeout_seconds); reduce max_tokens",
        code="timeout",
    )


def _add_information(app: FastAPI, service: Service) -> None:
    loaded = service.loaded_model
    model = dict(
        id=service.name,
        object="model",
        created=int(time.time()),
        owned_by="mesh-transformer",
        max_model_len=loaded.config.model.seq_len,
        n_vocab=loaded.config.model.n_vocab,
        step=loaded.step,
        defaults={
            name: getattr(loaded.config.sample, name)
            for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        },
    )

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """List the served model."""
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}", response_model=ModelCard)
    async def one_model(name: str) -> Response:
        """Return the served model by name."""
        if name != service.name:
            raise unknown_model_error(service, name)
        return JSONResponse(model)

    @app.get("/health", response_model=HealthResponse)
    async def health() -> Response:
        """Return 200 if requests are processed immediately, else 503 with the reason. This route requires no token."""
        engine_thread = service.engine_thread
        if engine_thread.failure:
            status, reason = "failed", "the engine failed; the log of the server has the error"
        elif app.state.draining:
            status, reason = "draining", "the server is shutting down"
        elif compiling := engine_thread.compiling:
            status, reason = "compiling", compiling
        else:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": status, "reason": reason}, 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(service.metrics.expose(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    page = resources.files("mesh_transformer.serve").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    headers = {
        "Content-Security-Policy": f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @app.get("/", response_class=HTMLResponse)
    async def index() -> Response:
        """Return a web page for trying the model."""
        return HTMLResponse(page, headers=headers)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error_json(error), error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        known = BODIES[request.url.path].model_fields
        message, field = describe_validation_errors(list(error.errors()), known)
        return JSONResponse(error_json(ApiError(400, message, param=field)), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)[:MAX_QUOTED]
        if error.status_code in (404, 405):
            message = f"{request.method} {request.url.path[:MAX_QUOTED]}: {message}; /openapi.json lists the routes"
        api_error = ApiError(error.status_code, message)
        return JSONResponse(error_json(api_error), error.status_code, headers=error.headers)

    @app.exception_handler(ClientDisconnected)
    async def disconnected(_: Request, error: ClientDisconnected) -> Response:
        return Response(status_code=499)  # counted in the metrics; the client does not receive it

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        api_error = ApiError(
            500, "internal server error; the log of the server has the traceback", code="internal_error"
        )
        return JSONResponse(error_json(api_error), 500)
