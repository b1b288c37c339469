# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Prompts being read, a piece at a time, so that others are not held up: tokens -> caches and the logits behind them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.sample.engine.prefix_cache import PrefixCache
from mesh_transformer.sample.engine.programs import EnginePrograms
from mesh_transformer.sample.engine.requests import Request, Score

SHORTEST_PIECE = 16  # smallest bucket
SHORTEST_CACHE = 128  # smallest bucket of caches: on a CPU what is empty is read, too
SCORED_PIECE = 128  # most tokens whose logits are all held at once


class PrefillBatch:
    """The prompts of some rows, equal ones once, each behind what is known of it from earlier ones."""

    def __init__(
        self,
        programs: EnginePrograms,
        prefixes: PrefixCache,
        rows: list[Request],
        chunk: int,
        pieces: int,
        cache_len: Callable[[int], int],
    ):
        """Pieces have at most `chunk` tokens; the number of prompts is rounded up to a multiple of `pieces`."""
        self._programs, self._prefixes, self.rows = programs, prefixes, rows
        self._scores_tokens = rows[0].score_prompt
        config = programs.config
        prompts: dict[bytes, np.ndarray] = {}
        for row in rows:
            prompts.setdefault(row.prompt.tobytes(), row.prompt)
        order = {key: i for i, key in enumerate(prompts)}
        self.source = {row.id: order[row.prompt.tobytes()] for row in rows}  # which prompt is whose
        self._prompts = list(prompts.values())
        self._padded = self._prompts + [self._prompts[0]] * (
            count_rows(len(self._prompts), pieces) - len(self._prompts)
        )
        self._lengths = np.array([len(prompt) for prompt in self._padded], np.int32)
        self._first = np.zeros(len(self._padded), np.int32)  # place of the next token of each prompt
        self._chunk = bucket(chunk, SHORTEST_PIECE, config.seq_len)
        if self._scores_tokens:
            self._chunk = min(self._chunk, SCORED_PIECE)
        self._scores: list[list[Score]] = [[] for _ in self._prompts]
        self.caches: Any = programs.make_caches(len(self._padded), cache_len(int(self._lengths.max()) + 1))
        self.logits = jnp.zeros((len(self._padded), config.n_vocab), jnp.float32)
        if not self._scores_tokens:  # scores need every token's logits
            self._reuse()

    @property
    def left(self) -> int:
        """Tokens that remain to be read of the prompt that has most of them."""
        return int(max(self._lengths - self._first))

    def read_on(self) -> None:
        """Read a piece of every prompt; with the last one, keep what was read for prompts to come."""
        size = bucket(min(self.left, self._chunk), SHORTEST_PIECE, self._chunk)
        tokens, targets = np.zeros((2, len(self._padded), size), np.int32)
        for i, prompt in enumerate(self._padded):
            piece, follow = prompt[self._first[i] :][:size], prompt[self._first[i] + 1 :][:size]
            tokens[i, : len(piece)], targets[i, : len(follow)] = piece, follow
        inputs = (self.caches, self.logits, tokens, self._first, self._lengths - 1)
        if self._scores_tokens:
            self.caches, self.logits, scores = self._programs.score(*inputs, targets)
            self._note(*jax.device_get(scores))
        else:
            self.caches, self.logits = self._programs.read(*inputs)
        self._first = np.minimum(self._first + size, self._lengths)
        if not self.left:
            self._keep()

    def scores(self, row: Request) -> list[Score]:
        """Of the tokens of a row's prompt, but the first."""
        found = self._scores[self.source[row.id]]
        return [Score(score.logprob, score.top[: row.n_top]) for score in found]

    def _note(self, logprobs: np.ndarray, best: np.ndarray, ids: np.ndarray) -> None:
        for i, prompt in enumerate(self._prompts):
            for j in range(min(logprobs.shape[1], len(prompt) - 1 - int(self._first[i]))):
                top = list(zip(ids[i, j].tolist(), best[i, j].tolist(), strict=True))
                self._scores[i].append(Score(float(logprobs[i, j]), top))

    def _reuse(self) -> None:
        """Begin each prompt with what an earlier one shares with it."""
        for i, prompt in enumerate(self._prompts):
            if prefix := self._prefixes.find(prompt):
                self.caches = self._programs.put_row(self.caches, prefix.caches, np.int32(i))
                self._first[i] = prefix.length

    def _keep(self) -> None:
        for i, prompt in enumerate(self._prompts):
            if self._prefixes.wants(prompt):
                self._prefixes.keep(prompt, self._programs.take_row(self.caches, np.int32(i)))


def count_rows(n: int, pieces: int) -> int:
    """A power of two that holds `n` rows, or the next multiple of `pieces`: few sizes, as each has its own programs."""
    return -(-bucket(n, 1, 1 << 30) // pieces) * pieces


def bucket(length: int, shortest: int, longest: int) -> int:
    """The smallest power of two from `shortest` that holds `length`, but at most `longest`."""
    return min(max(shortest, 1 << (length - 1).bit_length()), longest)
