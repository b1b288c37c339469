# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""DecoderOnlyEngine generates what the full forward pass predicts, for any batch, bucket sizes and mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_models import make_model_and_params, random_prompts

from mesh_transformer.config import ConfigError, MeshConfig, SampleConfig
from mesh_transformer.config.rope import RopeScalingConfig
from mesh_transformer.mesh import make_layout
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.engine import EngineOptions
from mesh_transformer.sample.engine.programs import DECODE_CHUNK
from mesh_transformer.sample.engine.requests import PromptError, RequestParams

GREEDY, WARM = SampleConfig(temperature=0.0), SampleConfig(temperature=1.0, top_p=0.95)
FAMILIES = {
    "learned": dict(),
    "none": dict(positions="none", norm="scalenorm"),
    "rope-interleaved": dict(
        positions="rope-interleaved", rope_dims=4, residual="parallel", tied_embeddings=False, head_bias=True
    ),
    "rope-half": dict(positions="rope-half", residual="parallel-two-norms", tied_embeddings=False),
    "t5": dict(positions="t5", attention_scale="none"),
    "umt5": dict(positions="t5", attention_scale="none", t5_shared_bias=False),
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
    "gemma2": dict(
        norm="gemma-rmsnorm",
        residual="sandwich",
        positions="rope-half",
        attention_pattern=("local", "global"),
        attention_window=5,
        attention_scale=0.5,
        attention_softcap=2.0,
        logit_softcap=3.0,
        embedding_scale="sqrt_d_model",
    ),
    "falcon-alibi": dict(positions="falcon-alibi", n_kv_heads=2, embedding_norm=True, clip_qkv=1.0),
    "position-offset": dict(position_offset=3),
    "gemma3": dict(
        n_layers=3,
        norm="gemma-rmsnorm",
        residual="sandwich",
        qk_norm="gemma-rmsnorm",
        positions="rope-half",
        rope_local_theta=100.0,
        rope_scaling=RopeScalingConfig(type="linear", factor=4.0),
        attention_pattern=("local", "global"),
        attention_window=5,
    ),
    "reordered-norm": dict(
        norm="rmsnorm",
        residual="reordered-norm",
        qk_norm="rmsnorm-all-heads",
        positions="rope-half",
        rope_pattern=(True, False),
        clip_qkv=2.0,
    ),
    "per-head-norm": dict(
        norm="nonparametric-layernorm",
        residual="parallel",
        qk_norm="layernorm-per-head",
        positions="rope-interleaved",
        logit_scale=0.7,
    ),
}
LONGROPE = RopeScalingConfig(
    type="longrope",
    short_factor=(1.0, 1.2, 1.5, 2.0),
    long_factor=(2.0, 3.0, 5.0, 9.0),
    original_seq_len=24,
    attention_factor=1.2,
)


@functools.cache
def forward(config):
    return jax.jit(lambda params, tokens: jax.nn.log_softmax(make_model(config).apply(params, tokens)[0]))


def forward_logprobs(config, params, sequence):
    padded = jnp.asarray([sequence + [0] * (config.seq_len - len(sequence))])  # causal: padding has no effect
    return np.asarray(forward(config)(params, padded))[0, : len(sequence)]


@pytest.fixture(scope="module")
def shared():
    config, params = make_model_and_params()
    return config, params, DecoderOnlyEngine(config, params)


def test_logits_equal_the_forward_pass(shared):
    config, params, engine = shared
    [prompt] = random_prompts(21)
    logits = engine.logits(prompt)
    assert (logits.shape, logits.dtype) == ((21, config.n_vocab), np.float32)
    own = forward_logprobs(config, params, prompt)
    np.testing.assert_allclose(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True), own, atol=2e-4)
    for tokens, message in (([], "got 0 tokens"), ([97], "got the token 97"), ([1] * 97, "at most seq_len=96")):
        with pytest.raises(PromptError, match=message):
            engine.logits(tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_with_cache_is_greedy_without(name):
    config, params = make_model_and_params(**FAMILIES[name])
    prompts, all_tokens = random_prompts(3, 21, 10), set()
    tolerance = 0.15 if config.dtype == "bfloat16" else 2e-4
    for prompt, [done] in zip(
        prompts, DecoderOnlyEngine(config, params).generate(prompts, GREEDY, max_tokens=20), strict=True
    ):
        logprobs = forward_logprobs(config, params, prompt + done.tokens)[len(prompt) - 1 : -1]
        found = logprobs[np.arange(20), done.tokens]
        np.testing.assert_allclose(found, done.logprobs, atol=tolerance)
        assert np.all(found >= logprobs.max(axis=1) - tolerance)
        if config.dtype == "float32":
            assert done.tokens == logprobs.argmax(axis=1).tolist()
        all_tokens |= set(done.tokens)
    assert len(all_tokens) > 1, "the model should not repeat one token"


def test_keys_are_recomputed_when_longrope_passes_the_trained_length():
    """Each token follows from a forward pass over all tokens before it, as in transformers; prompts on both sides of 24."""
    config, params = make_model_and_params(positions="rope-half", rope_scaling=LONGROPE)
    engine = DecoderOnlyEngine(config, params, EngineOptions(prefill_chunk=16))
    prompts = random_prompts(3, 20, 24, 30)
    rows = jax.jit(lambda params, tokens: make_model(config).apply(params, tokens)[0])
    for prompt, [done] in zip(prompts, engine.generate(prompts, GREEDY, max_tokens=20), strict=True):
        sequence = prompt + done.tokens
        for end in sorted({len(prompt), 23, 24, 25, 26, len(sequence) - 1}):
            if len(prompt) <= end < len(sequence):
                logits = rows(params, jnp.asarray([sequence[:end]]))[0, -1]
                assert int(jnp.argmax(logits)) == sequence[end], end
                logprob = jax.nn.log_softmax(logits)[sequence[end]]
                np.testing.assert_allclose(done.logprobs[end - len(prompt)], logprob, atol=2e-4)
    unscaled = make_model(dataclasses.replace(config, rope_scaling=None)).apply(params, jnp.asarray([prompts[3]]))[0]
    assert np.abs(engine.logits(prompts[3]) - unscaled[0]).max() > 0.1


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


def test_requests_may_differ_in_options(shared):
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


def test_first_tokens_do_not_wait_for_a_decode_chunk(shared):
    _, _, engine = shared
    requests = submit(engine, random_prompts(9, 12), max_tokens=30)
    first, second = engine.step(), engine.step()
    assert [event.request for event in first] == [requests[0].id, requests[1].id] * 2
    assert len(second) == 2 * DECODE_CHUNK
    while not engine.idle:
        engine.step()


def test_chunked_prefill_equals_one_chunk(shared):
    config, params, engine = shared
    prompts = random_prompts(70, 33, 32, 2)
    chunked = DecoderOnlyEngine(config, params, EngineOptions(prefill_chunk=16))
    expected = engine.generate(prompts, WARM, max_tokens=10)
    assert [[c.tokens for c in samples] for samples in chunked.generate(prompts, WARM, max_tokens=10)] == [
        [c.tokens for c in samples] for samples in expected
    ]
    assert chunked.compilations["prefill"] == 1
    assert len({tuple(c.tokens) for [c] in expected}) == 4


def test_logprobs_are_of_the_model_distribution(shared):
    config, params, engine = shared
    [prompt] = random_prompts(5)
    [[done]] = engine.generate([prompt], SampleConfig(temperature=2.0, top_k=20, presence_penalty=0.3), max_tokens=30)
    own = forward_logprobs(config, params, prompt + done.tokens)[len(prompt) - 1 : -1]
    np.testing.assert_allclose(own[np.arange(30), done.tokens], done.logprobs, atol=2e-4)
    assert done.tokens != own.argmax(axis=1).tolist()


def test_nearby_lengths_compile_nothing():
    engine = DecoderOnlyEngine(*make_model_and_params(n_layers=1), EngineOptions(prefix_cache_bytes=0))
    engine.generate(random_prompts(17, 18), WARM, max_tokens=10)
    before = engine.compilations
    kinds = ("make_caches", "prefill", "make_state", "first_token", "copy_out", "copy_in", "insert", "decode")
    assert before == dict.fromkeys(kinds, 1)
    engine.generate(random_prompts(32, 3), GREEDY, max_tokens=31, seed=9, stop_tokens=[1, 2, 3])
    assert engine.compilations == before
    engine.generate(random_prompts(33, 3), GREEDY, max_tokens=31)
    assert engine.compilations == before | {"prefill": 2}, "another prompt bucket needs one more program"


def test_growing_the_cache_changes_nothing(monkeypatch):
    config, params = make_model_and_params()
    prompts = random_prompts(14, 3)
    expected = DecoderOnlyEngine(config, params).generate(prompts, WARM, max_tokens=60)
    monkeypatch.setattr("mesh_transformer.sample.engine.buckets.MIN_CACHE_LEN", 16)
    growing = DecoderOnlyEngine(config, params)
    assert [c.tokens for [c] in growing.generate(prompts, WARM, max_tokens=60)] == [c.tokens for [c] in expected]
    assert growing.compilations["resize"] == 3  # 32, 64, 96


def test_stop_tokens_end_requests_independently(shared):
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


def test_decode_chunks_do_not_change_tokens(shared):
    _, _, engine = shared
    prompts = random_prompts(4, 9)
    expected = engine.generate(prompts, WARM, max_tokens=21)
    for steps in (1, 5):
        generation = engine.start(prompts, WARM, max_tokens=21)
        events = []
        while not generation.done:
            events += generation.step(steps)
        for index, [completion] in enumerate(expected):
            own = [event for event in events if event.request == index]
            assert [event.token for event in own] == completion.tokens
            assert [event.finish for event in own] == [None] * 20 + ["length"]


def test_stopped_request_has_no_more_events(shared):
    _, _, engine = shared
    prompts = random_prompts(4, 9)
    expected = engine.generate(prompts, WARM, max_tokens=25)[1][0].tokens
    generation = engine.start(prompts, WARM, max_tokens=25)
    tokens = {0: [], 1: []}
    for event in generation.events(interval=0.01):
        tokens[event.request].append(event.token)
        if event.request == 0 and len(tokens[0]) == 3:
            generation.stop(0)
    assert len(tokens[0]) == 3
    assert tokens[1] == expected


@pytest.mark.parametrize("mesh", [dict(data=2, tensor=2), dict(data=1, fsdp=2, tensor=4)])
def test_sharded_is_one_device(mesh):
    config, params = make_model_and_params(
        positions="rope-half", attention_pattern=("global", "local"), attention_window=6
    )
    prompts = random_prompts(5, 20, 9)
    expected = DecoderOnlyEngine(config, params).generate(prompts, WARM, max_tokens=12, n=3)
    layout = make_layout(MeshConfig(**mesh, rules={"sequence": "tensor", "vocab": ""}))
    sharded = DecoderOnlyEngine(config, params, layout=layout)
    generation = sharded.start(prompts, WARM, max_tokens=12, n=3)
    tokens, events = [[] for _ in range(9)], generation.step(1)
    cache = jax.tree.leaves(sharded.state.caches)[0]
    assert cache.sharding.shard_shape(cache.shape)[:2] == (cache.shape[0] // 2, 4 // mesh["tensor"])
    for event in (*events, *generation.events()):
        tokens[event.request].append(event.token)
    assert tokens == [c.tokens for samples in expected for c in samples]


def test_mesh_that_does_not_fit_is_refused():
    config, params = make_model_and_params(n_kv_heads=2)
    with pytest.raises(ConfigError, match="kv_heads = 2 is not divisible by tensor = 4"):
        DecoderOnlyEngine(config, params, layout=make_layout(MeshConfig(data=1, tensor=4, rules={"vocab": ""})))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 5, "has no tokens"),
        ([3, 97], 5, r"token 97, but the model's vocabulary is 0\.\.96"),
        ([1] * 96, 1, "96 tokens, but prompt and output together have at most seq_len=96"),
        ([1] * 90, 7, "at most max_tokens=6"),
    ],
)
def test_prompt_that_does_not_fit_is_refused(shared, prompt, max_tokens, message):
    with pytest.raises(PromptError, match=message):
        shared[2].generate([prompt], GREEDY, max_tokens=max_tokens)


def test_the_last_position_can_be_generated(shared):
    config, params, engine = shared
    [prompt] = random_prompts(90)
    [[done]] = engine.generate([prompt], GREEDY, max_tokens=6)
    assert done.tokens == forward_logprobs(config, params, prompt + done.tokens)[89:-1].argmax(axis=1).tolist()


def submit(engine, prompts, **params):
    return [engine.submit(engine.make_request(prompt, RequestParams(WARM, **params))) for prompt in prompts]


def run(engine, requests, *, until=None):
    """Return the events of all requests by id, until the engine is idle or `until(events)`."""
    events = {request.id: [] for request in requests}
    while not engine.idle and not (until and until(events)):
        for event in engine.step(3):
            events[event.request].append(event)
    return events


def test_alone_equals_among_31_others_that_come_and_go():
    config, params = make_model_and_params()
    engine = DecoderOnlyEngine(
        config, params, EngineOptions(slots=6, prefill_chunk=16)
    )  # fewer slots than requests: they queue
    rng = np.random.default_rng(2)
    prompts = random_prompts(*rng.integers(1, 60, 32), seed=7)
    lengths = rng.integers(1, 30, 32).tolist()
    requests = [
        engine.make_request(prompt, RequestParams(WARM, max_tokens=n, seed=i))
        for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    events = {request.id: [] for request in requests}
    coming = list(requests)
    widths = set()
    while coming or not engine.idle:
        for request in coming[:2]:
            engine.submit(request)
        coming = coming[2:]
        for event in engine.step(2):
            events[event.request].append(event)
        widths.add(len(engine.active))
        assert len(engine.active) <= 6
    assert len(widths) > 3, "requests should have joined and left"
    alone = DecoderOnlyEngine(config, params)
    for i in (0, 9, 21, 31):
        [[expected]] = alone.generate([prompts[i]], WARM, max_tokens=lengths[i], seed=i)
        assert [event.token for event in events[requests[i].id]] == expected.tokens
    assert all(len(found) == n for found, n in zip(events.values(), lengths, strict=True))
    assert all(found[-1].finish == "length" for found in events.values())


def test_long_prompt_does_not_block_a_short_one(shared):
    config, params, _ = shared
    engine = DecoderOnlyEngine(config, params, EngineOptions(prefill_chunk=16))
    [long, short] = random_prompts(80, 4)
    [first] = submit(engine, [long], max_tokens=4)
    engine.step(1)
    [second] = submit(engine, [short], max_tokens=4)
    events = run(engine, [first, second], until=lambda events: events[first.id])
    assert len(events[second.id]) == 4, "the short one should end before the first token of the long one"


def test_prefix_cache_reuses_common_prefixes(shared):
    config, params, _ = shared
    [start, a, b] = random_prompts(40, 9, 5)
    plain = DecoderOnlyEngine(config, params, EngineOptions(prefix_cache_bytes=0))
    engine = DecoderOnlyEngine(config, params)
    for prompt in (start + a, start + b, start[:30] + b, start + a):
        [[expected]] = plain.generate([prompt], WARM, max_tokens=12)
        [[found]] = engine.generate([prompt], WARM, max_tokens=12)
        assert found.tokens == expected.tokens
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    assert plain.prefix_cache.reused_tokens == 0
    assert engine.prefix_cache.reused_tokens == 40 + 30 + 48
    small = DecoderOnlyEngine(config, params, EngineOptions(prefix_cache_bytes=3 * engine.prefix_cache.nbytes // 4))
    for prompt in (start + a, start + b, start[:30] + b, start + a):
        small.generate([prompt], WARM, max_tokens=2)
    assert 0 < small.prefix_cache.nbytes <= 3 * engine.prefix_cache.nbytes // 4


def test_prompt_scores_and_top_logprobs(shared):
    config, params, _ = shared
    engine = DecoderOnlyEngine(config, params)
    [prompt] = random_prompts(60)
    [request] = submit(engine, [prompt], max_tokens=3, top_logprobs=4, score_prompt=True)
    events = run(engine, [request])[request.id]
    own = forward_logprobs(config, params, prompt + request.tokens)
    scores = events[0].prompt_scores
    np.testing.assert_allclose([s.logprob for s in scores], own[np.arange(59), prompt[1:]], atol=2e-4)
    for position, top in [*enumerate(s.top for s in scores), *((59 + i, e.top) for i, e in enumerate(events))]:
        ids, logprobs = zip(*top, strict=True)
        assert list(ids) == np.argsort(-own[position], kind="stable")[:4].tolist()
        np.testing.assert_allclose(logprobs, own[position, list(ids)], atol=2e-4)
    assert events[1].prompt_scores is None
    [[plain]] = DecoderOnlyEngine(config, params).generate([prompt], WARM, max_tokens=3)
    assert plain.tokens == request.tokens


class OnlyEven:
    """A constraint: even tokens, none twice in succession."""

    def __init__(self, n_vocab):
        self.n_vocab = n_vocab
        self.last = None

    def allowed(self):
        mask = np.arange(self.n_vocab) % 2 == 0
        if self.last is not None:
            mask[self.last] = False
        return mask

    def accept(self, token):
        self.last = token


def test_constrained_biased_and_free_requests_in_one_batch(shared):
    config, _, engine = shared
    [prompt] = random_prompts(7)
    constrained = engine.make_request(prompt, RequestParams(WARM, max_tokens=20, constraint=OnlyEven(config.n_vocab)))
    biased = engine.make_request(prompt, RequestParams(WARM, max_tokens=20, logit_bias={11: 100.0}))
    free = engine.make_request(prompt, RequestParams(WARM, max_tokens=20))
    events = run(engine, [engine.submit(request) for request in (constrained, biased, free)])
    assert all(token % 2 == 0 for token in constrained.tokens)
    assert all(a != b for a, b in zip(constrained.tokens, constrained.tokens[1:], strict=False))
    assert biased.tokens == [11] * 20
    assert free.tokens == engine.generate([prompt], WARM, max_tokens=20)[0][0].tokens
    assert any(token % 2 for token in free.tokens)
    assert all(np.isfinite([event.logprob for event in found]).all() for found in events.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(logit_bias={97: 1.0}), "logit_bias has the token 97"),
        (dict(top_logprobs=21), "top_logprobs=21: must be between 0 and 20"),
        (dict(stop_tokens=range(17)), "got 17 stop_tokens; a request can have at most 16"),
        (dict(max_tokens=0), "max_tokens=0: must be at least 1"),
    ],
)
def test_invalid_parameters_are_refused(shared, changes, message):
    with pytest.raises(PromptError, match=message):
        shared[2].make_request([1, 2], RequestParams(GREEDY, **(dict(max_tokens=9) | changes)))


def test_cancelled_requests_free_their_slots_at_once(shared):
    config, params, _ = shared
    engine = DecoderOnlyEngine(config, params, EngineOptions(slots=2))
    requests = submit(engine, random_prompts(3, 4, 5, 6), max_tokens=50)
    engine.step(1)
    engine.step(1)
    assert [request.id for request in engine.active] == [requests[0].id, requests[1].id]
    for request in (requests[0], requests[2]):  # one in a slot, one waiting
        engine.cancel(request)
    for _ in range(3):
        events = engine.step(1)
        assert not {event.request for event in events} & {requests[0].id, requests[2].id}
    assert {request.id for request in engine.active} == {requests[1].id, requests[3].id}
