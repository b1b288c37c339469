# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The routes, and what every answer has in common."""

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
from mesh_transformer.serve.completions import CompletionTask, Service, ApiFormat, error_json, start_completion
from mesh_transformer.serve.protocol import (
    ApiError,
    ChatCompletionResponse,
    ChatCompletionRequest,
    CompleteResponse,
    CompleteRequest,
    CompletionResponse,
    CompletionRequest,
    ErrorResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    describe_validation_errors,
)

ORIGINAL = ApiFormat(default_tokens=256)  # as many as mesh-transformer-jax's server drew
BODIES = {"/complete": CompleteRequest, "/v1/completions": CompletionRequest, "/v1/chat/completions": ChatCompletionRequest}
ERRORS = {
    400: "what is asked cannot be done",
    401: "no token, or a wrong one",
    403: "asked under another name than this machine's",
    404: "no such thing",
    405: "no such method",
    408: "the request arrived too slowly",
    413: "the request is too large",
    429: "no place left; Retry-After says when to try again",
    503: "it took too long, or the server is going down",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in ERRORS.items()
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {}}}, "description": "the answer, or its stream"}
}


Start = Callable[[], AbstractAsyncContextManager[CompletionTask]]  # begins a request's work


class ClientDisconnected(Exception):
    """The client has gone."""


def make_app(service: Service, *, request_timeout_seconds: float) -> FastAPI:
    """The application without what stands in front of it. `app.state.draining` becomes true when the server goes down."""
    app = FastAPI(title="Mesh Transformer", docs_url=None, redoc_url=None, responses=RESPONSES)
    app.state.draining = False
    _add_errors(app)
    _add_information(app, service)
    _add_page(app)

    @app.post("/v1/completions", response_model=CompletionResponse, responses=STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts: OpenAI's format."""
        return await answer(partial(start_completion, service, body), bool(body.stream), request)

    @app.post("/v1/chat/completions", response_model=ChatCompletionResponse, responses=STREAM)
    async def chat(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer messages: OpenAI's format, for models whose tokenizer has a chat template."""
        return await answer(partial(start_chat, service, body), bool(body.stream), request)

    @app.post("/complete", response_model=CompleteResponse)
    async def complete(body: CompleteRequest, request: Request) -> Response:
        """Continue a text by 256 tokens: the format of mesh-transformer-jax's server."""
        wanted = CompletionRequest(prompt=body.context, top_p=body.top_p, temperature=body.temp)
        found = await run_until_disconnect(
            full_response(partial(start_completion, service, wanted, ORIGINAL)), request, request_timeout_seconds
        )
        return JSONResponse({"completion": found["choices"][0]["text"]})

    async def answer(start: Start, stream: bool, request: Request) -> Response:
        if stream:
            return EventStream(start, request_timeout_seconds)
        return JSONResponse(await run_until_disconnect(full_response(start), request, request_timeout_seconds))

    plain = app.openapi

    def openapi() -> dict[str, Any]:
        schema = plain()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # it is 400 here
        return schema

    app.openapi = openapi
    return app


async def full_response(start: Start) -> dict[str, Any]:
    """An answer in one piece."""
    async with start() as completion:
        return await completion.whole()


async def run_until_disconnect(work: Any, request: Request, seconds: float) -> Any:
    """The result of `work`, which is cancelled when the client leaves (ClientDisconnected) or time is up (ApiError 503)."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(wait_disconnect(request.receive))
    try:
        done, _ = await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise ClientDisconnected if gone in done else _too_long(seconds)
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait((task, gone))


async def wait_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of a completion. What is wrong before the first one is an ordinary error."""

    def __init__(self, start: Start, seconds: float):
        super().__init__()
        self._start, self._seconds = start, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        gone = asyncio.ensure_future(wait_disconnect(receive))
        writing = asyncio.ensure_future(self._write(send))
        try:
            await asyncio.wait((gone, writing), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for each in (gone, writing):
                each.cancel()
            await asyncio.wait((gone, writing))

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
                body = f"data: {json.dumps(error_json(_too_long(self._seconds)))}\n\ndata: [DONE]\n\n".encode()
                with contextlib.suppress(TimeoutError):  # of a reader that does not read
                    await asyncio.wait_for(send({"type": "http.response.body", "body": body, "more_body": True}), 1.0)
            await send({"type": "http.response.body", "body": b""})


def _too_long(seconds: float) -> ApiError:
    return ApiError(503, f"no answer within {seconds:g} s; ask for fewer tokens, or stream", code="timeout")


def _add_information(app: FastAPI, service: Service) -> None:
    trained, created = service.loaded_model, int(time.time())
    model = dict(
        id=service.name,
        object="model",
        created=created,
        owned_by="mesh-transformer",
        max_model_len=trained.config.model.seq_len,
        n_vocab=trained.config.model.n_vocab,
        step=trained.step,
        defaults={
            name: getattr(trained.config.sample, name)
            for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        },
    )

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}", response_model=ModelCard)
    async def one_model(name: str) -> Response:
        """The same by its name."""
        if name != service.name:
            raise ApiError(404, f"the model served here is {service.name}", param="model", code="model_not_found")
        return JSONResponse(model)

    @app.get("/health", response_model=HealthResponse)
    async def health() -> Response:
        """Whether requests are answered at once: 200, or 503 with the reason. The one route that needs no token."""
        worker = service.engine_thread
        if worker.failure:
            status, reason = "failed", "the engine has failed"
        elif app.state.draining:
            status, reason = "draining", "the server is going down"
        elif compiling := worker.compiling:
            status, reason = "compiling", compiling
        else:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": status, "reason": reason}, 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
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
        """A page to try the model with."""
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
    async def http_error(_: Request, error: HTTPException) -> Response:
        wrong = ApiError(error.status_code, str(error.detail)[:200])
        return JSONResponse(error_json(wrong), error.status_code, headers=error.headers)

    @app.exception_handler(ClientDisconnected)
    async def left(_: Request, error: ClientDisconnected) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse(error_json(ApiError(500, "the server made a mistake", code="internal_error")), 500)
