# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Quantized weights and KV caches: the tokens of the dequantized model, on any mesh, in less memory."""

import jax
import numpy as np
import pytest

from mesh_transformer.config import MeshConfig, ModelConfig, SampleConfig
from mesh_transformer.mesh import make_layout
from mesh_transformer.model.params import STACK
from mesh_transformer.model.quantization import dequantize, quantize
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.engine import EngineOptions
from mesh_transformer.sample.engine.weights import contracted_dims

CONFIG = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, seq_len=64, n_vocab=101)
PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7]]
GREEDY = SampleConfig(temperature=0.0)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 3 * x, jax.jit(make_model(CONFIG).init)(jax.random.key(0)))


def generate(engine):
    return [samples[0] for samples in engine.generate(PROMPTS, GREEDY, max_tokens=12)]


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def round_weights(params):
    """Return weights that were quantized to int8 and dequantized, layer by layer."""
    rounded = {}
    for module, infos in describe_params(CONFIG).items():
        for name, info in infos.items():
            array, stacked = params[module][name], info.axes[:1] == (STACK,)
            if contracted := contracted_dims(name, info.axes[stacked:]):
                array = dequantize(quantize(array, tuple(dim + stacked for dim in contracted)), "float32")
            rounded.setdefault(module, {})[name] = array
    return rounded


def test_int8_weights_equal_the_rounded_model(params):
    rounded = round_weights(params)
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, rounded)), strict=True))
    engine = DecoderOnlyEngine(CONFIG, params, EngineOptions(weight_dtype="int8"))
    assert nbytes(engine.programs.weights) < 0.45 * nbytes(
        params
    )  # norms and positions are not quantized, and the model is small
    for found, expected in zip(generate(engine), generate(DecoderOnlyEngine(CONFIG, rounded)), strict=True):
        assert found.tokens == expected.tokens
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_int8_on_a_mesh_equals_one_device(params):
    expected = generate(DecoderOnlyEngine(CONFIG, params, EngineOptions(weight_dtype="int8", kv_cache_dtype="int8")))
    layout = make_layout(MeshConfig(data=1, fsdp=2, tensor=2, rules={"vocab": ""}))
    for found, alone in zip(
        generate(
            DecoderOnlyEngine(CONFIG, params, EngineOptions(weight_dtype="int8", kv_cache_dtype="int8"), layout=layout)
        ),
        expected,
        strict=True,
    ):
        assert found.tokens == alone.tokens
        np.testing.assert_allclose(found.logprobs, alone.logprobs, atol=2e-3)


@pytest.mark.parametrize(("cache", "share", "tolerance"), [("bfloat16", 0.5, 0.03), ("int8", 0.4, 0.06)])
def test_quantized_caches_cost_little(params, cache, share, tolerance):
    plain = DecoderOnlyEngine(CONFIG, params)
    quantized = DecoderOnlyEngine(CONFIG, params, EngineOptions(kv_cache_dtype=cache))
    sizes = [nbytes(engine.programs.make_caches(1, 64)) for engine in (quantized, plain)]
    assert sizes[0] <= share * sizes[1]
    pairs = list(zip(generate(quantized), generate(plain), strict=True))
    assert any(found.logprobs != expected.logprobs for found, expected in pairs)
    for found, expected in pairs:
        np.testing.assert_allclose(found.logprobs[:3], expected.logprobs[:3], atol=tolerance)
