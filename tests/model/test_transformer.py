# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""One function however it is computed: scanned, unrolled, recomputed, packed, in bfloat16; causal, and initialised as said."""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import RULES
from mesh_transformer.model.attention.dense import dense_attention, dense_attention_in_blocks
from mesh_transformer.model.linear import dropout
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.transformer import make_model
from mesh_transformer.model.shapes import count_params, describe_params

# Compiles in half the time; what is computed is the same.
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
    """Every array within `tolerance` of its largest entry (a key's bias, whose gradient is rounding alone, of the query's)."""
    wanted = flatten_names(wanted)
    for key, value in flatten_names(found).items():
        scale = np.abs(wanted[key.replace("/b_k", "/b_q")]).max()
        assert scale > 0, key
        np.testing.assert_allclose(value, wanted[key], atol=tolerance * scale, rtol=0, err_msg=key)


# How it is computed
PLAIN = make_config(attention_pattern=("global", "local"), attention_window=3)


@pytest.fixture(scope="module")
def plain():
    params = draw_params(PLAIN)
    return params, jax.jit(make_loss(PLAIN), compiler_options=QUICK)(params, TOKENS, TARGETS)


@pytest.mark.parametrize(
    "choice", [dict(scan_unroll=2), *(dict(remat=name) for name in ("full", "dots", "attention"))], ids=str
)
def test_unrolled_and_recomputed_equal_scanned(plain, choice):
    params, (loss, gradients) = plain
    other = dataclasses.replace(PLAIN, **choice)
    programs = [str(jax.make_jaxpr(make_loss(config))(params, TOKENS, TARGETS)) for config in (PLAIN, other)]
    assert programs[0] != programs[1]
    assert (
        "unroll=2" in programs[1]
        if "scan_unroll" in choice
        else programs[1].count("remat") > programs[0].count("remat")
    )
    assert describe_params(other) == describe_params(PLAIN)
    other_loss, other_gradients = jax.jit(make_loss(other), compiler_options=QUICK)(params, TOKENS, TARGETS)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    assert_close(other_gradients, gradients, 1e-5)


def test_offloading_needs_a_host_beside_the_device():
    with pytest.raises(ConfigError, match=r'remat = "offload" needs a GPU or TPU .*use "full"'):
        jax.make_jaxpr(make_loss(dataclasses.replace(PLAIN, remat="offload")))(draw_params(PLAIN), TOKENS, TARGETS)


# What depends on what
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3]])
PLACES = np.arange(T)
DISTANCE = PLACES[:, None] - PLACES[None]


@pytest.mark.parametrize(
    ("choices", "segments", "seen"),
    [
        (dict(n_layers=1), None, DISTANCE >= 0),
        (dict(n_layers=1, attention_pattern=("local",), attention_window=3), None, (DISTANCE >= 0) & (DISTANCE < 3)),
        # A second layer sees what the first one saw: a window less one more.
        (
            dict(n_layers=2, attention_pattern=("local",), attention_window=3, positions="alibi"),
            None,
            (DISTANCE >= 0) & (DISTANCE < 5),
        ),
        (dict(n_layers=2, positions="t5"), SEGMENTS, (DISTANCE >= 0) & (SEGMENTS.T == SEGMENTS)),
    ],
    ids=["global", "local", "two local", "segments"],
)
def test_gradients_prove_what_a_place_depends_on(choices, segments, seen):
    """Every token occurs once, so its row of the table is its place: logits at t depend on place s exactly where seen."""
    config = make_config(**choices)
    params = draw_params(config)
    tokens = jnp.arange(T)[None]
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(1, V)), jnp.float32)

    def score(table):
        changed = params | {"transformer": params["transformer"] | {"w_tokens": table}}
        logits, _ = make_model(config).apply(
            changed, tokens, segments=None if segments is None else jnp.asarray(segments)
        )
        return jnp.sum(logits[0] * weights, axis=-1)

    jacobian = np.asarray(jax.jit(jax.jacrev(score), compiler_options=QUICK)(params["transformer"]["w_tokens"]))[:, :T]
    np.testing.assert_array_equal(np.abs(jacobian).max(-1) > 0, seen)


@pytest.mark.parametrize("positions", ["learned", "rope-interleaved", "alibi"])
def test_packed_documents_equal_separate_ones(positions):
    config = make_config(positions=positions, n_layers=2, attention_pattern=("global", "local"), attention_window=2)
    params, apply = draw_params(config), jax.jit(make_model(config).apply, compiler_options=QUICK)
    restarting = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]])
    packed, _ = apply(params, TOKENS[:1], segments=jnp.array([[1] * 3 + [2] * 5]), positions=restarting)
    mixed, _ = apply(params, TOKENS[:1], segments=jnp.array([[1] * 8]), positions=restarting)
    assert np.abs(packed - mixed)[:, 3:].max() > 1e-2  # without segments the second document sees the first
    alone, _ = apply(
        params, jnp.pad(TOKENS[:1, 3:], ((0, 0), (0, 3))), segments=jnp.ones((1, 8), jnp.int32), positions=None
    )
    np.testing.assert_allclose(packed[:, :3], mixed[:, :3], atol=2e-6)
    np.testing.assert_allclose(packed[:, 3:], alone[:, :5], atol=1e-5)


def test_logits_at_scores_one_place():
    config = make_config(n_layers=1)
    params, apply = draw_params(config), jax.jit(make_model(config).apply, compiler_options=QUICK)
    every, _ = apply(params, TOKENS)
    some, _ = apply(params, TOKENS, logits_at=jnp.array([5, 2]))
    assert some.shape == (B, 1, V)
    np.testing.assert_allclose(some[:, 0], every[jnp.arange(B), jnp.array([5, 2])], atol=1e-5)


def test_row_with_nothing_to_see_is_finite():
    q, k, v = jnp.asarray(np.random.default_rng(3).normal(size=(3, 1, 2, 4, 4)), jnp.float32)
    visible = jnp.array([[[False, False], [True, False]]])

    def total(q, k, v):
        mixed = dense_attention(q, k, v, visible, None, scale=0.5)
        return jnp.sum(mixed**2), mixed

    gradients, mixed = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    assert all(bool(jnp.isfinite(x).all()) for x in (mixed, *gradients))
    np.testing.assert_allclose(mixed[:, 1], v[:, 0], atol=1e-6)  # the one key it sees


# Dropout
def test_dropout_needs_a_key_and_follows_it():
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
    assert set(np.unique(sums)) == {0.0, 2.0, 4.0}  # 2: kept by one layer and not by the other


# Numbers
def walk(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from walk(inner)


def test_bfloat16_keeps_statistics_softmax_and_logits_in_float32():
    config = make_config(dtype="bfloat16", head_bias=True)
    params = draw_params(config)
    equations = list(walk(jax.make_jaxpr(make_model(config).apply)(params, TOKENS).jaxpr))

    def inputs(name: str) -> set[str]:
        return {str(v.aval.dtype) for equation in equations if equation.primitive.name == name for v in equation.invars}

    assert inputs("exp") == inputs("rsqrt") == inputs("reduce_sum") == inputs("reduce_max") == {"float32"}
    products = [equation for equation in equations if equation.primitive.name == "dot_general"]
    assert {str(v.aval.dtype) for equation in products for v in equation.invars} == {"bfloat16"}
    widths = {equation.outvars[0].aval.shape[-1]: str(equation.outvars[0].aval.dtype) for equation in products}
    assert widths[V] == "float32"  # scores of the vocabulary are never rounded to bfloat16
    assert widths[24] == "bfloat16"


def test_bfloat16_is_close_to_float32():
    config = make_config(n_layers=2)
    params = draw_params(config)
    wide, narrow = (
        jax.jit(make_model(dataclasses.replace(config, dtype=dtype)).apply, compiler_options=QUICK)(params, TOKENS)[0]
        for dtype in ("float32", "bfloat16")
    )
    assert narrow.dtype == jnp.float32
    assert 0 < np.abs(narrow - wide).max() < 0.05 * np.abs(wide).max()


def test_bfloat16_gradients_of_shared_arrays_add_up_in_float32():
    """4,096 uses of one token, place and bias: added up in bfloat16, the gradient would stop growing after some hundred."""
    config = make_config(n_layers=1, positions="learned")
    params = draw_params(config)
    params = {
        module: {leaf: x if leaf != "w_positions" else x * 0 for leaf, x in leaves.items()}
        for module, leaves in params.items()
    }
    tokens = jnp.full((512, T), 3, jnp.int32)
    wide, narrow = (
        jax.jit(make_loss(dataclasses.replace(config, dtype=dtype)), compiler_options=QUICK)(params, tokens, tokens)[1]
        for dtype in ("float32", "bfloat16")
    )
    wide, narrow = flatten_names(wide), flatten_names(narrow)
    for key in ("w_tokens", "w_positions", "layers/block_0/attention/b_o", "layers/block_0/feed_forward/b_in"):
        wanted, found = wide[f"transformer/{key}"], narrow[f"transformer/{key}"]
        assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted), key


# What is learned
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
    "plain": dict(positions="none", norm_bias=False, ff_bias=False),
}


@pytest.mark.parametrize("name", CHOICES)
def test_description_equals_what_is_made(name):
    config = make_config(**CHOICES[name])
    described, made = flatten_names(describe_params(config)), flatten_names(make_params(config))
    assert described.keys() == made.keys()
    for key, info in described.items():
        assert (info.shape, jnp.float32) == (made[key].shape, made[key].dtype), key
        assert set(info.axes) <= RULES.keys(), key
        assert (info.axes[:1] == ("layers",)) == ("/layers/" in key), key
    assert count_params(config) == sum(x.size for x in made.values())
    assert ("transformer/w_head" in made) != config.tied_embeddings
    assert all("~" not in key for key in made)  # names are for checkpoints


L, D, W = 3, 64, 512  # layers, width, vocabulary
INITS = {  # deviation of: token table, place table, inner weights, residual weights; truncated at two deviations
    "gpt2": (0.02, 0.01, 0.02, 0.02 / (2 * L) ** 0.5, False),
    "gptj": (W**-0.5, 0.02, D**-0.5, 2 / L / D**0.5, True),
    "neox": ((2 / (5 * D)) ** 0.5, (2 / (5 * D)) ** 0.5, (2 / (5 * D)) ** 0.5, 2 / L / D**0.5, False),
}


@pytest.mark.parametrize("name", INITS)
def test_weights_start_as_stated(name):
    config = make_config(
        n_layers=L, d_model=D, n_vocab=W, seq_len=128, d_ff=256, positions="learned", init=name, head_bias=True
    )
    made = flatten_names(make_params(config))
    table, places, inner, residual, truncated = INITS[name]
    deviations = dict(w_tokens=table, w_positions=places, w_out=residual, w_o=residual)
    deviations |= dict.fromkeys(("w_head", "w_in", "w_q", "w_k", "w_v"), inner)
    for key, value in made.items():
        leaf = key.split("/")[-1]
        if leaf not in deviations:
            np.testing.assert_array_equal(value, 1.0 if leaf == "scale" else 0.0, err_msg=key)
            continue
        cut = truncated and leaf != "w_positions"
        # A normal distribution cut at two deviations has 0.8796 of its deviation.
        np.testing.assert_allclose(np.std(value), deviations[leaf] * (0.8796 if cut else 1.0), rtol=0.03, err_msg=key)
        assert (np.abs(value).max() <= 2 * deviations[leaf]) == cut, key
        if "/layers/" in key:
            assert np.abs(np.corrcoef(value[0].ravel(), value[1].ravel())[0, 1]) < 0.1, f"{key}: layers start alike"


@pytest.mark.parametrize("bias", [False, True])
def test_attention_in_blocks_equals_attention_at_once(bias):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 8, 4, 3))
    k, v = (jax.random.normal(key, (2, 8, 2, 3)) for key in keys[1:3])
    visible = jnp.tril(jnp.ones((1, 8, 8), bool)) & ~jnp.tril(jnp.ones((1, 8, 8), bool), -6)
    scores = jax.random.normal(keys[3], (1, 4, 8, 8)) if bias else None
    whole = dense_attention(q, k, v, visible, scores, scale=0.7)
    assert not np.allclose(whole, dense_attention(q, k, v, jnp.ones_like(visible), scores, scale=0.7), atol=1e-2)
    np.testing.assert_allclose(dense_attention_in_blocks(q, k, v, visible, scores, n_blocks=4, scale=0.7), whole, atol=1e-6)
