# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What was compiled beforehand is all that a request by itself needs, and leaves no trace in what is drawn."""

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


def draw(engine, length, max_tokens, top_logprobs=0):
    """As a server does for one sample of a prompt that begins as no other."""
    row = engine.make_request([length % 64] * length, RequestParams(SampleConfig(), max_tokens=max_tokens, seed=length, top_logprobs=n_top))
    engine.submit(row)
    while not engine.idle:
        engine.step()
    return row.tokens


@pytest.mark.parametrize(("longest", "lengths"), [(240, (1, 16, 17, 60, 100, 210)), (496, (3, 33, 129, 250, 300, 466))])
def test_requests_compile_nothing(params, longest, lengths):
    cold, warm = DecoderOnlyEngine(CONFIG, params, EngineOptions(prefill_chunk=128)), DecoderOnlyEngine(CONFIG, params, EngineOptions(prefill_chunk=128))
    steps = list(warm_up(warm, longest))
    assert [done for done, _ in steps] == list(range(steps[0][1]))
    assert warm.idle
    assert (warm.prefixes.nbytes, warm.prefixes.reused_tokens) == (0, 0)
    before = warm.compilations
    for length in lengths:
        for n_top in (0, 5):
            max_tokens = min(longest - length, 30)
            assert draw(warm, length, max_tokens, n_top) == draw(cold, length, max_tokens, n_top)
    assert warm.compilations == before
    assert sum(before.values()) > 8
    draw(warm, longest + 40, 3)
    assert warm.compilations != before, "longer ones were left out"


def test_a_conversation_compiles_nothing(params):
    """Every turn begins with what was read before."""
    engine = DecoderOnlyEngine(CONFIG, params)
    list(warm_up(engine, 496))
    before, prompt = engine.compilations, list(range(30))
    for turn in range(5):
        prompt += draw_behind(engine, prompt) + [turn] * (40 + 7 * turn)
    assert engine.prefixes.reused_tokens > 200
    assert engine.compilations == before


def draw_behind(engine, prompt):
    [[done]] = engine.generate([prompt], SampleConfig(), max_tokens=20)
    return done.tokens


def test_nothing_is_compiled_for_nothing(params):
    engine = DecoderOnlyEngine(CONFIG, params)
    assert list(warm_up(engine, 0)) == []
    assert engine.compilations == {}
