# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""POST /v1/completions: a request becomes rows of the engine, and what it draws a JSON object or a stream of chunks."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

from mesh_transformer.config import SampleConfig
from mesh_transformer.data.tokenizers import TokenizerError
from mesh_transformer.sample.requests import PromptError, Row
from mesh_transformer.sample.trained import Trained
from mesh_transformer.serve.choices import Choice, Piece, join_pieces
from mesh_transformer.serve.constraints import Grammar, Grammars
from mesh_transformer.serve.measures import Measures
from mesh_transformer.serve.protocol import ApiError, CompletionRequest
from mesh_transformer.serve.worker import Ticket, Worker

DEFAULT_TOKENS = 16  # OpenAI's


class Service(NamedTuple):
    """What answers are made with."""

    trained: Trained
    worker: Worker
    measures: Measures
    grammars: Grammars
    name: str  # of the model
    longest_token: int  # bytes


class Completion:
    """One request on its way. Close it, whatever happens: rows that go on are cancelled then."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        prompts: list[list[int]],
        grammar: Grammar | None,
        default_tokens: int,
    ):
        """Queues the rows; see `start_completion`."""
        self._service, self._request, self._default_tokens = service, request, default_tokens
        self._start = time.monotonic()
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._n, self._drawn = request.n or 1, max(request.best_of or 0, request.n or 1)
        self._n_prompt_tokens = sum(map(len, prompts))
        rows = [row for j, prompt in enumerate(prompts) for row in self._make_rows(prompt, j, len(prompts), grammar)]
        self._choices = [
            self._make_choice(prompts[j], _text_of(service, request, j, prompts[j]))
            for j in range(len(prompts))
            for _ in range(self._drawn)
        ]
        self._ticket: Ticket = service.worker.submit(rows)
        service.measures.prompt_tokens.inc(self._n_prompt_tokens)

    def close(self) -> None:
        """See the class."""
        measures = self._service.measures
        self._service.worker.close(self._ticket)
        measures.tokens.inc(self._ticket.n_drawn)
        if self._ticket.open:
            measures.cancelled.inc()
        measures.seconds.observe(time.monotonic() - self._start)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece: of `best_of` samples of each prompt the `n` likeliest."""
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        async for number, piece in self._pieces():
            pieces[number].append(piece)
        wholes = [join_pieces(each) for each in pieces]
        choices = []
        for first in range(0, len(wholes), self._drawn):
            order = range(first, first + self._drawn)
            if self._drawn > self._n:
                order = sorted(order, key=lambda number: -self._choices[number].score)[: self._n]
            choices += [self._to_json(len(choices) + i, wholes[number]) for i, number in enumerate(order)]
        return {**self._head(), "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events; an error on the way is one as well."""
        options = self._request.stream_options
        wants_usage = options is not None and options.include_usage
        extra = {"usage": None} if wants_usage else {}
        try:
            async for number, piece in self._pieces():
                if piece.text or piece.finish or (piece.logprobs and piece.logprobs["tokens"]):
                    yield _event({**self._head(), "choices": [self._to_json(number, piece)], **extra})
            if wants_usage:
                yield _event({**self._head(), "choices": [], "usage": self._usage()})
        except ApiError as error:
            yield _event(error_json(error))
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(sample, what is new of it); a burst of tokens is one piece."""
        first = True
        async for events in self._ticket.events():
            if first:
                self._service.measures.first_token.observe(time.monotonic() - self._start)
                first = False
            for number in dict.fromkeys(event.row for event in events):
                choice = self._choices[number]
                if choice.done:
                    continue
                piece = choice.push([event for event in events if event.row == number])
                if choice.done:
                    self._ticket.end(number)
                    self._check_grammar(number)
                yield number, piece

    def _check_grammar(self, number: int) -> None:
        constraint = self._ticket.rows[number].constraint
        if isinstance(constraint, Grammar) and constraint.error:
            raise ApiError(400, f"the constraint is too much work to follow: {constraint.error[:200]}")

    def _make_rows(self, prompt: list[int], j: int, n_prompts: int, grammar: Grammar | None) -> list[Row]:
        request, trained = self._request, self._service.trained
        engine, seq_len = trained.engine, trained.config.model.seq_len
        asked = request.max_tokens
        room = max(min(self._default_tokens, seq_len - len(prompt)), 1) if asked is None else max(asked, 1)
        seed = secrets.randbits(32) if request.seed is None else request.seed % 2**32
        wishes: dict[str, Any] = dict(
            max_tokens=room,
            stop_tokens=[trained.tokenizer.end_of_text],
            seed=seed,
            logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
            n_top=request.logprobs or 0,
            score_prompt=bool(request.echo) and request.logprobs is not None,
            name=f"prompt {j + 1}" if n_prompts > 1 else "the prompt",
        )
        options = make_options(request)
        try:
            return [
                engine.make_row(prompt, options, sample=i, constraint=grammar and grammar.fork(), **wishes)
                for i in range(self._drawn)
            ]
        except PromptError as error:
            param = "logit_bias" if str(error).startswith("logit_bias") else "prompt"
            code = "context_length_exceeded" if "seq_len" in str(error) else None
            raise ApiError(400, str(error)[:400], param=param, code=code) from None

    def _make_choice(self, prompt: list[int], text: str) -> Choice:
        request = self._request
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        return Choice(
            self._service.trained.tokenizer,
            text,
            prompt,
            stops=stops,
            n_top=request.logprobs,
            echo=bool(request.echo),
            empty=request.max_tokens == 0,
        )

    def _head(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": service.name,
            "system_fingerprint": f"step_{service.trained.step}",
        }

    def _usage(self) -> dict[str, int]:
        drawn = 0 if self._request.max_tokens == 0 else sum(len(choice.row.tokens) for choice in self._choices)
        return {
            "prompt_tokens": self._n_prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self._n_prompt_tokens + drawn,
        }

    def _to_json(self, index: int, piece: Piece) -> dict[str, Any]:
        return {"index": index, "text": piece.text, "logprobs": piece.logprobs, "finish_reason": piece.finish}


@contextlib.asynccontextmanager
async def start_completion(
    service: Service, request: CompletionRequest, *, default_tokens: int = DEFAULT_TOKENS
) -> AsyncGenerator[Completion, None]:
    """A request on its way. Without max_tokens there are `default_tokens`, or as many as fit.

    ApiError says what cannot be granted.
    """
    if request.model is not None and request.model != service.name:
        raise ApiError(404, f"the model served here is {service.name}", param="model", code="model_not_found")
    texts = list_prompts(request)
    service.worker.check_room(len(texts) * max(request.best_of or 0, request.n or 1))
    # Both may take long, and the event loop answers others.
    prompts = await asyncio.to_thread(_encode, service, texts)
    grammar = await asyncio.to_thread(_make_grammar, service.grammars, request)
    completion = Completion(service, request, prompts, grammar, default_tokens)
    try:
        yield completion
    finally:
        completion.close()


def list_prompts(request: CompletionRequest) -> list[str | list[int]]:
    """Every prompt by itself, in any of the four ways to write them."""
    prompt: Any = request.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def make_options(request: CompletionRequest) -> SampleConfig:
    """How tokens are drawn, with OpenAI's defaults."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    return SampleConfig(**{"temperature": 1.0, "max_tokens": 1, **given})


def error_json(error: ApiError) -> dict[str, Any]:
    """OpenAI's envelope."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def _encode(service: Service, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    tokenizer, seq_len = service.trained.tokenizer, service.trained.config.model.seq_len
    encoded = []
    for prompt in prompts:
        # Most text of any seq_len tokens is shorter; what is longer even than the longest need not be encoded.
        size = len(prompt) if isinstance(prompt, list) else -(-len(prompt) // service.longest_token)
        if size > seq_len:
            raise ApiError(
                400,
                f"a prompt of {len(prompt)} {'tokens' if isinstance(prompt, list) else 'characters'} is longer than the "
                f"model reads (seq_len={seq_len} tokens, the answer included); shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        try:
            encoded.append(prompt if isinstance(prompt, list) else tokenizer.encode(prompt) or [tokenizer.end_of_text])
        except TokenizerError as error:
            raise ApiError(400, str(error)[:400], param="prompt") from None
    return encoded


def _text_of(service: Service, request: CompletionRequest, j: int, tokens: list[int]) -> str:
    prompt = list_prompts(request)[j]
    return prompt if isinstance(prompt, str) else service.trained.tokenizer.decode(tokens)


def _make_grammar(grammars: Grammars, request: CompletionRequest) -> Grammar | None:
    wanted = request.response_format
    try:
        if request.guided_regex is not None:
            return grammars.from_regex(request.guided_regex)
        if wanted is not None and wanted.type != "text":
            return grammars.from_schema(wanted.json_schema.schema_ if wanted.json_schema else None)
    except PromptError as error:
        raise ApiError(
            400, str(error)[:400], param="guided_regex" if request.guided_regex else "response_format"
        ) from None
    return None


def _event(table: dict[str, Any]) -> str:
    return f"data: {json.dumps(table, ensure_ascii=False)}\n\n"
