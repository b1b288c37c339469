# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A request becomes rows of the engine, and what it draws a JSON object or a stream of chunks: all of POST /v1/completions."""

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

from mesh_transformer.config import SampleConfig
from mesh_transformer.data.chat_template import ChatTemplate
from mesh_transformer.data.tokenizers import TokenizerError
from mesh_transformer.sample.engine.requests import PromptError, Request, RequestParams
from mesh_transformer.sample.loading import LoadedModel
from mesh_transformer.serve.engine_thread import PendingRequest, EngineThread
from mesh_transformer.serve.metrics import ServerMetrics
from mesh_transformer.serve.protocol import ApiError, CompletionRequest
from mesh_transformer.serve.sample_stream import SampleStream, Delta, LogprobFormatter, join_deltas, format_logprobs
from mesh_transformer.serve.structured_output import GrammarMatcher, GrammarCompiler

DEFAULT_TOKENS = 16  # OpenAI's


class Service(NamedTuple):
    """What answers are made with."""

    loaded_model: LoadedModel
    engine_thread: EngineThread
    metrics: ServerMetrics
    grammar_compiler: GrammarCompiler
    name: str  # of the model
    max_token_bytes: int  # bytes
    chat_template: ChatTemplate


@dataclasses.dataclass(frozen=True)
class ApiFormat:
    """What answers look like, and what else differs between /v1/completions, which is this one, and chats (chats.py)."""

    default_tokens: int = DEFAULT_TOKENS  # without max_tokens, or as many as fit
    stop_tokens: Sequence[int] = ()  # besides the end of the text
    kind: str = "cmpl"  # what an answer's id begins with
    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"
    prompt_field: str = "prompt"  # of the request
    continues: bool = True  # the answer goes on with the prompt's text, and is not one of its own
    show: LogprobFormatter = format_logprobs

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """What a stream has of sample `index` before its first token, if anything."""
        return None

    def full(self, index: int, piece: Delta) -> dict[str, Any]:
        """A sample."""
        return {"index": index, "text": piece.text, "logprobs": piece.logprobs, "finish_reason": piece.finish}

    def chunk(self, index: int, piece: Delta) -> dict[str, Any]:
        """A piece of one in a stream."""
        return self.full(index, piece)


class CompletionTask:
    """One request on its way. Close it, whatever happens: rows that go on are cancelled then."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        prompts: list[list[int]],
        grammar: GrammarMatcher | None,
        wire: ApiFormat,
    ):
        """Queues the rows; see `start_completion`."""
        self._service, self._request, self._wire = service, request, wire
        self._start = time.monotonic()
        self._id, self._created = f"{wire.kind}-{secrets.token_hex(12)}", int(time.time())
        self._n, self._drawn = request.n or 1, max(request.best_of or 0, request.n or 1)
        self._n_prompt_tokens = sum(map(len, prompts))
        rows = [row for j, prompt in enumerate(prompts) for row in self._make_rows(prompt, j, len(prompts), grammar)]
        self._choices = [
            self._make_choice(prompts[j], _text_of(service, request, j, prompts[j]) if wire.continues else "")
            for j in range(len(prompts))
            for _ in range(self._drawn)
        ]
        self._ticket: PendingRequest = service.engine_thread.submit(rows)
        service.metrics.prompt_tokens.inc(self._n_prompt_tokens)

    def close(self) -> None:
        """See the class."""
        measures = self._service.metrics
        self._service.engine_thread.close(self._ticket)
        measures.tokens.inc(self._ticket.n_drawn)
        if self._ticket.open:
            measures.cancelled.inc()
        measures.seconds.observe(time.monotonic() - self._start)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece: of `best_of` samples of each prompt the `n` likeliest."""
        pieces: list[list[Delta]] = [[] for _ in self._choices]
        async for number, piece in self._pieces():
            pieces[number].append(piece)
        wholes = [join_deltas(each) for each in pieces]
        choices = []
        for first in range(0, len(wholes), self._drawn):
            order = range(first, first + self._drawn)
            if self._drawn > self._n:
                order = sorted(order, key=lambda number: -self._choices[number].score)[: self._n]
            choices += [self._wire.full(len(choices) + i, wholes[number]) for i, number in enumerate(order)]
        return {**self._head(self._wire.whole_object), "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events; an error on the way is one as well."""
        options = self._request.stream_options
        wants_usage = options is not None and options.include_usage
        head = self._head(self._wire.chunk_object) | ({"usage": None} if wants_usage else {})
        for number in range(len(self._choices)):
            if opening := self._wire.first_chunk(number):
                yield _event({**head, "choices": [opening]})
        try:
            async for number, piece in self._pieces():
                if piece.text or piece.finish or any((piece.logprobs or {}).values()):
                    yield _event({**head, "choices": [self._wire.chunk(number, piece)]})
            if wants_usage:
                yield _event({**head, "choices": [], "usage": self._usage()})
        except ApiError as error:
            yield _event(error_json(error))
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """(sample, what is new of it); a burst of tokens is one piece."""
        first = True
        async for events in self._ticket.events():
            if first:
                self._service.metrics.first_token.observe(time.monotonic() - self._start)
                first = False
            for number in dict.fromkeys(event.request for event in events):
                choice = self._choices[number]
                if choice.done:
                    continue
                piece = choice.push([event for event in events if event.request == number])
                if choice.done:
                    self._ticket.end(number)
                    self._check_grammar(number)
                yield number, piece

    def _check_grammar(self, number: int) -> None:
        constraint = self._ticket.rows[number].params.constraint
        if isinstance(constraint, GrammarMatcher) and constraint.error:
            raise ApiError(400, f"the constraint is too much work to follow: {constraint.error[:200]}")

    def _make_rows(self, prompt: list[int], j: int, n_prompts: int, grammar: GrammarMatcher | None) -> list[Request]:
        request, trained = self._request, self._service.loaded_model
        engine, seq_len = trained.engine, trained.config.model.seq_len
        asked = request.max_tokens
        room = max(min(self._wire.default_tokens, seq_len - len(prompt)), 1) if asked is None else max(asked, 1)
        seed = secrets.randbits(32) if request.seed is None else request.seed % 2**32
        params = RequestParams(
            make_options(request),
            max_tokens=room,
            stop_tokens=[trained.tokenizer.end_of_text, *self._wire.stop_tokens],
            seed=seed,
            logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
            top_logprobs=request.logprobs or 0,
            score_prompt=bool(request.echo) and request.logprobs is not None,
        )
        name = f"prompt {j + 1}" if n_prompts > 1 else "the prompt"
        try:
            samples = [
                dataclasses.replace(params, sample=i, constraint=grammar and grammar.fork())
                for i in range(self._drawn)
            ]
            return [engine.make_request(prompt, each, name=name) for each in samples]
        except PromptError as error:
            param = "logit_bias" if str(error).startswith("logit_bias") else self._wire.prompt_field
            code = "context_length_exceeded" if "seq_len" in str(error) else None
            raise ApiError(400, str(error)[:400], param=param, code=code) from None

    def _make_choice(self, prompt: list[int], text: str) -> SampleStream:
        request = self._request
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        return SampleStream(
            self._service.loaded_model.tokenizer,
            text,
            prompt,
            stops=stops,
            n_top=request.logprobs,
            echo=bool(request.echo),
            empty=request.max_tokens == 0,
            show=self._wire.show,
        )

    def _head(self, kind: str) -> dict[str, Any]:
        service = self._service
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": service.name,
            "system_fingerprint": f"step_{service.loaded_model.step}",
        }

    def _usage(self) -> dict[str, int]:
        drawn = 0 if self._request.max_tokens == 0 else sum(len(choice.row.tokens) for choice in self._choices)
        return {
            "prompt_tokens": self._n_prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self._n_prompt_tokens + drawn,
        }


@contextlib.asynccontextmanager
async def start_completion(
    service: Service, request: CompletionRequest, wire: ApiFormat = ApiFormat()
) -> AsyncGenerator[CompletionTask, None]:
    """A request on its way. ApiError says what cannot be granted."""
    check_model(service, request.model)
    texts = list_prompts(request)
    service.engine_thread.check_capacity(len(texts) * max(request.best_of or 0, request.n or 1))
    # Both may take long, and the event loop answers others.
    prompts = await asyncio.to_thread(_encode, service, texts)
    grammar = await asyncio.to_thread(_make_grammar, service.grammar_compiler, request)
    completion = CompletionTask(service, request, prompts, grammar, wire)
    try:
        yield completion
    finally:
        completion.close()


def check_model(service: Service, name: str | None) -> None:
    """ApiError 404 unless it is the model that is served, or none was named."""
    if name is not None and name != service.name:
        raise ApiError(404, f"the model served here is {service.name}", param="model", code="model_not_found")


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


def check_length(service: Service, prompt: str | list[int], field: str) -> None:
    """ApiError 400 for a prompt that has too many tokens, whatever they are; `field` is the request's."""
    seq_len = service.loaded_model.config.model.seq_len
    # Most text of any seq_len tokens is shorter; what is longer even than the longest need not be encoded.
    size = len(prompt) if isinstance(prompt, list) else -(-len(prompt) // service.max_token_bytes)
    if size > seq_len:
        raise ApiError(
            400,
            f"a prompt of {len(prompt)} {'tokens' if isinstance(prompt, list) else 'characters'} is longer than the "
            f"model reads (seq_len={seq_len} tokens, the answer included); shorten it",
            param=field,
            code="context_length_exceeded",
        )


def _encode(service: Service, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    tokenizer, encoded = service.loaded_model.tokenizer, []
    for prompt in prompts:
        check_length(service, prompt, "prompt")
        try:
            encoded.append(prompt if isinstance(prompt, list) else tokenizer.encode(prompt) or [tokenizer.end_of_text])
        except TokenizerError as error:
            raise ApiError(400, str(error)[:400], param="prompt") from None
    return encoded


def _text_of(service: Service, request: CompletionRequest, j: int, tokens: list[int]) -> str:
    prompt = list_prompts(request)[j]
    return prompt if isinstance(prompt, str) else service.loaded_model.tokenizer.decode(tokens)


def _make_grammar(grammars: GrammarCompiler, request: CompletionRequest) -> GrammarMatcher | None:
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
