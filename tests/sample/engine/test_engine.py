# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The engine draws what the plain forward pass says, whatever the batch, the buckets and the mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ConfigError, MeshConfig, ModelConfig, SampleConfig
from mesh_transformer.mesh import make_layout
from mesh_transformer.model.transformer import make_model
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.engine import EngineOptions
from mesh_transformer.sample.engine.requests import RequestParams
from mesh_transformer.sample.engine.programs import DECODE_CHUNK
from mesh_transformer.sample.engine.requests import PromptError
from mesh_transformer.sample.engine.speculative import DraftModelDrafter, PromptLookupDrafter

BASE = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_vocab=97, seq_len=96)
GREEDY, WARM = SampleConfig(temperature=0.0), SampleConfig(temperature=1.0, top_p=0.95)
FAMILIES = {
    "learned": dict(),
    "none": dict(positions="none", norm="scalenorm"),
    "rope-interleaved": dict(
        positions="rope-interleaved", rope_dims=4, residual="parallel", tied_embeddings=False, head_bias=True
    ),
    "rope-half": dict(positions="rope-half", residual="parallel-two-norms", tied_embeddings=False),
    "t5": dict(positions="t5", attention_scale="none"),
    "alibi": dict(positions="alibi", norm="rmsnorm", activation="relu"),
    "banded": dict(attention_pattern=("global", "local"), attention_window=5, qkv_bias=False),
    "local-first": dict(
        n_layers=3, attention_pattern=("local", "global", "local"), attention_window=3, positions="rope-interleaved"
    ),
    "grouped": dict(
        n_kv_heads=2, norm="rmsnorm", gated_ffn=True, activation="silu", positions="rope-half", ff_bias=False
    ),
    "one-kv-head": dict(n_kv_heads=1, d_head=16, attention_pattern=("local",), attention_window=7),
    "bfloat16": dict(dtype="bfloat16", tied_embeddings=False),
}


def make(seed=0, **choices):
    """A model with weights so large that what is most probable depends on the whole context."""
    config, rng = dataclasses.replace(BASE, **choices), np.random.default_rng(seed)
    scale = {"scale": 0.1, "table": 1.0, "w_tokens": 0.4, "w_head": 0.4, "w_positions": 0.4}
    draw = lambda name, shape: rng.normal(name == "scale", scale.get(name, 0.25), shape).astype(np.float32)  # noqa: E731
    described = describe_params(config)
    return config, {
        module: {name: jnp.asarray(draw(name, info.shape)) for name, info in arrays.items()}
        for module, arrays in described.items()
    }


def random_prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, BASE.n_vocab, length).tolist() for length in lengths]


@functools.cache
def forward(config):
    return jax.jit(lambda params, tokens: jax.nn.log_softmax(make_model(config).apply(params, tokens)[0]))


def forward_logprobs(config, params, sequence):
    padded = jnp.asarray([sequence + [0] * (config.seq_len - len(sequence))])  # causal: what follows is not seen
    return np.asarray(forward(config)(params, padded))[0, : len(sequence)]


@pytest.fixture(scope="module")
def shared():
    config, params = make()
    return config, params, DecoderOnlyEngine(config, params)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_with_cache_is_greedy_without(name):
    config, params = make(**FAMILIES[name])
    prompts, drawn_tokens = random_prompts(3, 21, 10), set()
    tolerance = 0.15 if config.dtype == "bfloat16" else 2e-4
    for prompt, [done] in zip(prompts, DecoderOnlyEngine(config, params).generate(prompts, GREEDY, max_tokens=20), strict=True):
        logprobs = forward_logprobs(config, params, prompt + done.tokens)[len(prompt) - 1 : -1]
        drawn = logprobs[np.arange(20), done.tokens]
        np.testing.assert_allclose(drawn, done.logprobs, atol=tolerance)
        assert np.all(drawn >= logprobs.max(axis=1) - tolerance)
        if config.dtype == "float32":
            assert done.tokens == logprobs.argmax(axis=1).tolist()
        drawn_tokens |= set(done.tokens)
    assert len(drawn_tokens) > 1, "a repeating model would prove little"


@pytest.mark.parametrize(
    "options", [GREEDY, WARM, SampleConfig(temperature=0.9, repetition_penalty=1.5, frequency_penalty=0.5)]
)
def test_batch_is_each_alone(shared, options):
    _, _, engine = shared
    prompts = random_prompts(1, 30, 7, 16)
    together = engine.generate(prompts, options, max_tokens=24, seed=5)
    for prompt, [completion] in zip(prompts, together, strict=True):
        [[alone]] = engine.generate([prompt], options, max_tokens=24, seed=5)
        assert alone.tokens == completion.tokens
        np.testing.assert_allclose(alone.logprobs, completion.logprobs, atol=1e-4)


def test_rows_may_differ_in_options(shared):
    _, _, engine = shared
    [prompt] = random_prompts(8)
    options = [
        dataclasses.replace(option, max_tokens=length) for option, length in ((GREEDY, 12), (WARM, 9), (WARM, 5))
    ]
    together = engine.generate([prompt] * 3, options, seed=1)
    assert [len(completion.tokens) for [completion] in together] == [12, 9, 5]
    assert together[2][0].tokens == together[1][0].tokens[:5] != together[0][0].tokens[:5]


def test_samples_share_the_prompt_and_differ(shared):
    _, _, engine = shared
    prompts = random_prompts(6, 11)
    both = engine.generate(prompts, WARM, max_tokens=16, seed=3, n=3)
    assert [len(samples) for samples in both] == [3, 3]
    assert len({tuple(completion.tokens) for completion in both[0]}) == 3
    assert both[1] != engine.generate(prompts, WARM, max_tokens=16, seed=4, n=3)[1]
    one = engine.generate([prompts[1]], WARM, max_tokens=16, seed=3, n=3)[0]
    assert [c.tokens for c in one] == [c.tokens for c in both[1]]
    assert engine.generate([prompts[1]], WARM, max_tokens=16, seed=3)[0][0].tokens == both[1][0].tokens


def test_first_tokens_wait_for_no_burst(shared):
    _, _, engine = shared
    rows = [engine.submit(engine.make_request(prompt, RequestParams(WARM, max_tokens=30))) for prompt in random_prompts(9, 12)]
    first, second = engine.step(), engine.step()
    assert [event.row for event in first] == [rows[0].id, rows[1].id] * 2
    assert len(second) == 2 * DECODE_CHUNK
    while not engine.idle:
        engine.step()


def test_prompt_in_pieces_is_at_once(shared):
    config, params, engine = shared
    prompts = random_prompts(70, 33, 32, 2)
    pieces = DecoderOnlyEngine(config, params, EngineOptions(prefill_chunk=16))
    expected = engine.generate(prompts, WARM, max_tokens=10)
    assert [[c.tokens for c in row] for row in pieces.generate(prompts, WARM, max_tokens=10)] == [
        [c.tokens for c in row] for row in expected
    ]
    assert pieces.compilations["read"] == 1
    assert len({tuple(c.tokens) for [c] in expected}) == 4


def test_logprobs_are_of_the_models_own_distribution(shared):
    config, params, engine = shared
    [prompt] = random_prompts(5)
    [[done]] = engine.generate([prompt], SampleConfig(temperature=2.0, top_k=20, presence_penalty=0.3), max_tokens=30)
    own = forward_logprobs(config, params, prompt + done.tokens)[len(prompt) - 1 : -1]
    np.testing.assert_allclose(own[np.arange(30), done.tokens], done.logprobs, atol=2e-4)
    assert done.tokens != own.argmax(axis=1).tolist()


def test_nearby_lengths_compile_nothing():
    engine = DecoderOnlyEngine(*make(n_layers=1), EngineOptions(prefix_cache_bytes=0))
    engine.generate(random_prompts(17, 18), WARM, max_tokens=10)
    before = engine.compilations
    kinds = ("make_caches", "read", "make_state", "begin", "take_row", "put_row", "seat", "decode")
    assert before == dict.fromkeys(kinds, 1)
    engine.generate(random_prompts(32, 3), GREEDY, max_tokens=31, seed=9, stop_tokens=[1, 2, 3])
    assert engine.compilations == before
    engine.generate(random_prompts(33, 3), GREEDY, max_tokens=31)
    assert engine.compilations == before | {"read": 2}, "another bucket of prompts is one more program"


def test_growing_the_cache_changes_nothing(monkeypatch):
    config, params = make()
    prompts = random_prompts(14, 3)
    expected = DecoderOnlyEngine(config, params).generate(prompts, WARM, max_tokens=60)
    monkeypatch.setattr("mesh_transformer.sample.engine.engine.SHORTEST_CACHE", 16)
    growing = DecoderOnlyEngine(config, params)
    assert [c.tokens for [c] in growing.generate(prompts, WARM, max_tokens=60)] == [c.tokens for [c] in expected]
    assert growing.compilations["resize"] == 3  # 32, 64, 96


def test_stop_tokens_end_rows_one_by_one(shared):
    _, _, engine = shared
    prompts = random_prompts(4, 9)
    free = [c.tokens for [c] in engine.generate(prompts, WARM, max_tokens=40)]
    stop = free[0][5]
    ended = [c for [c] in engine.generate(prompts, WARM, max_tokens=40, stop_tokens=[stop])]
    assert ended[0].tokens == free[0][: free[0].index(stop) + 1]
    assert ended[0].finish == "stop"
    cut = free[1].index(stop) + 1 if stop in free[1] else 40
    assert ended[1].tokens == free[1][:cut]
    assert ended[1].finish == ("stop" if stop in free[1] else "length")


def test_bursts_do_not_change_tokens(shared):
    _, _, engine = shared
    prompts = random_prompts(4, 9)
    expected = engine.generate(prompts, WARM, max_tokens=21)
    for steps in (1, 5):
        generation = engine.start(prompts, WARM, max_tokens=21)
        events = []
        while not generation.done:
            events += generation.draw(steps)
        for row, [completion] in enumerate(expected):
            mine = [event for event in events if event.row == row]
            assert [event.token for event in mine] == completion.tokens
            assert [event.finish for event in mine] == [None] * 20 + ["length"]


def test_stopped_row_is_silent_and_leaves_the_others_alone(shared):
    _, _, engine = shared
    prompts = random_prompts(4, 9)
    expected = engine.generate(prompts, WARM, max_tokens=25)[1][0].tokens
    generation = engine.start(prompts, WARM, max_tokens=25)
    rows = {0: [], 1: []}
    for event in generation.events(pause=0.01):
        rows[event.row].append(event.token)
        if event.row == 0 and len(rows[0]) == 3:
            generation.stop(0)
    assert len(rows[0]) == 3
    assert rows[1] == expected


@pytest.mark.parametrize("mesh", [dict(data=2, tensor=2), dict(data=1, fsdp=2, tensor=4)])
def test_sharded_is_one_device(mesh):
    config, params = make(positions="rope-half", attention_pattern=("global", "local"), attention_window=6)
    prompts = random_prompts(5, 20, 9)
    expected = DecoderOnlyEngine(config, params).generate(prompts, WARM, max_tokens=12, n=3)
    layout = make_layout(MeshConfig(**mesh, rules={"sequence": "tensor", "vocab": ""}))
    sharded = DecoderOnlyEngine(config, params, layout=layout)
    generation = sharded.start(prompts, WARM, max_tokens=12, n=3)
    tokens, events = [[] for _ in range(9)], generation.draw(1)
    cache = jax.tree.leaves(sharded._seats.state.caches)[0]
    assert cache.sharding.shard_shape(cache.shape)[:2] == (cache.shape[0] // 2, 4 // mesh["tensor"])
    for event in (*events, *generation.events()):
        tokens[event.request].append(event.token)
    assert tokens == [c.tokens for row in expected for c in row]


def test_mesh_that_does_not_fit_is_refused():
    config, params = make(n_kv_heads=2)
    with pytest.raises(ConfigError, match="kv_heads = 2 does not divide"):
        DecoderOnlyEngine(config, params, layout=make_layout(MeshConfig(data=1, tensor=4, rules={"vocab": ""})))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 5, "empty"),
        ([3, 97], 5, r"token 97, but the model's vocabulary is 0\.\.96"),
        ([1] * 96, 1, "96 tokens, but the model reads at most seq_len=96"),
        ([1] * 90, 7, "at most max_tokens=6"),
    ],
)
def test_prompt_that_does_not_fit_is_refused(shared, prompt, max_tokens, message):
    with pytest.raises(PromptError, match=message):
        shared[2].generate([prompt], GREEDY, max_tokens=max_tokens)


def test_the_last_place_can_be_filled(shared):
    config, params, engine = shared
    [prompt] = random_prompts(90)
    [[done]] = engine.generate([prompt], GREEDY, max_tokens=6)
    assert done.tokens == forward_logprobs(config, params, prompt + done.tokens)[89:-1].argmax(axis=1).tolist()


def run(engine, rows, *, until=None):
    """Events of all rows by id, until the engine is idle or `until(events)`."""
    events = {row.id: [] for row in rows}
    while not engine.idle and not (until and until(events)):
        for event in engine.step(3):
            events[event.row].append(event)
    return events


def test_alone_is_among_31_others_that_come_and_go():
    config, params = make()
    engine = DecoderOnlyEngine(config, params, EngineOptions(slots=6, prefill_chunk=16))  # fewer seats than rows: they queue
    rng = np.random.default_rng(2)
    prompts = random_prompts(*rng.integers(1, 60, 32), seed=7)
    lengths = rng.integers(1, 30, 32).tolist()
    rows = [
        engine.make_request(prompt, RequestParams(WARM, max_tokens=n, seed=i))
        for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    events = {row.id: [] for row in rows}
    coming = list(rows)
    widths = set()
    while coming or not engine.idle:
        for row in coming[:2]:
            engine.submit(row)
        coming = coming[2:]
        for event in engine.step(2):
            events[event.request].append(event)
        widths.add(len(engine.seated))
        assert len(engine.seated) <= 6
    assert len(widths) > 3, "rows should have joined and left"
    alone = DecoderOnlyEngine(config, params)
    for i in (0, 9, 21, 31):
        [[expected]] = alone.generate([prompts[i]], WARM, max_tokens=lengths[i], seed=i)
        assert [event.token for event in events[rows[i].id]] == expected.tokens
    assert all(len(found) == n for found, n in zip(events.values(), lengths, strict=True))
    assert all(found[-1].finish == "length" for found in events.values())


def test_long_prompt_does_not_hold_up_a_short_one(shared):
    config, params, _ = shared
    engine = DecoderOnlyEngine(config, params, EngineOptions(prefill_chunk=16))
    [long, short] = random_prompts(80, 4)
    first = engine.submit(engine.make_request(long, RequestParams(WARM, max_tokens=4)))
    engine.step(1)
    second = engine.submit(engine.make_request(short, RequestParams(WARM, max_tokens=4)))
    events = run(engine, [first, second], until=lambda events: events[first.id])
    assert len(events[second.id]) == 4, "the short one should be done before the long one has its first token"


def test_what_begins_alike_is_read_once(shared):
    config, params, _ = shared
    [start, a, b] = random_prompts(40, 9, 5)
    plain = DecoderOnlyEngine(config, params, EngineOptions(prefix_cache_bytes=0))
    engine = DecoderOnlyEngine(config, params)
    for prompt in (start + a, start + b, start[:30] + b, start + a):
        [[expected]] = plain.generate([prompt], WARM, max_tokens=12)
        [[found]] = engine.generate([prompt], WARM, max_tokens=12)
        assert found.tokens == expected.tokens
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    assert plain.prefixes.reused_tokens == 0
    assert engine.prefixes.reused_tokens == 40 + 30 + 48
    small = DecoderOnlyEngine(config, params, EngineOptions(prefix_cache_bytes=3 * engine.prefixes.nbytes // 4))
    for prompt in (start + a, start + b, start[:30] + b, start + a):
        small.generate([prompt], WARM, max_tokens=2)
    assert 0 < small.prefixes.nbytes <= 3 * engine.prefixes.nbytes // 4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ngram", WARM),
        ("same", GREEDY),
        ("same", WARM),
        ("other", SampleConfig(temperature=0.9, repetition_penalty=1.3)),
    ],
)
def test_proposals_change_no_token(shared, kind, options):
    config, params, engine = shared
    small = make(seed=3, n_layers=1)
    proposer = {
        "ngram": lambda: PromptLookupDrafter(2, 3),
        "same": lambda: DraftModelDrafter(config, params, guesses=3),
        "other": lambda: DraftModelDrafter(*small, guesses=3),
    }[kind]()
    prompts = [[5, 6, 7, 8] * 4, *random_prompts(20, 3)]
    expected = engine.generate(prompts, options, max_tokens=30, seed=2, n=2)
    guessing = DecoderOnlyEngine(config, params, proposer=proposer)
    generation = guessing.start(prompts, options, max_tokens=30, seed=2, n=2)
    tokens, turns = [[] for _ in range(6)], 0
    while not generation.done:
        turns += 1
        for event in generation.draw(1):
            tokens[event.request].append(event.token)
    assert tokens == [c.tokens for row in expected for c in row]
    assert guessing.compilations["verify"], "nothing was proposed"
    if kind == "same":
        assert turns <= 9, "a model that guesses for itself is always right: 1 + 29 / 4 turns"


def test_scores_of_a_prompt_and_likeliest_tokens(shared):
    config, params, _ = shared
    engine = DecoderOnlyEngine(config, params)
    [prompt] = random_prompts(60)
    row = engine.submit(engine.make_request(prompt, RequestParams(WARM, max_tokens=3, top_logprobs=4, score_prompt=True)))
    events = run(engine, [row])[row.id]
    own = forward_logprobs(config, params, prompt + row.tokens)
    scores = events[0].prompt_scores
    np.testing.assert_allclose([s.logprob for s in scores], own[np.arange(59), prompt[1:]], atol=2e-4)
    for place, top in [*enumerate(s.top for s in scores), *((59 + i, e.top) for i, e in enumerate(events))]:
        ids, logprobs = zip(*top, strict=True)
        assert list(ids) == np.argsort(-own[place], kind="stable")[:4].tolist()
        np.testing.assert_allclose(logprobs, own[place, list(ids)], atol=2e-4)
    assert events[1].prompt_scores is None
    [[plain]] = DecoderOnlyEngine(config, params).generate([prompt], WARM, max_tokens=3)
    assert plain.tokens == row.tokens


class OnlyEven:
    """Even tokens, none twice in a row."""

    def __init__(self, n_vocab):
        self.n_vocab, self.last = n_vocab, None

    def allowed(self):
        mask = np.arange(self.n_vocab) % 2 == 0
        if self.last is not None:
            mask[self.last] = False
        return mask

    def accept(self, token):
        self.last = token


def test_constraint_bias_and_free_rows_beside_each_other(shared):
    config, _, engine = shared
    [prompt] = random_prompts(7)
    constrained = engine.make_request(prompt, RequestParams(WARM, max_tokens=20, constraint=OnlyEven(config.n_vocab)))
    biased = engine.make_request(prompt, RequestParams(WARM, max_tokens=20, logit_bias={11: 100.0}))
    free = engine.make_request(prompt, RequestParams(WARM, max_tokens=20))
    events = run(engine, [engine.submit(row) for row in (constrained, biased, free)])
    assert all(token % 2 == 0 for token in constrained.tokens)
    assert all(a != b for a, b in zip(constrained.tokens, constrained.tokens[1:], strict=False))
    assert biased.tokens == [11] * 20
    assert free.tokens == engine.generate([prompt], WARM, max_tokens=20)[0][0].tokens
    assert any(token % 2 for token in free.tokens)
    assert all(np.isfinite([event.logprob for event in found]).all() for found in events.values())


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (dict(logit_bias={97: 1.0}), "logit_bias has the token 97"),
        (dict(top_logprobs=21), "there can be 20"),
        (dict(stop_tokens=range(9)), "there can be 8"),
        (dict(max_tokens=0), "at least one"),
    ],
)
def test_wish_that_cannot_be_granted_is_refused(shared, wish, message):
    with pytest.raises(PromptError, match=message):
        shared[2].make_request([1, 2], RequestParams(GREEDY, **(dict(max_tokens=9) | wish)))


def test_cancelled_rows_make_room_at_once(shared):
    config, params, _ = shared
    engine = DecoderOnlyEngine(config, params, EngineOptions(slots=2))
    rows = [engine.submit(engine.make_request(prompt, RequestParams(WARM, max_tokens=50))) for prompt in random_prompts(3, 4, 5, 6)]
    engine.step(1)
    engine.step(1)
    assert [row.id for row in engine.seated] == [rows[0].id, rows[1].id]
    for row in (rows[0], rows[2]):  # one seated, one waiting
        engine.cancel(row)
    for _ in range(3):
        events = engine.step(1)
        assert not {event.request for event in events} & {rows[0].id, rows[2].id}
    assert {row.id for row in engine.seated} == {rows[1].id, rows[3].id}
