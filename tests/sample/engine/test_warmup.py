# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Warm-up compiles all programs of a single request, and does not change what is generated."""

import jax
import pytest

from mesh_transformer.config import ModelConfig, SampleConfig
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.engine import EngineOptions
from mesh_transformer.sample.engine.requests import RequestParams
from mesh_transformer.sample.engine.warmup import warm_up

CONFIG = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=64, seq_len=1024)


@pytest.fixture(scope="module")
def params():
    return jax.jit(make_model(CONFIG).init)(jax.random.key(0))


def generate(engine, length, max_tokens, top_logprobs=0):
    """Generate one sample, as the server does, for a prompt with a first token of its own."""
    params = RequestParams(SampleConfig(), max_tokens=max_tokens, seed=length, top_logprobs=top_logprobs)
    request = engine.submit(engine.make_request([length % 64] * length, params))
    while not engine.idle:
        engine.step()
    return request.tokens


@pytest.mark.parametrize(("max_len", "lengths"), [(240, (1, 16, 17, 60, 100, 210)), (496, (3, 33, 129, 250, 300, 466))])
def test_requests_compile_nothing(params, max_len, lengths):
    cold, warm = (DecoderOnlyEngine(CONFIG, params, EngineOptions(prefill_chunk=128)) for _ in range(2))
    steps = list(warm_up(warm, max_len))
    assert [done for done, _ in steps] == list(range(steps[0][1]))
    assert warm.idle
    assert (warm.prefix_cache.nbytes, warm.prefix_cache.reused_tokens) == (0, 0)
    before = warm.compilations
    for length in lengths:
        for top_logprobs in (0, 5):
            max_tokens = min(max_len - length, 30)
            assert generate(warm, length, max_tokens, top_logprobs) == generate(cold, length, max_tokens, top_logprobs)
    assert warm.compilations == before
    assert sum(before.values()) > 8
    generate(warm, max_len + 40, 3)
    assert warm.compilations != before, "longer requests are not part of the warm-up"


def test_a_conversation_compiles_nothing(params):
    """Every turn extends the prompt of the previous one."""
    engine = DecoderOnlyEngine(CONFIG, params)
    list(warm_up(engine, 496))
    before, prompt = engine.compilations, list(range(30))
    for turn in range(5):
        prompt += continue_prompt(engine, prompt) + [turn] * (40 + 7 * turn)
    assert engine.prefix_cache.reused_tokens > 200
    assert engine.compilations == before


def continue_prompt(engine, prompt):
    [[done]] = engine.generate([prompt], SampleConfig(), max_tokens=20)
    return done.tokens


def test_no_warm_up_compiles_nothing(params):
    engine = DecoderOnlyEngine(CONFIG, params)
    assert list(warm_up(engine, 0)) == []
    assert engine.compilations == {}
