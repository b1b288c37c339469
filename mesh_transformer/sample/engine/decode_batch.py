# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The decode batch of continuous batching: decode slots, resized to the number and length of the active requests."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.sample.engine.buckets import Buckets
from mesh_transformer.sample.engine.device_state import DecodeState, StepOutput
from mesh_transformer.sample.engine.prefill import PrefillBatch
from mesh_transformer.sample.engine.prefix_cache import PrefixCache
from mesh_transformer.sample.engine.programs import EnginePrograms
from mesh_transformer.sample.engine.requests import (
    MAX_TOP_LOGPROBS,
    Event,
    Request,
    RequestParams,
    SpeculativeStats,
    blank_params,
    stack_allowed,
    stack_requests,
)
from mesh_transformer.sample.engine.speculative import Draft, Drafter

RECOMPUTE_CHUNK = 512  # tokens per prefill chunk when the cached keys of a request are recomputed


class DecodeBatch:
    """A batch of decode slots. Empty slots are decoded too; their output is discarded."""

    def __init__(self, programs: EnginePrograms, buckets: Buckets, drafter: Drafter | None):
        """Start without slots. If `drafter` is given, all its draft tokens of a step are verified in one forward pass."""
        self.drafter = drafter
        self.stats = SpeculativeStats()
        self._programs = programs
        self._buckets = buckets
        self._slots: list[Request | None] = []
        self._state: DecodeState | None = None
        self._recomputed: set[int] = set()  # ids of active requests whose cached keys were recomputed (longrope)

    @property
    def requests(self) -> list[Request]:
        return [request for request in self._slots if request]

    @property
    def state(self) -> DecodeState | None:
        """State on the devices; None before the first request."""
        return self._state

    def admit(self, prefill: PrefillBatch, requests: list[Request]) -> list[Event]:
        """Put requests of a finished prefill into slots and sample their first tokens."""
        self._resize_to_fit(len(requests), max(request.length for request in requests) + 1)
        assert self._state is not None
        slots = [i for i, request in enumerate(self._slots) if request is None][: len(requests)]
        for slot, request in zip(slots, requests, strict=True):
            self._slots[slot] = request
        # Padding repeats the last request, with the index of a slot that does not exist.
        padding = self._buckets.batch_size(len(requests)) - len(requests)
        padded = requests + requests[-1:] * padding
        prompts = np.array([prefill.prompt_index[request.id] for request in padded], np.int32)
        padded_slots = np.array(slots + [len(self._slots)] * padding, np.int32)
        lengths = jnp.asarray([len(request.prompt) for request in padded], jnp.int32)
        n_vocab = self._programs.config.n_vocab
        new, output = self._programs.first_token(
            prefill.logits[prompts],
            stack_requests(padded, n_vocab),
            lengths,
            stack_allowed(padded, n_vocab),
            _n_top(requests),
        )
        # Caches are copied one at a time: a program that copies several would be compiled for every pair of batch sizes.
        caches = self._state.caches
        for prompt, slot in zip(prompts[: len(requests)], slots, strict=True):
            prompt_caches = self._programs.copy_out(prefill.caches, prompt)
            caches = self._programs.copy_in(caches, prompt_caches, np.int32(slot))
        # `insert` donates its state, which must not contain the caches that were donated already.
        without_caches = self._programs.insert(self._state._replace(caches=None), new, padded_slots)
        self._state = without_caches._replace(caches=caches)
        events = self._make_events(jax.device_get(output), requests)
        scores = {request.id: prefill.scores(request) for request in requests if request.params.score_prompt}
        return [
            event._replace(prompt_scores=scores[event.request]) if event.request in scores else event
            for event in events
        ]

    def decode(self, steps: int) -> list[Event]:
        """Generate up to `steps` tokens for every request; with a draft, the accepted draft tokens and one more token."""
        self._slots = [None if request and request.cancelled else request for request in self._slots]
        slots = self._slots
        if not self.requests:
            return []
        assert self._state is not None, "a batch with requests has a state"
        allowed = stack_allowed(slots, self._programs.config.n_vocab)
        # A constraint must be updated with every token before the next token is sampled.
        draft = self.drafter.draft(slots, self._state) if self.drafter and allowed is None else None
        if allowed is not None:
            steps = 1
        elif draft is not None:
            steps = draft.tokens.shape[1] + 1
        valid_steps = self._steps_with_valid_keys()
        if valid_steps is not None and valid_steps < steps:
            draft, steps = None, valid_steps
        longest = max(request.length for request in self.requests)
        self._resize_to_fit(0, min(longest + steps, self._programs.config.seq_len))
        if slots is not self._slots:  # resized: arrays indexed by slot are out of date
            return self.decode(steps)
        empty = np.array([request is None for request in slots])
        if draft is None:
            self._state, output = self._programs.decode(self._state, np.int32(steps), empty, allowed, _n_top(slots))
            return self._make_events(jax.device_get(output), slots)
        self._state, output = self._programs.verify(self._state, draft.tokens, empty, _n_top(slots))
        output = jax.device_get(output)
        self._count_accepted(draft, output, slots)
        return self._make_events(output, slots)

    def _steps_with_valid_keys(self) -> int | None:
        """Return the largest number of tokens that all slots can generate with the keys in the KV cache; None: no limit.

        With longrope, the rotation depends on whether a sequence is longer than the trained length. The keys of requests that
        are about to exceed it are recomputed, as in transformers.
        """
        config = self._programs.config
        limit = config.padded_len_limit(1)
        if limit == config.seq_len:
            return None
        self._recomputed &= {request.id for request in self.requests}
        steps = config.seq_len
        for slot, request in enumerate(self._slots):
            if request is None or len(request.prompt) > limit or request.id in self._recomputed:
                continue
            if request.length > limit:
                self._recompute(slot, request)
            else:
                steps = min(steps, limit - request.length + 1)
        return steps

    def _recompute(self, slot: int, request: Request) -> None:
        """Prefill all tokens of a request except the last again, with the rotation for the length of the full sequence."""
        assert self._state is not None
        tokens = Request(request.all_tokens[:-1], RequestParams())
        prefill = PrefillBatch(self._programs, PrefixCache(0), self._buckets, [tokens], RECOMPUTE_CHUNK, request.length)
        while prefill.remaining:
            prefill.prefill_chunk()
        recomputed = self._programs.copy_out(prefill.caches, np.int32(0))
        caches = self._programs.copy_in(self._state.caches, recomputed, np.int32(slot))
        self._state = self._state._replace(caches=caches)
        self._recomputed.add(request.id)

    def _resize_to_fit(self, n: int, length: int) -> None:
        """Resize the batch to hold `n` more requests and sequences of `length` tokens.

        The number of slots is reduced when it is at least four times the required number.
        """
        n_active = len(self.requests)
        needed = self._buckets.batch_size(n_active + n)
        cache_len = self._buckets.cache_len(length)
        n_slots = len(self._slots)
        if self._state is None or not n_active:
            if self._state is None or (needed, cache_len) != (n_slots, self._cache_len):
                self._state = None  # freed before the next state is allocated
                self._state = self._programs.make_state(blank_params(self._programs.config.n_vocab), needed, cache_len)
                self._slots = [None] * needed
            return
        if needed > n_slots or 4 * needed <= n_slots or cache_len > self._cache_len:
            self._resize(max(needed, n_slots) if 4 * needed > n_slots else needed, max(cache_len, self._cache_len))

    def _resize(self, n_slots: int, cache_len: int) -> None:
        order = [i for i, request in enumerate(self._slots) if request]
        order += [-1] * (n_slots - len(order))
        self._state = self._programs.resize(self._state, np.array(order, np.int32), cache_len)
        self._slots = [self._slots[i] if i >= 0 else None for i in order]

    @property
    def _cache_len(self) -> int:
        assert self._state is not None
        return jax.tree.leaves(self._state.caches)[0].shape[2]

    def _make_events(self, output: StepOutput, slots: Sequence[Request | None]) -> list[Event]:
        """Convert program output to events, ordered by step, and remove finished requests from their slots."""
        valid = output.valid[: len(slots)]
        last = valid.shape[1] - 1 - np.argmax(valid[:, ::-1], axis=1)
        events = []
        for step, i in zip(*np.nonzero(valid.T), strict=True):
            request = slots[i]
            if request is None:
                continue
            params = request.params
            token = int(output.token[i, step])
            request.tokens.append(token)
            if params.constraint:
                params.constraint.accept(token)
            finish: Literal["stop", "length"] | None = None
            if output.finished[i] and step == last[i]:
                finish = "stop" if token in params.stop_tokens else "length"
            top = None
            if params.top_logprobs and output.top is not None:
                best = output.top[0][i, step, : params.top_logprobs]
                ids = output.top[1][i, step, : params.top_logprobs]
                top = list(zip(ids.tolist(), best.tolist(), strict=True))
            events.append(Event(request.id, token, float(output.logprob[i, step]), finish, top))
        ended = {event.request for event in events if event.finish}
        self._slots = [None if request and request.id in ended else request for request in self._slots]
        return events

    def _count_accepted(self, draft: Draft, output: StepOutput, slots: Sequence[Request | None]) -> None:
        n = draft.tokens.shape[1]
        is_draft = np.arange(n)[None] < draft.lengths[:, None]
        accepted = is_draft & np.asarray(output.valid[:, :n]) & (np.asarray(output.token[:, :n]) == draft.tokens)
        for i, request in enumerate(slots):
            if request:
                for stats in (request.speculative, self.stats):
                    stats.draft_tokens += int(is_draft[i].sum())
                    stats.accepted_tokens += int(accepted[i].sum())


def _n_top(slots: Sequence[Request | None]) -> int:
    """Return the number of most probable tokens to report: 0 or the maximum, so that only two programs are compiled."""
    return MAX_TOP_LOGPROBS if any(request and request.params.top_logprobs for request in slots) else 0
