# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Latent attention with a cache of latent vectors equals attention without one; absorbed equals expanded, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import MeshConfig, ModelConfig, SampleConfig
from mesh_transformer.config.latent_attention import LatentAttentionConfig
from mesh_transformer.mesh import make_layout, use_layout
from mesh_transformer.model.attention import latent
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import describe_params, init_cache
from mesh_transformer.model.transformer import make_model
from mesh_transformer.plan.estimate import describe_model
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.engine import EngineOptions
from mesh_transformer.train.optimizer import is_matrix

SIZES = LatentAttentionConfig(kv_rank=10, q_rank=6, d_unrotated=4, d_rotated=2, d_value=3)
CONFIG = ModelConfig(
    n_layers=2, d_model=16, n_heads=4, n_vocab=24, seq_len=32, d_ff=20, positions="rope-interleaved", norm="rmsnorm",
    latent_attention=SIZES,
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 24, (4, 32)), jnp.int32)


def draw_params(config: ModelConfig):
    rng = np.random.default_rng(0)
    return {
        module: {leaf: jnp.asarray(0.5 * rng.normal(size=info.shape), jnp.float32) for leaf, info in infos.items()}
        for module, infos in describe_params(config).items()
    }


@pytest.mark.parametrize("absorbed", [False, True])
def test_cached_equals_full(absorbed, monkeypatch):
    monkeypatch.setattr(latent, "_absorbing_is_cheaper", lambda *sizes: absorbed)
    params, model = draw_params(CONFIG), make_model(CONFIG)
    full, _ = model.apply(params, TOKENS)
    cache, found = init_cache(CONFIG, 4, 32), []
    assert (cache[0].k.shape, cache[0].v.shape) == ((2, 4, 1, 32, 10), (2, 4, 1, 32, 2))
    for first, last in ((0, 20), (20, 21), (21, 32)):
        positions = jnp.broadcast_to(jnp.arange(first, last), (4, last - first))
        logits, cache = model.apply(params, TOKENS[:, first:last], positions=positions, cache=cache)
        found.append(logits)
    assert np.std(full) > 0.3
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), full, atol=1e-5)


def test_decoding_absorbs_and_long_prefills_expand():
    published = LatentAttentionConfig(kv_rank=512, q_rank=1536, d_unrotated=128, d_rotated=64, d_value=128)
    assert latent._absorbing_is_cheaper(1, 4096, published)
    assert not latent._absorbing_is_cheaper(4096, 4096, published)


def test_blockwise_kernel_pads_the_values():
    params = draw_params(CONFIG)
    wanted, found = (
        jax.jit(make_model(dataclasses.replace(CONFIG, attention_kernel=kernel)).apply)(params, TOKENS)[0]
        for kernel in ("dense", "blockwise")
    )
    assert not np.array_equal(wanted, found), "the same kernel ran twice"
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_projections_are_matrices_of_the_optimizer():
    infos = describe_model(CONFIG)
    matrices = {name.rpartition("/")[2] for name, info in infos.items() if is_matrix(info.axes) and "attention" in name}
    assert matrices == {"w_q_down", "w_q_up", "w_kv_down", "w_kv_up", "w_o"}


@pytest.mark.slow
def test_gradients_are_equal_on_a_mesh():
    params = draw_params(CONFIG)
    layout = make_layout(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    described = describe_params(CONFIG)
    sharded = {
        module: {k: jax.device_put(x, layout.sharding(described[module][k].axes, x.shape, k)) for k, x in own.items()}
        for module, own in params.items()
    }

    def loss(params, layout=None):
        with use_layout(layout):
            return jnp.mean(jnp.square(make_model(CONFIG).apply(params, TOKENS)[0]))

    wanted, gradients = jax.jit(jax.value_and_grad(loss))(params)
    found, own = jax.jit(jax.value_and_grad(lambda params: loss(params, layout)))(sharded)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for name, gradient in flatten_names(gradients).items():
        scale = np.abs(gradient).max()
        assert scale > 0, name
        np.testing.assert_allclose(flatten_names(own)[name], gradient, atol=1e-5 * scale, rtol=0, err_msg=name)


@pytest.mark.slow
def test_engine_on_a_mesh_and_with_int8():
    params = draw_params(CONFIG)
    prompts = [[1, 2, 3, 4, 5], [7] * 11]
    options = SampleConfig(temperature=0.0)
    alone = DecoderOnlyEngine(CONFIG, params).generate(prompts, options, max_tokens=12)
    layout = make_layout(MeshConfig(data=1, tensor=2))
    sharded = DecoderOnlyEngine(CONFIG, params, layout=layout).generate(prompts, options, max_tokens=12)
    for [one], [other] in zip(alone, sharded, strict=True):
        assert other.tokens == one.tokens
        assert np.std(one.logprobs) > 1e-3, "every step has the same scores"
        np.testing.assert_allclose(other.logprobs, one.logprobs, atol=1e-4)
    narrow = EngineOptions(weight_dtype="int8", kv_cache_dtype="int8")
    [[rounded], _] = DecoderOnlyEngine(CONFIG, params, narrow).generate(prompts, options, max_tokens=12)
    np.testing.assert_allclose(rounded.logprobs[0], alone[0][0].logprobs[0], atol=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_kv_heads=2), "n_kv_heads=2 is not supported with latent_attention"),
        (
            dict(positions="learned"),
            'latent_attention requires positions="rope-interleaved" or "rope-half", not "learned"',
        ),
        (dict(attention_sinks=True), "attention_sinks=true is not supported with latent_attention"),
        (dict(n_encoder_layers=2), "decoder-only models"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
