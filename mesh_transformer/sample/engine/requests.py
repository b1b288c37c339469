# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Requests to the engine, one per sample of a prompt, and the events that it returns, one per generated token."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mesh_transformer.config import ModelConfig, SampleConfig
from mesh_transformer.sample.engine.device_state import BatchParams
from mesh_transformer.sample.sampling import stack_options

MAX_STOP_TOKENS = 16  # per request
MAX_TOP_LOGPROBS = 20  # most probable tokens reported for each token

_request_ids = itertools.count()


class PromptError(ValueError):
    """Invalid prompt or request parameter; the message states the limit."""


@runtime_checkable
class Constraint(Protocol):
    """Restricts the next token of one request, depending on its tokens so far (structured output)."""

    def allowed(self) -> np.ndarray:
        """Return a bool mask [V] of the tokens allowed next, with at least one allowed token."""
        ...

    def accept(self, token: int) -> None:
        """Record that the request generated `token`."""
        ...


class Score(NamedTuple):
    """Log-probability of a prompt token given the tokens before it."""

    logprob: float
    top: list[tuple[int, float]]  # most probable tokens at the same position, with their log-probabilities


class Event(NamedTuple):
    """One generated token."""

    request: int  # Request.id; in the events of a Generation, the index of the request
    token: int
    logprob: float  # natural log-probability in the unmodified distribution of the model
    finish: Literal["stop", "length"] | None  # None except for the request's last token
    top: list[tuple[int, float]] | None = None  # most probable tokens and their log-probabilities, if requested
    prompt_scores: list[Score] | None = None  # first event only, if requested: all prompt tokens but the first


@dataclasses.dataclass(frozen=True)
class RequestParams:
    """Parameters of a request, without its prompt."""

    options: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    _: dataclasses.KW_ONLY
    max_tokens: int | None = None  # maximum number of generated tokens; None: options.max_tokens
    stop_tokens: Sequence[int] = ()  # generation ends after any of these tokens
    seed: int = 0
    sample: int = 0  # index among the samples of the prompt; folded into the random key so that samples differ
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # token -> value added to its logit
    top_logprobs: int = 0  # number of most probable tokens to report for each generated token
    score_prompt: bool = False  # also report log-probabilities of the prompt's tokens
    constraint: Constraint | None = None


@dataclasses.dataclass
class SpeculativeStats:
    """Token counts of speculative decoding."""

    draft_tokens: int = 0  # proposed by the drafter and checked by the model
    accepted_tokens: int = 0  # equal to the tokens that the model sampled


@dataclasses.dataclass(eq=False)
class Request:
    """One sample of one prompt, from submission to its last token."""

    prompt: np.ndarray  # int32 [T]
    params: RequestParams
    id: int = dataclasses.field(default_factory=lambda: next(_request_ids))
    tokens: list[int] = dataclasses.field(default_factory=list)  # generated so far
    cancelled: bool = False
    speculative: SpeculativeStats = dataclasses.field(default_factory=SpeculativeStats)

    @property
    def max_tokens(self) -> int:
        return self.params.options.max_tokens if self.params.max_tokens is None else self.params.max_tokens

    @property
    def length(self) -> int:
        """Prompt tokens plus generated tokens."""
        return len(self.prompt) + len(self.tokens)

    @property
    def all_tokens(self) -> np.ndarray:
        """int32 [length]: prompt and generated tokens."""
        return np.concatenate([self.prompt, np.asarray(self.tokens, np.int32)])


def make_request(
    config: ModelConfig, prompt: Sequence[int], params: RequestParams, *, name: str = "the prompt"
) -> Request:
    """Return a valid request. Raises PromptError if the model cannot serve it; messages call the prompt `name`."""
    bad = next((token for token in prompt if not -(2**31) <= token < 2**31), None)
    if bad is not None:
        raise PromptError(_describe_outside_token(name, bad, config))
    params = dataclasses.replace(params, stop_tokens=list(dict.fromkeys(params.stop_tokens)))
    request = Request(np.asarray(prompt, np.int32), params)
    _check(request, config, name)
    return request


def _describe_outside_token(name: str, token: int, config: ModelConfig) -> str:
    return f"{name} has the token {token}, but the model's vocabulary is 0..{config.n_vocab - 1}; use the model's tokenizer"


def _check(request: Request, config: ModelConfig, name: str) -> None:
    params, seq_len = request.params, config.seq_len
    length, max_tokens = len(request.prompt), request.max_tokens
    limit = config.max_new_tokens(length)
    if not length:
        raise PromptError(f"{name} has no tokens; it needs at least 1, for example the end-of-text token")
    named = {name: request.prompt.tolist(), "logit_bias": params.logit_bias, "stop_tokens": params.stop_tokens}
    for field, tokens in named.items():
        if outside := [token for token in tokens if not 0 <= token < config.n_vocab]:
            raise PromptError(_describe_outside_token(field, outside[0], config))
    if max_tokens < 1:
        raise PromptError(f"max_tokens={max_tokens}: must be at least 1")
    if length >= seq_len:
        raise PromptError(
            f"{name} has {length} tokens, but prompt and output together have at most seq_len={seq_len}; shorten it"
        )
    if max_tokens > limit:
        raise PromptError(
            f"{name} has {length} tokens; with max_tokens={max_tokens} it exceeds the model's seq_len={seq_len}; "
            f"use at most max_tokens={limit}, or shorten the prompt"
        )
    if not 0 <= params.top_logprobs <= MAX_TOP_LOGPROBS:
        raise PromptError(f"top_logprobs={params.top_logprobs}: must be between 0 and {MAX_TOP_LOGPROBS}")
    if len(params.stop_tokens) > MAX_STOP_TOKENS:
        raise PromptError(f"got {len(params.stop_tokens)} stop_tokens; a request can have at most {MAX_STOP_TOKENS}")


def stack_requests(requests: Sequence[Request], n_vocab: int) -> BatchParams:
    """Return the parameters of `requests` as arrays."""
    prompt = np.zeros((len(requests), n_vocab), bool)
    bias = np.zeros((len(requests), n_vocab), np.float32)
    stop_tokens = np.full((len(requests), MAX_STOP_TOKENS), -1, np.int32)
    for i, request in enumerate(requests):
        params = request.params
        prompt[i, request.prompt] = True
        bias[i, list(params.logit_bias)] = list(params.logit_bias.values())
        stop_tokens[i, : len(params.stop_tokens)] = params.stop_tokens
    return BatchParams(
        keys=make_keys(requests),
        options=stack_options([request.params.options for request in requests]),
        prompt=jnp.asarray(prompt),
        bias=jnp.asarray(bias),
        last_position=jnp.asarray([len(r.prompt) + r.max_tokens - 1 for r in requests], jnp.int32),
        stop_tokens=jnp.asarray(stop_tokens),
    )


def blank_params(n_vocab: int) -> BatchParams:
    """Return the parameters of a default request, as an example of their shapes and dtypes."""
    return stack_requests([Request(np.zeros(1, np.int32), RequestParams(max_tokens=1), id=-1)], n_vocab)


def stack_allowed(slots: Sequence[Request | None], n_vocab: int) -> Bool[Array, "B V"] | None:
    """Return a mask of the tokens that each slot may sample, or None if no request has a constraint."""
    if not any(request and request.params.constraint for request in slots):
        return None
    allowed = np.ones((len(slots), n_vocab), bool)
    for i, request in enumerate(slots):
        if request and request.params.constraint:
            allowed[i] = request.params.constraint.allowed()
            assert allowed[i].any(), "a constraint must allow at least one token"
    return jnp.asarray(allowed)


def make_keys(requests: Sequence[Request]) -> Any:
    """Return random keys [B]: fold_in(key(seed), sample) of each request."""
    return _make_keys(np.array([(r.params.seed, r.params.sample) for r in requests], np.uint32))


@jax.jit
def _make_keys(pairs: Any) -> Any:
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.key(pair[0]), pair[1]))(pairs)
