# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Guesses of the tokens to come, cheap to make and checked several at a time (Leviathan et al. 2023, arXiv 2211.17192).

The engine draws each place's token with that place's own key, from the model's own distribution, and keeps it; a guess
only decides whether the places behind it need not be computed again. So tokens are those drawn without guesses, not
merely equally distributed. A small model guesses with the same keys as the large one, so that where their distributions
agree they mostly draw the same token, at any temperature.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import MeshLayout
from mesh_transformer.model.params import Params
from mesh_transformer.sample.engine.device_state import DecodeState
from mesh_transformer.sample.engine.prefill import SHORTEST_CACHE, SHORTEST_PIECE, bucket
from mesh_transformer.sample.engine.programs import EnginePrograms
from mesh_transformer.sample.engine.requests import Request


@runtime_checkable
class Drafter(Protocol):
    """Where guesses come from."""

    def propose(self, rows: Sequence[Request | None], state: DecodeState) -> np.ndarray | None:
        """int32 [B, N] for the seats' rows (anything for empty seats), or None: not this time."""
        ...


class PromptLookupDrafter:
    """What followed the last time that a row had its last `n` tokens (prompt lookup decoding): for texts that repeat themselves."""

    def __init__(self, n: int = 3, guesses: int = 4):
        """Sequences of `n` tokens are looked up, shorter ones where there is none."""
        if n < 1 or guesses < 1:
            raise ConfigError(f"n={n}, guesses={guesses}: both must be at least 1")
        self._n, self._guesses = n, guesses

    def propose(self, rows: Sequence[Request | None], state: DecodeState) -> np.ndarray | None:
        """See Proposer; None if no row repeats anything."""
        proposed, found = np.zeros((len(rows), self._guesses), np.int32), False
        for i, row in enumerate(rows):
            guess = self._look_up(np.concatenate([row.prompt, np.asarray(row.tokens, np.int32)])) if row else None
            if guess is not None:
                proposed[i, : len(guess)], found = guess, True
        return proposed if found else None

    def _look_up(self, tokens: np.ndarray) -> np.ndarray | None:
        for n in range(min(self._n, len(tokens) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], n)
            places = np.flatnonzero((windows == tokens[-n:]).all(axis=1))
            if places.size:
                return tokens[places[-1] + n :][: self._guesses]
        return None


class DraftModelDrafter:
    """A small model with the same vocabulary draws the guesses."""

    def __init__(self, config: ModelConfig, params: Params, *, guesses: int = 4, layout: MeshLayout | None = None):
        """`params` of the small model, as for an Engine."""
        self._programs, self._guesses = EnginePrograms(config, params, layout), guesses
        self.config = config
        self._caches: Any = None
        self._rows: list[Request | None] = []  # whose tokens are in which row of the caches
        self._seen = np.zeros(0, np.int32)  # and how many

    def propose(self, rows: Sequence[Request | None], state: DecodeState) -> np.ndarray | None:
        """See Proposer; None where a row is longer than the small model reads."""
        lengths = np.array([row.length if row else 1 for row in rows], np.int32)
        longest = int(lengths.max()) + self._guesses
        if longest > self.config.seq_len:
            return None
        if state.counts.shape[1] != self.config.n_vocab:
            raise ConfigError(
                f"the small model's n_vocab={self.config.n_vocab} is not the large one's {state.counts.shape[1]}"
            )
        cache_len = bucket(longest, SHORTEST_CACHE, self.config.seq_len)
        if self._caches is None or len(self._rows) != len(rows) or _cache_len(self._caches) < cache_len:
            self._caches = self._programs.make_caches(len(rows), cache_len)
            self._rows = list[Request | None]([None] * len(rows))
            self._seen = np.zeros(len(rows), np.int32)
        for i, row in enumerate(rows):
            if row is not self._rows[i]:
                self._rows[i], self._seen[i] = row, 0
        self._seen = np.where([row is not None for row in rows], self._seen, lengths)
        left = lengths - self._seen
        tokens = np.zeros((len(rows), bucket(int(left.max()), SHORTEST_PIECE, self.config.seq_len)), np.int32)
        for i, row in enumerate(rows):
            if row:
                tokens[i, : left[i]] = np.concatenate([row.prompt, np.asarray(row.tokens, np.int32)])[self._seen[i] :]
        logits = jnp.zeros((len(rows), self.config.n_vocab), jnp.float32)
        caches, logits = self._programs.read(self._caches, logits, tokens, self._seen, lengths - 1)
        self._caches, proposed = self._programs.propose(
            caches, logits, lengths - 1, state.counts, state.asked, self._guesses
        )
        self._seen = lengths
        return np.asarray(proposed)


def _cache_len(caches: Any) -> int:
    return caches[0].k[0].shape[2]
