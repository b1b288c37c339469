# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Interface of engines, which generate tokens for many requests at once.

Implementations are DecoderOnlyEngine (decoder_only.py) and EncoderDecoderEngine (encoder_decoder.py). Both sample the
token at position p of sample i of a prompt with the random key fold_in(fold_in(key(seed), i), p), so a token does not depend on
the other requests in the batch, on padding, or on how many tokens are decoded at a time.
"""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from mesh_transformer.config import ModelConfig, SampleConfig
from mesh_transformer.sample.engine.generation import Generation
from mesh_transformer.sample.engine.programs import DECODE_CHUNK
from mesh_transformer.sample.engine.requests import Event, PromptError, Request, RequestParams, make_request


class Completion(NamedTuple):
    """Tokens generated for one sample, including a stop token that ended the sample."""

    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Capacity and data types of an engine."""

    slots: int = 32  # requests decoded at once
    prefill_chunk: int = 512  # longer prompts are prefilled in chunks of this many tokens
    prefix_cache_bytes: int = 1 << 28  # of KV caches kept for later prompts that share a prefix; 0: no prefix cache
    weight_dtype: str = "saved"  # see ServeConfig.weight_dtype
    kv_cache_dtype: str = "model"  # see ServeConfig.kv_cache_dtype


@runtime_checkable
class Engine(Protocol):
    """A model on its devices, with a scheduler that generates tokens for requests. Not thread-safe."""

    config: ModelConfig
    slots: int  # requests decoded at once

    @property
    @abstractmethod
    def compilations(self) -> dict[str, int]:
        """Number of compilations of every program so far."""
        ...

    @property
    @abstractmethod
    def active(self) -> list[Request]:
        """Requests in decode slots."""
        ...

    @property
    @abstractmethod
    def queued(self) -> list[Request]:
        """Requests without a token yet: waiting, or in prefill."""
        ...

    @property
    @abstractmethod
    def is_speculative(self) -> bool:
        """True if draft tokens are verified instead of decoding one token at a time."""
        ...

    @abstractmethod
    def submit(self, request: Request) -> Request:
        """Queue a request; `step` returns its events."""
        ...

    @abstractmethod
    def step(self, steps: int = DECODE_CHUNK) -> list[Event]:
        """Run one scheduler iteration, with at most about `steps` new tokens per request, and return its events."""
        ...

    @property
    def idle(self) -> bool:
        """True if there are no requests."""
        return not (self.queued or self.active)

    def make_request(self, prompt: Sequence[int], params: RequestParams, *, name: str = "the prompt") -> Request:
        """Return a request to submit. Raises PromptError if the model cannot serve it; messages call the prompt `name`."""
        return make_request(self.config, prompt, params, name=name)

    def cancel(self, request: Request) -> None:
        """Stop a request: later steps return none of its events, and its slot becomes free."""
        request.cancelled = True

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        options: SampleConfig | Sequence[SampleConfig],
        *,
        max_tokens: int | None = None,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        n: int = 1,
    ) -> Generation:
        """Submit `n` samples of every prompt; sample i of prompt j has index j n + i.

        Args:
          prompts: Token ids.
          options: Sampling options of all prompts, or a list with the options of each prompt.
          max_tokens: Maximum number of generated tokens per sample; None: `max_tokens` of the options.
          stop_tokens: Token ids; a sample ends after any of them.
          seed: Seed of the samples.
          n: Samples per prompt.

        Raises:
          PromptError: a prompt is empty, has ids outside the vocabulary, or with max_tokens exceeds seq_len.
        """
        per_prompt = [options] * len(prompts) if isinstance(options, SampleConfig) else list(options)
        if len(per_prompt) != len(prompts) or not prompts or n < 1:
            raise PromptError(
                f"got {len(prompts)} prompts, {len(per_prompt)} sampling options and n={n}; at least 1 prompt, as many options as "
                "prompts, and n of at least 1 are required"
            )
        requests = []
        for number, (prompt, option) in enumerate(zip(prompts, per_prompt, strict=True), start=1):
            name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            for sample in range(n):
                params = RequestParams(option, max_tokens=max_tokens, stop_tokens=stop_tokens, seed=seed, sample=sample)
                requests.append(self.make_request(prompt, params, name=name))
        return Generation(self, [self.submit(request) for request in requests])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SampleConfig | Sequence[SampleConfig],
        *,
        max_tokens: int | None = None,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        n: int = 1,
    ) -> list[list[Completion]]:
        """Return `n` completions of every prompt. Arguments and errors are those of `start`."""
        generation = self.start(prompts, options, max_tokens=max_tokens, stop_tokens=stop_tokens, seed=seed, n=n)
        by_request: list[list[Event]] = [[] for _ in range(generation.n_requests)]
        for event in generation.events(interval=math.inf):
            by_request[event.request].append(event)
        completions = [
            Completion([e.token for e in events], [e.logprob for e in events], events[-1].finish or "length")
            for events in by_request
        ]
        return [completions[first : first + n] for first in range(0, len(completions), n)]
