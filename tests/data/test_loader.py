# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Loader: a batch is a pure function of the data, the seed and its index, on any number of processes."""

import threading
from collections import Counter

import numpy as np
import pytest

from mesh_transformer.data.errors import DataError
from mesh_transformer.data.loader import MIXTURE_PERIOD, Dataset, Loader, Prefetcher, evaluation_batches
from mesh_transformer.data.shards import ShardWriter, TokenShard

T, END = 8, 99


def make_shard(folder, name, n_documents=40, start=0) -> TokenShard:
    rng = np.random.default_rng(start)
    with ShardWriter(folder / name, np.dtype(np.uint16)) as shard:
        for _ in range(n_documents):
            shard.add(np.append(rng.integers(start, start + 40, rng.integers(1, 20)), END))
    return TokenShard(folder / name)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return make_shard(folder, "a"), make_shard(folder, "b", 60, start=50)


def make(shards, **options) -> Loader:
    weights = options.pop("weights", [1.0] * len(shards))
    datasets = [Dataset(shard.prefix.name, shard, weight) for shard, weight in zip(shards, weights, strict=True)]
    return Loader(datasets, **(dict(seq_len=T, n_vocab=100, seed=3, end_of_text=END) | options))


def test_processes_together_build_the_batch_of_one(shards):
    loader = make(shards)
    full = loader.batch(24, 8)
    for count in (2, 4):
        parts = [loader.batch(24, 8, rows) for rows in np.split(np.arange(8), count)]
        assert not np.array_equal(parts[0].tokens, parts[1].tokens)
        assert full.encoder_tokens is None, "a decoder-only model has no encoder input"
        for field, arrays in zip(full._fields[:-1], zip(*(part[:-1] for part in parts), strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(arrays), getattr(full, field), err_msg=field)
    some = loader.batch(24, 8, [1, 6])
    np.testing.assert_array_equal(some.tokens, full.tokens[[1, 6]])


def test_a_batch_depends_only_on_its_index(shards):
    first, second = make(shards), make(shards)
    late = second.batch(96, 4)
    second.batch(0, 4)
    np.testing.assert_array_equal(first.batch(96, 4).tokens, late.tokens)
    np.testing.assert_array_equal(second.batch(94, 8).tokens[2:6], late.tokens)
    assert not np.array_equal(make(shards, seed=4).batch(96, 4).tokens, late.tokens)


def test_every_epoch_has_every_sequence_once_in_another_order(shards):
    loader = make(shards[:1])
    count = loader.lengths[0]
    epochs = [[loader.locate(i)[1] for i in range(start, start + count)] for start in (0, count)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(count))
    assert epochs[0] != epochs[1] != list(range(count))
    in_order = make(shards[:1], shuffle=False)
    assert [in_order.locate(i)[1] for i in range(count)] == list(range(count))
    assert loader.epochs(2 * count) == pytest.approx(2.0)


def test_targets_are_the_next_tokens_of_the_shard(shards):
    loader = make(shards[:1], shuffle=False)
    batch = loader.batch(0, 5)
    np.testing.assert_array_equal(batch.tokens.reshape(-1), shards[0].tokens[: 5 * T])
    np.testing.assert_array_equal(batch.targets.reshape(-1), shards[0].tokens[1 : 5 * T + 1])
    assert (batch.mask == 1).all()
    assert (batch.segment_ids == 1).all()
    np.testing.assert_array_equal(batch.positions, np.tile(np.arange(T), (5, 1)))


def test_isolated_documents_have_their_own_segments_and_positions(shards):
    batch = make(shards[:1], shuffle=False, isolate_documents=True).batch(0, 6)
    assert batch.segment_ids.max() > 1
    for tokens, segment_ids, positions in zip(batch.tokens, batch.segment_ids, batch.positions, strict=True):
        segment, position = 1, 0
        for t in range(T):
            assert (segment_ids[t], positions[t]) == (segment, position)
            position += 1
            if tokens[t] == END:
                segment, position = segment + 1, 0


def test_mixtures_have_their_weights_exactly_and_in_every_stretch(shards):
    loader = make(shards, weights=[3.0, 1.0])
    picked = [loader.locate(i)[0] for i in range(MIXTURE_PERIOD)]
    assert Counter(picked) == {0: 3 * MIXTURE_PERIOD // 4, 1: MIXTURE_PERIOD // 4}
    for start in range(0, MIXTURE_PERIOD - 40, 40):
        assert abs(picked[start : start + 40].count(1) - 10) <= 1
    count = loader.lengths[1]
    sequences = [j for i in range(4 * MIXTURE_PERIOD) for dataset, j in [loader.locate(i)] if dataset == 1]
    assert sorted(sequences[:count]) == list(range(count)), "every epoch of a dataset is complete in a mixture"


def test_fingerprints_differ_between_data(shards):
    base = make(shards).fingerprint
    assert make(shards).fingerprint == base
    others = [make(shards[:1]), make(shards, seed=5), make(shards, seq_len=4), make(shards, weights=[1.0, 2.0])]
    assert len({base, *(other.fingerprint for other in others)}) == 5


def test_wrong_data_is_refused(shards, tmp_path):
    with pytest.raises(DataError, match=r"b: document \d+ contains token id .*n_vocab=60"):
        make(shards[1:], n_vocab=60).batch(0, 50)
    short = make_shard(tmp_path, "short", 1)
    with pytest.raises(DataError, match=r"short: .*fewer than one sequence of 64"):
        make([short], seq_len=64)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_evaluation_scores_every_token_but_the_first_once(shards, batch_size):
    batches = list(evaluation_batches(shards[0], seq_len=T, batch_size=batch_size))
    scored = np.concatenate([batch.targets[batch.mask == 1] for batch in batches])
    np.testing.assert_array_equal(scored, shards[0].tokens[1:])
    assert {batch.tokens.shape for batch in batches} == {(batch_size, T)}


def test_prefetching_preserves_order_raises_and_ends(shards):
    loader = make(shards)
    before = threading.active_count()
    calls = [(0, 2), (2, 4), (6, 2)]
    with Prefetcher(loader, calls) as batches:
        for (first, size), batch in zip(calls, batches, strict=True):
            np.testing.assert_array_equal(batch.tokens, loader.batch(first, size).tokens)
    with Prefetcher(loader, ((i, 1) for i in range(10**9))) as batches:
        next(batches)
    bad = make(shards[1:], n_vocab=60)
    with Prefetcher(bad, [(0, 50)]) as batches, pytest.raises(DataError, match="contains token"):
        next(batches)
    assert threading.active_count() == before
