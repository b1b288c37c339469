# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Shape buckets: lengths and batch sizes are rounded up to a few sizes, so that compiled programs are reused."""

from typing import NamedTuple

MIN_PREFILL_LEN = 16  # smallest bucket of prompt tokens
MIN_CACHE_LEN = 128  # smallest bucket of KV caches: attention on a CPU also reads the empty positions


class Buckets(NamedTuple):
    """Bucket sizes of one engine."""

    seq_len: int  # maximum number of tokens of a sequence
    batch_shards: int = 1  # number of shards of a batch; batch sizes are multiples of this number

    def cache_len(self, length: int) -> int:
        """Return the KV cache length for sequences of `length` tokens."""
        return bucket(length, MIN_CACHE_LEN, self.seq_len)

    def prefill_len(self, length: int, longest: int | None = None) -> int:
        """Return the padded length of a prompt chunk of `length` tokens, at most `longest` (default: seq_len)."""
        return bucket(length, MIN_PREFILL_LEN, self.seq_len if longest is None else longest)

    def batch_size(self, n: int) -> int:
        """Return the batch size for `n` requests: a power of two, rounded up to a multiple of batch_shards."""
        return round_up(bucket(n, 1, 1 << 30), self.batch_shards)


def bucket(length: int, shortest: int, longest: int) -> int:
    """Return the smallest power of two >= `length`, clipped to [`shortest`, `longest`]."""
    return min(max(shortest, 1 << (length - 1).bit_length()), longest)


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple
