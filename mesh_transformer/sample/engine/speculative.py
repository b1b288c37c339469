# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: cheap draft tokens, verified several at a time (Leviathan et al. 2023, arXiv 2211.17192).

The engine samples the token of every position from the distribution of the model, with the random key of that position. If a
draft token equals the sampled token, the same forward pass also yields the logits of the next position. The tokens are
therefore identical to those of decoding without drafts, not only samples of the same distribution. A draft model uses the
same random keys as the model: where their distributions are similar, both mostly sample the same token, at any temperature.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import MeshLayout
from mesh_transformer.model.params import Params
from mesh_transformer.sample.engine.buckets import Buckets
from mesh_transformer.sample.engine.device_state import DecodeState
from mesh_transformer.sample.engine.programs import EnginePrograms, PromptChunk
from mesh_transformer.sample.engine.requests import Request


class Draft(NamedTuple):
    """Draft tokens of every slot."""

    tokens: np.ndarray  # int32 [B, N]; arbitrary for empty slots and past `lengths`
    lengths: np.ndarray  # int32 [B], number of draft tokens of each slot


@runtime_checkable
class Drafter(Protocol):
    """Source of draft tokens."""

    def draft(self, slots: Sequence[Request | None], state: DecodeState) -> Draft | None:
        """Return draft tokens for the requests in `slots`, or None to decode without a draft."""
        ...


class PromptLookupDrafter:
    """Prompt lookup decoding: draft the tokens that followed the last earlier occurrence of the sequence's last n-gram."""

    def __init__(self, max_ngram: int = 3, num_draft_tokens: int = 4):
        """Look up n-grams of `max_ngram` tokens, and shorter n-grams if there is no match."""
        if max_ngram < 1 or num_draft_tokens < 1:
            raise ConfigError(f"max_ngram={max_ngram}, num_draft_tokens={num_draft_tokens}: both must be at least 1")
        self._max_ngram = max_ngram
        self._num_draft_tokens = num_draft_tokens

    def draft(self, slots: Sequence[Request | None], state: DecodeState) -> Draft | None:
        """Return draft tokens, or None if no sequence repeats an n-gram."""
        tokens = np.zeros((len(slots), self._num_draft_tokens), np.int32)
        lengths = np.zeros(len(slots), np.int32)
        for i, request in enumerate(slots):
            if request:
                draft = self._look_up(request.all_tokens)
                tokens[i, : len(draft)] = draft
                lengths[i] = len(draft)
        return Draft(tokens, lengths) if lengths.any() else None

    def _look_up(self, tokens: np.ndarray) -> np.ndarray:
        for n in range(min(self._max_ngram, len(tokens) - 1), 0, -1):
            ngrams = np.lib.stride_tricks.sliding_window_view(tokens[:-1], n)
            matches = np.flatnonzero((ngrams == tokens[-n:]).all(axis=1))
            if matches.size:
                return tokens[matches[-1] + n :][: self._num_draft_tokens]
        return tokens[:0]


class DraftModelDrafter:
    """Drafter that samples draft tokens from a small model with the same vocabulary."""

    def __init__(
        self, config: ModelConfig, params: Params, *, num_draft_tokens: int = 4, layout: MeshLayout | None = None
    ):
        """`config` and `params` belong to the draft model, whose programs are compiled when they are first used."""
        self.config = config
        self._programs = EnginePrograms(config, params, layout)
        self._buckets = Buckets(config.seq_len)
        self._num_draft_tokens = num_draft_tokens
        self._caches: Any = None
        self._slots: list[Request | None] = []  # requests of the slots of the caches
        self._n_cached = np.zeros(0, np.int32)  # number of cached tokens of each slot

    def draft(self, slots: Sequence[Request | None], state: DecodeState) -> Draft | None:
        """Return draft tokens, or None if a sequence with its draft exceeds the draft model's seq_len.

        Raises ConfigError if the models have different vocabulary sizes.
        """
        lengths = np.array([request.length if request else 1 for request in slots], np.int32)
        longest = int(lengths.max()) + self._num_draft_tokens
        if longest > self.config.seq_len:
            return None
        check_vocabulary(self.config, state.counts.shape[1])
        self._fit_caches(slots, self._buckets.cache_len(longest))
        self._n_cached = np.where([request is not None for request in slots], self._n_cached, lengths)
        n_new = lengths - self._n_cached
        tokens = np.zeros((len(slots), self._buckets.prefill_len(int(n_new.max()))), np.int32)
        for i, request in enumerate(slots):
            if request:
                tokens[i, : n_new[i]] = request.all_tokens[self._n_cached[i] :]
        logits = jnp.zeros((len(slots), self.config.n_vocab), jnp.float32)
        chunk = PromptChunk(tokens, self._n_cached, lengths - 1)
        caches, logits, _ = self._programs.prefill(self._caches, logits, chunk, False)
        self._caches, draft_tokens = self._programs.draft(
            caches, logits, lengths - 1, state.counts, state.params, self._num_draft_tokens
        )
        self._n_cached = lengths
        draft_lengths = np.array([self._num_draft_tokens if request else 0 for request in slots], np.int32)
        return Draft(np.asarray(draft_tokens), draft_lengths)

    def _fit_caches(self, slots: Sequence[Request | None], cache_len: int) -> None:
        """Resize the caches for `slots` and `cache_len`, and invalidate the entries of other requests."""
        if self._caches is None or len(self._slots) != len(slots) or _cache_len(self._caches) < cache_len:
            self._caches = self._programs.make_caches(len(slots), cache_len)
            self._slots = [None] * len(slots)
            self._n_cached = np.zeros(len(slots), np.int32)
        for i, request in enumerate(slots):
            if request is not self._slots[i]:
                self._slots[i] = request
                self._n_cached[i] = 0


def check_vocabulary(draft: ModelConfig, n_vocab: int) -> None:
    """Raise ConfigError unless the vocabulary of the draft model has `n_vocab` tokens."""
    if draft.n_vocab != n_vocab:
        raise ConfigError(
            f"the draft model has n_vocab={draft.n_vocab}, but the model has n_vocab={n_vocab}; "
            "use a draft model that was trained with the same tokenizer and vocabulary size"
        )


def _cache_len(caches: Any) -> int:
    return caches[0].k[0].shape[2]
