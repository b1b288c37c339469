# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What was read before: caches of earlier prompts, for those that begin with the same tokens."""

from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import numpy as np

SHORTEST = 16  # common tokens that are worth a copy


class Prefix(NamedTuple):
    """The start of a prompt that need not be read again."""

    length: int
    caches: Any  # one row; places from `length` on belong to another prompt


class PrefixCache:
    """Caches by prompt, the least recently used of which go when they take more than `max_bytes`."""

    def __init__(self, max_bytes: int):
        """Nothing is kept with 0."""
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Any] = OrderedDict()
        self.nbytes = 0
        self.reused_tokens = 0

    def wants(self, prompt: np.ndarray) -> bool:
        """Whether `keep` would keep this prompt's caches; those it has already count as used."""
        key = prompt.tobytes()
        if key in self._kept:
            self._kept.move_to_end(key)
            return False
        return self._max_bytes > 0 and len(prompt) >= SHORTEST

    def keep(self, prompt: np.ndarray, caches: Any) -> None:
        """Remember a prompt (int32 [T]) and its row of caches, unless that alone is more than there is room for."""
        size = _nbytes(caches)
        if size > self._max_bytes:
            return
        self._kept[prompt.tobytes()] = caches
        self.nbytes += size
        while self.nbytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= _nbytes(oldest)

    def forget(self) -> None:
        """All of them, and that any were of use."""
        self._kept.clear()
        self.nbytes = self.reused_tokens = 0

    def find(self, prompt: np.ndarray) -> Prefix | None:
        """The longest start that `prompt` shares with a kept one; its last token must be read in any case."""
        best, best_key = 0, None
        for key in self._kept:
            other = np.frombuffer(key, np.int32)
            size = min(len(other), len(prompt) - 1)
            differ = np.flatnonzero(other[:size] != prompt[:size])
            common = int(differ[0]) if differ.size else size
            if common > best:
                best, best_key = common, key
        if best_key is None or best < SHORTEST:
            return None
        self._kept.move_to_end(best_key)
        self.reused_tokens += best
        return Prefix(best, self._kept[best_key])


def _nbytes(caches: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
