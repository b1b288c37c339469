# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""POST /v1/completions: API request -> engine requests -> a JSON response or a stream of chunks."""

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
from mesh_transformer.sample.model_defaults import ModelDefaults
from mesh_transformer.serve.engine_thread import EngineThread, PendingRequest
from mesh_transformer.serve.metrics import ServerMetrics
from mesh_transformer.serve.protocol import MAX_QUOTED, ApiError, CompletionRequest
from mesh_transformer.serve.sample_stream import (
    Delta,
    LogprobFormatter,
    OutputOptions,
    SampleStream,
    format_logprobs,
    join_deltas,
)
from mesh_transformer.serve.structured_output import GrammarCompiler, GrammarMatcher

DEFAULT_MAX_TOKENS = 16  # OpenAI's default


class Service(NamedTuple):
    """The objects shared by all API requests."""

    loaded_model: LoadedModel
    engine_thread: EngineThread
    metrics: ServerMetrics
    grammar_compiler: GrammarCompiler
    name: str  # name of the model in the API
    max_token_bytes: int  # largest number of bytes of a token's text
    chat_template: ChatTemplate


@dataclasses.dataclass(frozen=True)
class ApiFormat:
    """Response format and defaults of an endpoint. The field defaults are for /v1/completions; ChatFormat overrides them."""

    default_max_tokens: int = DEFAULT_MAX_TOKENS  # if neither request nor model sets a number; limited by seq_len
    stop_tokens: Sequence[int] = ()  # in addition to the model's eos_token_ids
    id_prefix: str = "cmpl"
    full_object: str = "text_completion"
    chunk_object: str = "text_completion"
    prompt_field: str = "prompt"  # field of the request that holds the prompt
    continues_prompt: bool = True  # the output continues the prompt's text
    format_logprobs: LogprobFormatter = format_logprobs

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Return the chunk before the first token of sample `index`, or None if the format has no such chunk."""
        return None

    def full(self, index: int, output: Delta) -> dict[str, Any]:
        """Return the entry of `choices` for a complete sample."""
        return {
            "index": index,
            "text": output.text,
            "logprobs": output.logprobs,
            "finish_reason": output.finish_reason,
        }

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """Return the entry of `choices` for a chunk of a stream."""
        return self.full(index, delta)


class CompletionTask:
    """One API request in progress. `close` must be called, which cancels the remaining engine requests."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        prompts: list[list[int]],
        grammar: GrammarMatcher | None,
        api_format: ApiFormat,
    ):
        """Submit the engine requests; see `start_completion`."""
        self._service = service
        self._request = request
        self._format = api_format
        self._start = time.monotonic()
        self._id = f"{api_format.id_prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._n = request.n or 1
        self._n_generated = max(request.best_of or 0, self._n)  # samples per prompt
        self._n_prompt_tokens = sum(map(len, prompts))
        requests = [
            engine_request
            for j, prompt in enumerate(prompts)
            for engine_request in self._make_requests(prompt, j, len(prompts), grammar)
        ]
        self._samples = [
            self._make_stream(tokens, _prompt_text(service, prompt, tokens) if api_format.continues_prompt else "")
            for prompt, tokens in zip(list_prompts(request), prompts, strict=True)
            for _ in range(self._n_generated)
        ]
        self._pending: PendingRequest = service.engine_thread.submit(requests)
        service.metrics.prompt_tokens.inc(self._n_prompt_tokens)

    def close(self) -> None:
        """Cancel the remaining engine requests and count the completion in the metrics."""
        metrics = self._service.metrics
        self._service.engine_thread.close(self._pending)
        metrics.generated_tokens.inc(self._pending.n_generated)
        for request in self._pending.requests:
            metrics.draft_tokens.inc(request.speculative.draft_tokens)
            metrics.accepted_tokens.inc(request.speculative.accepted_tokens)
        if self._pending.open:
            metrics.canceled.inc()
        metrics.seconds.observe(time.monotonic() - self._start)

    async def full_response(self) -> dict[str, Any]:
        """Return the complete response, with the `n` most probable of `best_of` samples of each prompt."""
        deltas: list[list[Delta]] = [[] for _ in self._samples]
        async for index, delta in self._deltas():
            deltas[index].append(delta)
        outputs = [join_deltas(sample_deltas) for sample_deltas in deltas]
        choices = []
        for first in range(0, len(outputs), self._n_generated):
            order = range(first, first + self._n_generated)
            if self._n_generated > self._n:
                order = sorted(order, key=lambda index: -self._samples[index].mean_logprob)[: self._n]
            choices += [self._format.full(len(choices) + i, outputs[index]) for i, index in enumerate(order)]
        return {**self._header(self._format.full_object), "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[str, None]:
        """Yield server-sent events; an error during generation is also an event."""
        options = self._request.stream_options
        include_usage = options is not None and options.include_usage
        header = self._header(self._format.chunk_object) | ({"usage": None} if include_usage else {})
        for index in range(len(self._samples)):
            if choice := self._format.first_chunk(index):
                yield _server_sent_event({**header, "choices": [choice]})
        try:
            async for index, delta in self._deltas():
                if delta.text or delta.finish_reason or any((delta.logprobs or {}).values()):
                    yield _server_sent_event({**header, "choices": [self._format.chunk(index, delta)]})
            if include_usage:
                yield _server_sent_event({**header, "choices": [], "usage": self._usage()})
        except ApiError as error:
            yield _server_sent_event(error_json(error))
        yield "data: [DONE]\n\n"

    async def _deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield (index of a sample, new output); tokens that arrive together form one delta."""
        is_first = True
        async for events in self._pending.events():
            if is_first:
                self._service.metrics.first_token.observe(time.monotonic() - self._start)
                is_first = False
            for index in dict.fromkeys(event.request for event in events):
                sample = self._samples[index]
                if sample.done:
                    continue
                delta = sample.push([event for event in events if event.request == index])
                if sample.done:
                    self._pending.finish(index)
                    self._check_grammar(index)
                yield index, delta

    def _check_grammar(self, index: int) -> None:
        constraint = self._pending.requests[index].params.constraint
        if isinstance(constraint, GrammarMatcher) and constraint.error:
            raise ApiError(
                400,
                f"the grammar of guided_regex or response_format is too complex ({constraint.error[:200]}); simplify it",
            )

    def _make_requests(
        self, prompt: list[int], j: int, n_prompts: int, grammar: GrammarMatcher | None
    ) -> list[Request]:
        request, loaded = self._request, self._service.loaded_model
        if request.max_tokens is None:
            default = loaded.defaults.request_defaults.get("max_tokens", self._format.default_max_tokens)
            max_tokens = min(default, loaded.config.model.seq_len - len(prompt))
        else:
            max_tokens = request.max_tokens
        params = RequestParams(
            make_options(request, loaded.defaults),
            max_tokens=max(max_tokens, 1),
            stop_tokens=[*loaded.defaults.eos_token_ids, *self._format.stop_tokens],
            seed=secrets.randbits(32) if request.seed is None else request.seed % 2**32,
            logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
            top_logprobs=request.logprobs or 0,
            score_prompt=bool(request.echo) and request.logprobs is not None,
        )
        name = f"prompt {j + 1}" if n_prompts > 1 else "the prompt"
        samples = [
            dataclasses.replace(params, sample=i, constraint=grammar and grammar.fork())
            for i in range(self._n_generated)
        ]
        try:
            return [loaded.engine.make_request(prompt, sample_params, name=name) for sample_params in samples]
        except PromptError as error:
            param = "logit_bias" if str(error).startswith("logit_bias") else self._format.prompt_field
            code = "context_length_exceeded" if "seq_len" in str(error) else None
            raise ApiError(400, str(error)[:400], param=param, code=code) from None

    def _make_stream(self, prompt_tokens: list[int], prompt: str) -> SampleStream:
        request = self._request
        options = OutputOptions(
            stops=[request.stop] if isinstance(request.stop, str) else request.stop or [],
            top_logprobs=request.logprobs,
            echo=bool(request.echo),
            empty=request.max_tokens == 0,
            format_logprobs=self._format.format_logprobs,
        )
        return SampleStream(self._service.loaded_model.tokenizer, prompt, prompt_tokens, options)

    def _header(self, kind: str) -> dict[str, Any]:
        service = self._service
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": service.name,
            "system_fingerprint": f"step_{service.loaded_model.step}",
        }

    def _usage(self) -> dict[str, int]:
        is_empty = self._request.max_tokens == 0
        completion_tokens = 0 if is_empty else sum(len(sample.streamer.tokens) for sample in self._samples)
        return {
            "prompt_tokens": self._n_prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._n_prompt_tokens + completion_tokens,
        }


@contextlib.asynccontextmanager
async def start_completion(
    service: Service, request: CompletionRequest, api_format: ApiFormat = ApiFormat()
) -> AsyncGenerator[CompletionTask, None]:
    """Start a completion, which is closed at the end of the context. Raises ApiError for an invalid request."""
    check_model(service, request.model)
    texts = list_prompts(request)
    service.engine_thread.check_capacity(len(texts) * max(request.best_of or 0, request.n or 1))
    # In threads, because both calls can be slow, and the event loop serves other requests.
    prompts = await asyncio.to_thread(_encode, service, request, texts)
    grammar = await asyncio.to_thread(_compile_grammar, service.grammar_compiler, request)
    completion = CompletionTask(service, request, prompts, grammar, api_format)
    try:
        yield completion
    finally:
        completion.close()


def check_model(service: Service, name: str | None) -> None:
    """Raise ApiError 404 if `name` is given and is not the served model."""
    if name is not None and name != service.name:
        raise unknown_model_error(service, name)


def unknown_model_error(service: Service, name: str) -> ApiError:
    """Return the error for a model that is not served."""
    message = f"model {name[:MAX_QUOTED]!r} is not served; the served model is {service.name}"
    return ApiError(404, message, param="model", code="model_not_found")


def list_prompts(request: CompletionRequest) -> list[str | list[int]]:
    """Return the list of prompts of a request, whose field `prompt` has one of four forms."""
    prompt: Any = request.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def make_options(request: CompletionRequest, defaults: ModelDefaults) -> SampleConfig:
    """Return the sampling options: of the request, else of --set sample.* or the model's files, else OpenAI's defaults."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    return SampleConfig(**{"temperature": 1.0, **defaults.request_defaults, **given, "max_tokens": 1})


def error_json(error: ApiError) -> dict[str, Any]:
    """Return the body of an error response in OpenAI's format."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def check_length(service: Service, prompt: str | list[int], field: str) -> None:
    """Raise ApiError 400 for a prompt that exceeds seq_len with any tokenization; `field` is the request's field for it."""
    seq_len = service.loaded_model.config.model.seq_len
    # A text with more characters than seq_len tokens have bytes is too long; encoding it first would be slow.
    min_tokens = len(prompt) if isinstance(prompt, list) else -(-len(prompt) // service.max_token_bytes)
    if min_tokens > seq_len:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} {'tokens' if isinstance(prompt, list) else 'characters'}, more than the "
            f"model's context (seq_len={seq_len} tokens, including the output); shorten it",
            param=field,
            code="context_length_exceeded",
        )


def _encode(service: Service, request: CompletionRequest, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    loaded, encoded = service.loaded_model, []
    sample = loaded.config.sample
    encode_options = {
        name: getattr(sample, name) if getattr(request, name) is None else getattr(request, name)
        for name in ("add_special_tokens", "parse_special")
    }
    for prompt in prompts:
        check_length(service, prompt, "prompt")
        try:
            encoded.append(prompt if isinstance(prompt, list) else loaded.defaults.encode(prompt, **encode_options))
        except TokenizerError as error:
            raise ApiError(400, str(error)[:400], param="prompt") from None
    return encoded


def _prompt_text(service: Service, prompt: str | list[int], tokens: list[int]) -> str:
    return prompt if isinstance(prompt, str) else service.loaded_model.tokenizer.decode(tokens)


def _compile_grammar(compiler: GrammarCompiler, request: CompletionRequest) -> GrammarMatcher | None:
    response_format = request.response_format
    try:
        if request.guided_regex is not None:
            return compiler.from_regex(request.guided_regex)
        if response_format is not None and response_format.type != "text":
            return compiler.from_schema(response_format.json_schema.schema_ if response_format.json_schema else None)
    except PromptError as error:
        param = "guided_regex" if request.guided_regex else "response_format"
        raise ApiError(400, str(error)[:400], param=param) from None
    return None


def _server_sent_event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
