# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""plan_chunks: no shard crosses a slice boundary or exceeds the limits, and parts are even where possible."""

import math

import numpy as np
import pytest

from mesh_transformer.checkpoint.chunk_grid import (
    DTYPES,
    MAX_CHUNK_BYTES,
    MAX_SHARD_BYTES,
    count_bytes,
    count_shards,
    plan_chunks,
    shard_keys,
)


def test_random_shapes():
    rng = np.random.default_rng(0)
    n_split = 0
    for _ in range(300):
        ndim = int(rng.integers(0, 4))
        shape = [int(2 ** rng.uniform(0, 33 / max(ndim, 1))) for _ in range(ndim)]
        counts = [int(rng.choice([d for d in (1, 2, 4, 8) if dim % d == 0])) for dim in shape]
        owned = [dim // count for dim, count in zip(shape, counts, strict=True)]
        dtype = str(rng.choice(list(DTYPES)))
        shard, chunk = plan_chunks(shape, owned, dtype)
        assert 0 < count_bytes(chunk, dtype) <= MAX_CHUNK_BYTES
        assert count_bytes(chunk, dtype) <= count_bytes(shard, dtype) <= MAX_SHARD_BYTES
        n_split += shard != chunk
        for dim, part, outer, inner in zip(shape, owned, shard, chunk, strict=True):
            assert outer % inner == 0
            assert part == dim or part % outer == 0
        assert count_shards(shape, shard) >= math.prod(d // p for d, p in zip(shape, owned, strict=True))
    assert n_split > 30


@pytest.mark.parametrize(
    ("shape", "owned", "shard", "chunk"),
    [
        ((), (), (), ()),
        ((0, 4), (0, 4), (1, 4), (1, 4)),
        ((28, 4096, 16384), (28, 4096, 2048), (1, 4096, 2048), (1, 512, 2048)),
        ((50257, 768), (50257, 768), (17330, 768), (1733, 768)),  # 50257 = 29 * 1733
        ((50261, 768), (50261, 768), (12570, 768), (2514, 768)),  # a prime: the last part extends beyond the end
        ((2, 50261, 64), (1, 50261, 64), (1, 50262, 64), (1, 25131, 64)),
    ],
)
def test_examples(shape, owned, shard, chunk):
    assert plan_chunks(shape, owned, "float32") == (shard, chunk)


def test_a_sharded_dimension_of_prime_size_is_not_split():
    shard, chunk = plan_chunks((2 * 50261, 4096), (50261, 4096), "float32")
    assert chunk[0] in (1, 50261)
    assert count_bytes(chunk, "float32") > MAX_CHUNK_BYTES / 2
    assert 50261 % shard[0] == 0


def test_keys():
    assert list(shard_keys((), ())) == ["c"]
    assert list(shard_keys((5, 3), (2, 3))) == ["c.0.0", "c.1.0", "c.2.0"]
    assert list(shard_keys((0, 3), (1, 3))) == []
