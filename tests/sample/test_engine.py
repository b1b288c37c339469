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
from mesh_transformer.model.transformer import describe_params, make_model
from mesh_transformer.sample.engine import Engine, PromptError

BASE = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_vocab=97, seq_len=96)
GREEDY, WARM = SampleConfig(temperature=0.0), SampleConfig(temperature=1.0, top_p=0.95)
FAMILIES = {
    "learned": dict(),
    "none": dict(positions="none", norm="scalenorm"),
    "rotary-pairs": dict(
        positions="rotary-pairs", rotary_dims=4, residual="parallel", tied_embeddings=False, head_bias=True
    ),
    "rotary-halves": dict(positions="rotary-halves", residual="parallel-two-norms", tied_embeddings=False),
    "t5": dict(positions="t5", attention_scale="none"),
    "alibi": dict(positions="alibi", norm="rmsnorm", activation="relu"),
    "banded": dict(attention_pattern=("global", "local"), attention_window=5, qkv_bias=False),
    "local-first": dict(
        n_layers=3, attention_pattern=("local", "global", "local"), attention_window=3, positions="rotary-pairs"
    ),
    "grouped": dict(
        n_kv_heads=2, norm="rmsnorm", gated=True, activation="silu", positions="rotary-halves", ff_bias=False
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
    return config, params, Engine(config, params)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_with_cache_is_greedy_without(name):
    config, params = make(**FAMILIES[name])
    prompts, drawn_tokens = random_prompts(3, 21, 10), set()
    tolerance = 0.15 if config.dtype == "bfloat16" else 2e-4
    for prompt, [done] in zip(prompts, Engine(config, params).generate(prompts, GREEDY, max_tokens=20), strict=True):
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


def test_prompt_in_pieces_is_at_once(shared):
    config, params, engine = shared
    prompts = random_prompts(70, 33, 32, 2)
    pieces = Engine(config, params, prefill_chunk=16)
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
    engine = Engine(*make(n_layers=1))
    engine.generate(random_prompts(17, 18), WARM, max_tokens=10)
    before = engine.compilations
    assert before == {"make_caches": 1, "read": 1, "begin": 1, "decode": 1}
    engine.generate(random_prompts(32, 3), GREEDY, max_tokens=31, seed=9, stop_tokens=[1, 2, 3])
    assert engine.compilations == before
    engine.generate(random_prompts(33, 3), GREEDY, max_tokens=31)
    assert engine.compilations == before | {"read": 2}, "another bucket of prompts is one more program"


def test_growing_the_cache_changes_nothing(monkeypatch):
    config, params = make()
    prompts = random_prompts(14, 3)
    expected = Engine(config, params).generate(prompts, WARM, max_tokens=60)
    monkeypatch.setattr("mesh_transformer.sample.engine.SHORTEST_CACHE", 16)
    growing = Engine(config, params)
    assert [c.tokens for [c] in growing.generate(prompts, WARM, max_tokens=60)] == [c.tokens for [c] in expected]
    assert growing.compilations["grow"] == 3  # 32, 64, 96


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
    config, params = make(positions="rotary-halves", attention_pattern=("global", "local"), attention_window=6)
    prompts = random_prompts(5, 20, 9)
    expected = Engine(config, params).generate(prompts, WARM, max_tokens=12, n=3)
    layout = make_layout(MeshConfig(**mesh, rules={"sequence": "tensor", "vocab": ""}))
    sharded = Engine(config, params, layout=layout)
    generation = sharded.start(prompts, WARM, max_tokens=12, n=3)
    cache = jax.tree.leaves(generation._state.caches)[0]
    assert cache.sharding.shard_shape(cache.shape)[:2] == (cache.shape[0] // 2, 4 // mesh["tensor"])
    tokens = [[] for _ in range(9)]
    for event in generation.events():
        tokens[event.row].append(event.token)
    assert tokens == [c.tokens for row in expected for c in row]


def test_mesh_that_does_not_fit_is_refused():
    config, params = make(n_kv_heads=2)
    with pytest.raises(ConfigError, match="kv_heads = 2 does not divide"):
        Engine(config, params, layout=make_layout(MeshConfig(data=1, tensor=4, rules={"vocab": ""})))


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
