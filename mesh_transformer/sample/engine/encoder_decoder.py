# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Engine of encoder-decoder models: the encoder runs once on the prompt, and the decoder generates the output.

Waiting requests run in batches, one after the other; a batch ends when its last request ends. The encoder's keys and values
stay in the cache, so a token costs one pass through the decoder. Experts process every token, in the encoder too, so an
output depends neither on padding nor on other requests in the batch.
"""

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Int

from mesh_transformer.config import ModelConfig
from mesh_transformer.mesh import MeshLayout
from mesh_transformer.sample.engine.buckets import Buckets
from mesh_transformer.sample.engine.encoder_decoder_programs import EncoderDecoderPrograms, EncoderDecoderState
from mesh_transformer.sample.engine.engine import Engine, EngineOptions
from mesh_transformer.sample.engine.programs import DECODE_CHUNK
from mesh_transformer.sample.engine.requests import Event, PromptError, Request, make_keys
from mesh_transformer.sample.sampling import stack_options


@dataclasses.dataclass
class Batch:
    """Requests that are processed together."""

    requests: list[Request]
    state: EncoderDecoderState
    encoder_tokens: Int[Array, "B S"] | None  # None after the encoder has run
    ended: set[int] = dataclasses.field(default_factory=set)  # ids of the requests that have ended

    @property
    def unfinished(self) -> list[Request]:
        return [request for request in self.requests if not (request.cancelled or request.id in self.ended)]


class EncoderDecoderEngine(Engine):
    """Static batching for an encoder-decoder model, without logit bias, scores, constraints or speculative decoding."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Mapping[str, Any]],
        options: EngineOptions | None = None,
        *,
        start_token: int,
        end_token: int | None,
        layout: MeshLayout | None = None,
    ):
        """Put `params` on the devices, as DecoderOnlyEngine does.

        Args:
          config: The model.
          params: The weights, on any devices.
          options: Capacity and data types. Prefill chunks and prefix cache are not used.
          start_token: First token of the decoder's input.
          end_token: Appended to the encoder's tokens (data/span_corruption.py). None: prompts already end with it.
          layout: Sharding of weights and caches. None: everything is on the default device.
        """
        options = options or EngineOptions()
        self.config = config
        self.slots = options.slots
        self.programs = EncoderDecoderPrograms(
            config, params, layout, weight_dtype=options.weight_dtype, kv_cache_dtype=options.kv_cache_dtype
        )
        self._start_token = start_token
        self._end_tokens = [] if end_token is None else [end_token]
        self._buckets = Buckets(config.seq_len, layout.batch_shards if layout else 1)
        self._waiting: deque[Request] = deque()
        self._batch: Batch | None = None

    @property
    def compilations(self) -> dict[str, int]:
        return dict(self.programs.compilations)

    @property
    def active(self) -> list[Request]:
        return [] if self._batch is None else self._batch.unfinished

    @property
    def queued(self) -> list[Request]:
        return list(self._waiting)

    @property
    def is_speculative(self) -> bool:
        return False

    def submit(self, request: Request) -> Request:
        """Queue a request. Raises PromptError for parameters that only DecoderOnlyEngine supports."""
        params = request.params
        unsupported = ("logit_bias", "top_logprobs", "score_prompt", "constraint")
        if given := [name for name in unsupported if getattr(params, name)]:
            raise PromptError(f"encoder-decoder models do not support {', '.join(given)}; remove it from the request")
        self._waiting.append(request)
        return request

    def step(self, steps: int = DECODE_CHUNK) -> list[Event]:
        """Generate up to `steps` tokens for every request of the current batch; start the next batch if none is active."""
        events: list[Event] = []
        if not self.active:
            self._batch = self._start_batch()
        for _ in range(steps):
            if self._batch is None or not self.active:
                break
            events += self._advance(self._batch)
        return events

    def _start_batch(self) -> Batch | None:
        waiting = [request for request in self._waiting if not request.cancelled]
        requests = waiting[: self.slots]
        self._waiting = deque(waiting[self.slots :])
        if not requests:
            return None
        prompts = [[*request.prompt.tolist(), *self._end_tokens][: self.config.seq_len] for request in requests]
        batch_size = self._buckets.batch_size(len(requests))
        tokens = np.zeros((batch_size, self._buckets.prefill_len(max(map(len, prompts)))), np.int32)
        segment_ids = np.zeros_like(tokens)
        for i in range(batch_size):  # padding repeats the last request
            prompt = prompts[min(i, len(prompts) - 1)]
            tokens[i, : len(prompt)] = prompt
            segment_ids[i, : len(prompt)] = 1
        padded = requests + requests[-1:] * (batch_size - len(requests))
        cache_len = self._buckets.cache_len(max(request.max_tokens for request in requests))
        options = stack_options([request.params.options for request in padded])
        state = self.programs.make_state(
            self.programs.shard_batch(segment_ids), options, make_keys(padded), self._start_token, cache_len
        )
        return Batch(requests, state, self.programs.shard_batch(tokens))

    def _advance(self, batch: Batch) -> list[Event]:
        """Generate one token for every request."""
        if batch.encoder_tokens is None:
            batch.state, sampled = self.programs.decode(batch.state)
        else:
            batch.state, sampled = self.programs.encode(batch.state, batch.encoder_tokens)
            batch.encoder_tokens = None
        tokens = np.asarray(sampled.token).tolist()
        logprobs = np.asarray(sampled.logprob).tolist()
        events = []
        for request, token, logprob in zip(batch.requests, tokens, logprobs, strict=False):
            if request.cancelled or request.id in batch.ended:
                continue
            request.tokens.append(token)
            if token in request.params.stop_tokens:
                finish = "stop"
            else:
                finish = "length" if len(request.tokens) >= request.max_tokens else None
            if finish:
                batch.ended.add(request.id)
            events.append(Event(request.id, token, logprob, finish))
        return events
