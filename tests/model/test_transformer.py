# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The forward pass: equality of all ways to compute it, causality, dtypes, dropout, and initial weights."""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import RULES
from mesh_transformer.model.attention.dense import count_blocks, dense_attention, dense_attention_in_blocks
from mesh_transformer.model.linear import dropout
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import count_params, describe_params
from mesh_transformer.model.transformer import make_model

# Halves the compile time.
QUICK: dict[str, bool | int | float | str] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
B, T, V = 2, 8, 16


def make_config(**choices) -> ModelConfig:
    sizes = dict(
        n_layers=4,
        d_model=16,
        n_heads=4,
        n_vocab=V,
        seq_len=T,
        d_ff=24,
        positions="rope-half",
        tied_embeddings=False,
    )
    return ModelConfig(**{**sizes, **choices})


def make_params(config: ModelConfig):
    return jax.jit(make_model(config).init, compiler_options=QUICK)(jax.random.key(0))


def draw_params(config: ModelConfig, seed: int = 0):
    rng = np.random.default_rng(seed)
    return {
        module: {leaf: jnp.asarray(0.4 * rng.normal(size=info.shape), jnp.float32) for leaf, info in infos.items()}
        for module, infos in describe_params(config).items()
    }


TOKENS, TARGETS = jnp.asarray(np.random.default_rng(1).integers(0, V, (2, B, T)), jnp.int32)


def make_loss(config: ModelConfig):
    def loss(params, tokens, targets):
        logits, _ = make_model(config).apply(params, tokens)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1))

    return jax.value_and_grad(loss)


def assert_close(found, wanted, tolerance: float) -> None:
    """Compare each array within `tolerance` of its largest entry, or of the query's bias for a key's bias (rounding)."""
    wanted = flatten_names(wanted)
    for key, value in flatten_names(found).items():
        scale = np.abs(wanted[key.replace("/b_k", "/b_q")]).max()
        assert scale > 0, key
        np.testing.assert_allclose(value, wanted[key], atol=tolerance * scale, rtol=0, err_msg=key)


# How it is computed
UNSCALED = make_config(attention_scale="none")
BASE = make_config(attention_pattern=("global", "local"), attention_window=3)


@pytest.fixture(scope="module")
def base():
    params = draw_params(BASE)
    return params, jax.jit(make_loss(BASE), compiler_options=QUICK)(params, TOKENS, TARGETS)


@pytest.mark.parametrize(
    "choice", [dict(scan_unroll=2), *(dict(remat=name) for name in ("full", "dots", "attention"))], ids=str
)
def test_unrolled_and_rematerialized_equal_scanned(base, choice):
    params, (loss, gradients) = base
    other = dataclasses.replace(BASE, **choice)
    programs = [str(jax.make_jaxpr(make_loss(config))(params, TOKENS, TARGETS)) for config in (BASE, other)]
    assert programs[0] != programs[1]
    assert (
        "unroll=2" in programs[1]
        if "scan_unroll" in choice
        else programs[1].count("remat") > programs[0].count("remat")
    )
    assert describe_params(other) == describe_params(BASE)
    other_loss, other_gradients = jax.jit(make_loss(other), compiler_options=QUICK)(params, TOKENS, TARGETS)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    assert_close(other_gradients, gradients, 1e-5)


def test_offloading_needs_an_accelerator():
    with pytest.raises(ConfigError, match=r'remat = "offload" needs a GPU or TPU .*use "full"'):
        jax.make_jaxpr(make_loss(dataclasses.replace(BASE, remat="offload")))(draw_params(BASE), TOKENS, TARGETS)


# What depends on what
SEGMENT_IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 3]])
DISTANCE = np.arange(T)[:, None] - np.arange(T)[None]


@pytest.mark.parametrize(
    ("choices", "segment_ids", "visible"),
    [
        (dict(n_layers=1), None, DISTANCE >= 0),
        (dict(n_layers=1, attention_pattern=("local",), attention_window=3), None, (DISTANCE >= 0) & (DISTANCE < 3)),
        # A second layer extends the window by window - 1.
        (
            dict(n_layers=2, attention_pattern=("local",), attention_window=3, positions="alibi"),
            None,
            (DISTANCE >= 0) & (DISTANCE < 5),
        ),
        (dict(n_layers=2, positions="t5"), SEGMENT_IDS, (DISTANCE >= 0) & (SEGMENT_IDS.T == SEGMENT_IDS)),
    ],
    ids=["global", "local", "two local", "segments"],
)
def test_logits_depend_exactly_on_the_visible_tokens(choices, segment_ids, visible):
    """Every token occurs once, so the gradient of its embedding shows which positions depend on it."""
    config = make_config(**choices)
    params = draw_params(config)
    tokens = jnp.arange(T)[None]
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(1, V)), jnp.float32)

    def score(w_tokens):
        changed = params | {"transformer": params["transformer"] | {"w_tokens": w_tokens}}
        logits, _ = make_model(config).apply(
            changed, tokens, segment_ids=None if segment_ids is None else jnp.asarray(segment_ids)
        )
        return jnp.sum(logits[0] * weights, axis=-1)

    jacobian = np.asarray(jax.jit(jax.jacrev(score), compiler_options=QUICK)(params["transformer"]["w_tokens"]))[:, :T]
    np.testing.assert_array_equal(np.abs(jacobian).max(-1) > 0, visible)


@pytest.mark.parametrize("positions", ["learned", "rope-interleaved", "alibi", "falcon-alibi"])
def test_packed_documents_equal_separate_ones(positions):
    config = make_config(positions=positions, n_layers=2, attention_pattern=("global", "local"), attention_window=2)
    params, apply = draw_params(config), jax.jit(make_model(config).apply, compiler_options=QUICK)
    restarting = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]])
    packed, _ = apply(params, TOKENS[:1], segment_ids=jnp.array([[1] * 3 + [2] * 5]), positions=restarting)
    unsegmented, _ = apply(params, TOKENS[:1], segment_ids=jnp.array([[1] * 8]), positions=restarting)
    assert (
        np.abs(packed - unsegmented)[:, 3:].max() > 1e-2
    )  # without segment IDs the second document attends to the first
    alone, _ = apply(
        params, jnp.pad(TOKENS[:1, 3:], ((0, 0), (0, 3))), segment_ids=jnp.ones((1, 8), jnp.int32), positions=None
    )
    np.testing.assert_allclose(packed[:, :3], unsegmented[:, :3], atol=2e-6)
    np.testing.assert_allclose(packed[:, 3:], alone[:, :5], atol=1e-5)


def test_logits_at_returns_one_position():
    config = make_config(n_layers=1)
    params, apply = draw_params(config), jax.jit(make_model(config).apply, compiler_options=QUICK)
    every, _ = apply(params, TOKENS)
    some, _ = apply(params, TOKENS, logits_at=jnp.array([5, 2]))
    assert some.shape == (B, 1, V)
    np.testing.assert_allclose(some[:, 0], every[jnp.arange(B), jnp.array([5, 2])], atol=1e-5)


def test_query_without_visible_keys_is_finite():
    q, k, v = jnp.asarray(np.random.default_rng(3).normal(size=(3, 1, 2, 4, 4)), jnp.float32)
    mask = jnp.array([[[False, False], [True, False]]])

    def total(q, k, v):
        out = dense_attention(0.5 * q, k, v, mask, None, UNSCALED)
        return jnp.sum(out**2), out

    gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    assert all(bool(jnp.isfinite(x).all()) for x in (out, *gradients))
    np.testing.assert_allclose(out[:, 1], v[:, 0], atol=1e-6)  # the only visible key


# Dropout
def test_dropout_needs_a_key_and_is_determined_by_it():
    config = make_config(n_layers=2, dropout=0.3)
    params, model = draw_params(config), make_model(config)
    apply = jax.jit(model.apply, compiler_options=QUICK)
    without, _ = jax.jit(make_model(dataclasses.replace(config, dropout=0.0)).apply, compiler_options=QUICK)(
        params, TOKENS
    )
    np.testing.assert_array_equal(apply(params, TOKENS)[0], without)
    one, again, other = (apply(params, TOKENS, dropout_key=jax.random.key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - without).max() > 0.1


def test_dropout_preserves_the_mean_and_differs_between_layers():
    zeroed = hk.transform(lambda x: dropout(x, 0.25)).apply({}, jax.random.key(0), jnp.ones(40_000))
    assert set(np.unique(zeroed)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(zeroed.mean()) - 1) < 0.01  # three standard deviations: 0.0087

    def stacked(x):
        layer = hk.remat(lambda x: x + dropout(jnp.ones_like(x), 0.5))
        return hk.experimental.layer_stack(2)(layer)(x)

    sums = hk.transform(stacked).apply({}, jax.random.key(0), jnp.zeros(100))
    assert set(np.unique(sums)) == {0.0, 2.0, 4.0}  # 2: dropped by exactly one of the layers


# Numbers
def walk(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from walk(inner)


def test_statistics_softmax_and_logits_are_float32_with_bfloat16():
    config = make_config(dtype="bfloat16", head_bias=True)
    params = draw_params(config)
    equations = list(walk(jax.make_jaxpr(make_model(config).apply)(params, TOKENS).jaxpr))

    def inputs(name: str) -> set[str]:
        return {str(v.aval.dtype) for equation in equations if equation.primitive.name == name for v in equation.invars}

    assert inputs("exp") == inputs("rsqrt") == inputs("reduce_sum") == inputs("reduce_max") == {"float32"}
    matmuls = [equation for equation in equations if equation.primitive.name == "dot_general"]
    assert {str(v.aval.dtype) for equation in matmuls for v in equation.invars} == {"bfloat16"}
    dtypes = {equation.outvars[0].aval.shape[-1]: str(equation.outvars[0].aval.dtype) for equation in matmuls}
    assert dtypes[V] == "float32"  # logits are never rounded to bfloat16
    assert dtypes[24] == "bfloat16"


def test_bfloat16_is_close_to_float32():
    config = make_config(n_layers=2)
    params = draw_params(config)
    float32, bfloat16 = (
        jax.jit(make_model(dataclasses.replace(config, dtype=dtype)).apply, compiler_options=QUICK)(params, TOKENS)[0]
        for dtype in ("float32", "bfloat16")
    )
    assert bfloat16.dtype == jnp.float32
    assert 0 < np.abs(bfloat16 - float32).max() < 0.05 * np.abs(float32).max()


def test_bfloat16_gradients_of_shared_parameters_are_summed_in_float32():
    """4,096 uses of one token, position and bias: summed in bfloat16, the gradient would stop growing after a few hundred."""
    config = make_config(n_layers=1, positions="learned")
    params = draw_params(config)
    params = {
        module: {leaf: x if leaf != "w_positions" else x * 0 for leaf, x in leaves.items()}
        for module, leaves in params.items()
    }
    tokens = jnp.full((512, T), 3, jnp.int32)
    float32, bfloat16 = (
        jax.jit(make_loss(dataclasses.replace(config, dtype=dtype)), compiler_options=QUICK)(params, tokens, tokens)[1]
        for dtype in ("float32", "bfloat16")
    )
    float32, bfloat16 = flatten_names(float32), flatten_names(bfloat16)
    for key in ("w_tokens", "w_positions", "layers/block_0/attention/b_o", "layers/block_0/feed_forward/b_in"):
        wanted, found = float32[f"transformer/{key}"], bfloat16[f"transformer/{key}"]
        assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted), key


# Parameters
CHOICES = {
    "gpt2": dict(positions="learned", tied_embeddings=True),
    "gptj": dict(
        positions="rope-interleaved",
        residual="parallel",
        qkv_bias=False,
        attention_out_bias=False,
        head_bias=True,
        init="gptj",
    ),
    "neox": dict(residual="parallel-two-norms", init="neox"),
    "llama": dict(
        norm="rmsnorm", gated_ffn=True, n_kv_heads=2, d_head=6, qkv_bias=False, attention_out_bias=False, ff_bias=False
    ),
    "other": dict(
        norm="scalenorm",
        positions="t5",
        attention_pattern=("global", "local"),
        gated_ffn=True,
        scan_unroll=2,
        remat="dots",
    ),
    "umt5": dict(positions="t5", t5_shared_bias=False),
    "opt-350m": dict(residual="post-norm", d_token_embedding=12),
    "no biases": dict(positions="none", norm_bias=False, ff_bias=False),
}


@pytest.mark.parametrize("name", CHOICES)
def test_described_shapes_equal_the_initial_parameters(name):
    config = make_config(**CHOICES[name])
    described = flatten_names(describe_params(config))
    made = flatten_names(make_params(config))
    assert described.keys() == made.keys()
    for key, info in described.items():
        assert (info.shape, jnp.float32) == (made[key].shape, made[key].dtype), key
        assert set(info.axes) <= RULES.keys(), key
        assert (info.axes[:1] == ("layers",)) == ("/layers/" in key), key
    assert count_params(config) == sum(x.size for x in made.values())
    assert ("transformer/w_head" in made) != config.tied_embeddings
    assert all("~" not in key for key in made)  # the names are part of the checkpoint format


L, D, W = 3, 64, 512  # layers, d_model, vocabulary
INITS = {  # standard deviation of: token embeddings, position embeddings, input weights, output weights; truncated at 2 sigma
    "gpt2": (0.02, 0.01, 0.02, 0.02 / (2 * L) ** 0.5, False),
    "gptj": (W**-0.5, 0.02, D**-0.5, 2 / L / D**0.5, True),
    "neox": ((2 / (5 * D)) ** 0.5, (2 / (5 * D)) ** 0.5, (2 / (5 * D)) ** 0.5, 2 / L / D**0.5, False),
}


@pytest.mark.parametrize("name", INITS)
def test_initial_weights_have_the_stated_deviations(name):
    config = make_config(
        n_layers=L, d_model=D, n_vocab=W, seq_len=128, d_ff=256, positions="learned", init=name, head_bias=True
    )
    made = flatten_names(make_params(config))
    tokens, positions, inputs, outputs, truncated = INITS[name]
    deviations = dict(w_tokens=tokens, w_positions=positions, w_out=outputs, w_o=outputs)
    deviations |= dict.fromkeys(("w_head", "w_in", "w_q", "w_k", "w_v"), inputs)
    for key, value in made.items():
        leaf = key.split("/")[-1]
        if leaf not in deviations:
            np.testing.assert_array_equal(value, 1.0 if leaf == "scale" else 0.0, err_msg=key)
            continue
        is_truncated = truncated and leaf != "w_positions"
        # A normal distribution truncated at 2 sigma has 0.8796 of its standard deviation.
        np.testing.assert_allclose(
            np.std(value), deviations[leaf] * (0.8796 if is_truncated else 1.0), rtol=0.03, err_msg=key
        )
        assert (np.abs(value).max() <= 2 * deviations[leaf]) == is_truncated, key
        if "/layers/" in key:
            assert np.abs(np.corrcoef(value[0].ravel(), value[1].ravel())[0, 1]) < 0.1, (
                f"{key}: the layers are correlated"
            )


@pytest.mark.parametrize("bias", [False, True])
def test_dense_attention_in_blocks_equals_dense_attention(bias):
    keys = jax.random.split(jax.random.key(0), 4)
    t = 128
    assert count_blocks(t) == 2
    q = jax.random.normal(keys[0], (2, t, 4, 3))
    k, v = (jax.random.normal(key, (2, t, 2, 3)) for key in keys[1:3])
    mask = jnp.tril(jnp.ones((1, t, t), bool)) & ~jnp.tril(jnp.ones((1, t, t), bool), -6)
    scores = jax.random.normal(keys[3], (1, 4, t, t)) if bias else None
    expected = dense_attention(0.7 * q, k, v, mask, scores, UNSCALED)
    assert not np.allclose(expected, dense_attention(0.7 * q, k, v, jnp.ones_like(mask), scores, UNSCALED), atol=1e-2)
    np.testing.assert_allclose(dense_attention_in_blocks(0.7 * q, k, v, mask, scores, UNSCALED), expected, atol=1e-6)
