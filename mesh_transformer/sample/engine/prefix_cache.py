# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Prefix cache: reuses the KV caches of earlier prompts that share a prefix with a new prompt."""

from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import numpy as np

MIN_PREFIX_LEN = 16  # shorter common prefixes are not reused: copying them saves no time


class Prefix(NamedTuple):
    """A prefix of a prompt whose keys and values are cached."""

    length: int
    caches: Any  # of one sequence; entries from position `length` on belong to another prompt


class PrefixCache:
    """KV caches by prompt, with least-recently-used eviction above `max_bytes` (0 disables the cache)."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, Any] = OrderedDict()
        self.nbytes = 0
        self.reused_tokens = 0

    def should_insert(self, prompt: np.ndarray) -> bool:
        """Return whether to insert this prompt; mark it as recently used if it is already cached."""
        key = prompt.tobytes()
        if key in self._entries:
            self._entries.move_to_end(key)
            return False
        return self._max_bytes > 0 and len(prompt) >= MIN_PREFIX_LEN

    def insert(self, prompt: np.ndarray, caches: Any) -> None:
        """Add the caches of a prompt (int32 [T]), unless they exceed `max_bytes` by themselves."""
        nbytes = _nbytes(caches)
        if nbytes > self._max_bytes:
            return
        self._entries[prompt.tobytes()] = caches
        self.nbytes += nbytes
        while self.nbytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.nbytes -= _nbytes(oldest)

    def clear(self) -> None:
        """Remove all entries and reset the counters."""
        self._entries.clear()
        self.nbytes = 0
        self.reused_tokens = 0

    def match(self, prompt: np.ndarray) -> Prefix | None:
        """Return the longest cached prefix of `prompt` without its last token, whose logits must always be computed."""
        best_len, best_key = 0, None
        for key in self._entries:
            other = np.frombuffer(key, np.int32)
            max_common = min(len(other), len(prompt) - 1)
            differences = np.flatnonzero(other[:max_common] != prompt[:max_common])
            common = int(differences[0]) if differences.size else max_common
            if common > best_len:
                best_len, best_key = common, key
        if best_key is None or best_len < MIN_PREFIX_LEN:
            return None
        self._entries.move_to_end(best_key)
        self.reused_tokens += best_len
        return Prefix(best_len, self._entries[best_key])


def _nbytes(caches: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
