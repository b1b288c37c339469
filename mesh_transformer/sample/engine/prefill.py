# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Chunked prefill: computes KV caches and next-token logits of prompts in chunks, so that decoding is not blocked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.sample.engine.buckets import Buckets
from mesh_transformer.sample.engine.prefix_cache import PrefixCache
from mesh_transformer.sample.engine.programs import EnginePrograms, PromptChunk
from mesh_transformer.sample.engine.requests import Request, Score

MAX_SCORED_CHUNK = 128  # maximum number of tokens per prompt whose logits are in memory at once


class PrefillBatch:
    """The distinct prompts of a group of requests, prefilled together from the ends of their cached prefixes."""

    def __init__(
        self,
        programs: EnginePrograms,
        prefix_cache: PrefixCache,
        buckets: Buckets,
        requests: list[Request],
        max_chunk: int,
        reached_len: int | None = None,
    ):
        """Chunks have at most `max_chunk` tokens per prompt. No chunk is prefilled yet.

        `reached_len` is the number of tokens that the sequences reach (see `make_rotation`); None: the prompt's length.
        """
        self._reached_len = reached_len
        self.requests = requests
        self._programs = programs
        self._prefix_cache = prefix_cache
        self._buckets = buckets
        self._with_scores = requests[0].params.score_prompt
        prompts: dict[bytes, np.ndarray] = {}
        for request in requests:
            prompts.setdefault(request.prompt.tobytes(), request.prompt)
        order = {key: i for i, key in enumerate(prompts)}
        self.prompt_index = {request.id: order[request.prompt.tobytes()] for request in requests}
        self._prompts = list(prompts.values())
        batch_size = buckets.batch_size(len(self._prompts))
        self._padded_prompts = self._prompts + [self._prompts[0]] * (batch_size - len(self._prompts))
        self._lengths = np.array([len(prompt) for prompt in self._padded_prompts], np.int32)
        self._done = np.zeros(batch_size, np.int32)  # prefilled tokens of each prompt
        self._max_chunk = buckets.prefill_len(max_chunk)
        if self._with_scores:
            self._max_chunk = min(self._max_chunk, MAX_SCORED_CHUNK)
        self._scores: list[list[Score]] = [[] for _ in self._prompts]
        self.caches: Any = programs.make_caches(batch_size, buckets.cache_len(int(self._lengths.max()) + 1))
        self.logits = jnp.zeros((batch_size, programs.config.n_vocab), jnp.float32)
        if not self._with_scores:  # scores need the logits of every token
            self._reuse_prefixes()

    @property
    def remaining(self) -> int:
        """Largest number of tokens of a prompt that are not prefilled yet."""
        return int(max(self._lengths - self._done))

    def prefill_chunk(self) -> None:
        """Prefill one chunk of every prompt; after the last chunk, add the prompts to the prefix cache."""
        chunk_len = self._buckets.prefill_len(min(self.remaining, self._max_chunk), self._max_chunk)
        tokens = np.zeros((len(self._padded_prompts), chunk_len), np.int32)
        targets = np.zeros_like(tokens)
        for i, prompt in enumerate(self._padded_prompts):
            chunk = prompt[self._done[i] :][:chunk_len]
            following = prompt[self._done[i] + 1 :][:chunk_len]
            tokens[i, : len(chunk)] = chunk
            targets[i, : len(following)] = following
        reached_len = None if self._reached_len is None else np.full_like(self._lengths, self._reached_len)
        scored = targets if self._with_scores else None
        inputs = PromptChunk(tokens, self._done, self._lengths - 1, scored, reached_len)
        self.caches, self.logits, scores = self._programs.prefill(self.caches, self.logits, inputs, self._with_scores)
        if scores is not None:
            self._add_scores(*jax.device_get(scores))
        self._done = np.minimum(self._done + chunk_len, self._lengths)
        if not self.remaining:
            self._cache_prefixes()

    def scores(self, request: Request) -> list[Score]:
        """Return the scores of all prompt tokens of a request but the first."""
        scores = self._scores[self.prompt_index[request.id]]
        return [Score(score.logprob, score.top[: request.params.top_logprobs]) for score in scores]

    def _add_scores(self, logprobs: np.ndarray, best: np.ndarray, ids: np.ndarray) -> None:
        for i, prompt in enumerate(self._prompts):
            for j in range(min(logprobs.shape[1], len(prompt) - 1 - int(self._done[i]))):
                top = list(zip(ids[i, j].tolist(), best[i, j].tolist(), strict=True))
                self._scores[i].append(Score(float(logprobs[i, j]), top))

    def _reuse_prefixes(self) -> None:
        for i, prompt in enumerate(self._prompts):
            if not self._is_reusable(prompt):
                continue
            if prefix := self._prefix_cache.match(prompt):
                self.caches = self._programs.copy_in(self.caches, prefix.caches, np.int32(i))
                self._done[i] = prefix.length

    def _is_reusable(self, prompt: np.ndarray) -> bool:
        """Return whether a prompt can share cached keys with other prompts. With longrope, keys depend on the full length."""
        config = self._programs.config
        return config.padded_len_limit(len(prompt)) == config.padded_len_limit(1) and self._reached_len is None

    def _cache_prefixes(self) -> None:
        for i, prompt in enumerate(self._prompts):
            if self._is_reusable(prompt) and self._prefix_cache.should_insert(prompt):
                self._prefix_cache.insert(prompt, self._programs.copy_out(self.caches, np.int32(i)))
