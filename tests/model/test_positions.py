# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Position encodings, compared with transformers and with the numbers of the papers."""

import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.rope import RopeScalingConfig
from mesh_transformer.model.positions import (
    alibi_slopes,
    apply_rope,
    falcon_alibi,
    make_rotation,
    rope_frequencies,
    t5_buckets,
)

# First distance of every T5 bucket from 16 on: ceil(16 * 8**(k / 16)).
FIRST_OF_BUCKET = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]


def test_first_distance_of_each_t5_bucket():
    buckets = np.asarray(t5_buckets(jnp.arange(-3, 300), make_config(positions="t5")))
    assert list(buckets[:3]) == [0, 0, 0]  # the future, which is masked anyway
    buckets = buckets[3:]
    assert list(buckets[:16]) == list(range(16))
    assert [int(np.argmax(buckets == 16 + k)) for k in range(16)] == FIRST_OF_BUCKET
    assert buckets.max() == 31


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 200), (64, 1000)])
@pytest.mark.parametrize("causal", [True, False])
def test_t5_buckets_equal_transformers(buckets, max_distance, causal):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = np.arange(-20, 2100)
    expected = t5.T5Attention._relative_position_bucket(
        torch.tensor(-distance), bidirectional=not causal, num_buckets=buckets, max_distance=max_distance
    )
    config = make_config(positions="t5", causal=causal, t5_buckets=buckets, t5_max_distance=max_distance)
    np.testing.assert_array_equal(np.asarray(t5_buckets(jnp.asarray(distance), config)), expected.numpy())


SLOPES = {  # exponents of 1/2: those of the paper for 8 heads, and its rule for other numbers of heads
    4: [2, 4, 6, 8],
    8: [1, 2, 3, 4, 5, 6, 7, 8],
    6: [2, 4, 6, 8, 1, 3],
    12: [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5],
}


@pytest.mark.parametrize("n_heads", SLOPES)
def test_alibi_slopes_equal_the_papers(n_heads):
    np.testing.assert_allclose(alibi_slopes(n_heads), 0.5 ** np.array(SLOPES[n_heads]), rtol=1e-6)


@pytest.mark.parametrize("n_heads", [1, 4, 6, 12])
def test_alibi_slopes_equal_transformers(n_heads):
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    bias = bloom.build_alibi_tensor(torch.ones((1, 5)), n_heads, torch.float32)  # slope x position of the key
    np.testing.assert_allclose(alibi_slopes(n_heads)[:, None] * np.arange(5), bias[:, 0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("n_heads", [1, 4, 6, 12])
def test_falcon_alibi_equals_transformers(n_heads):
    torch = pytest.importorskip("torch")
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    length = 700  # bfloat16 represents not every integer above 256
    expected = falcon.build_alibi_tensor(torch.ones((1, length), dtype=torch.int64), n_heads, torch.float32)[:, 0] / 2
    config = make_config(positions="falcon-alibi", n_heads=n_heads, d_head=4)
    found = np.asarray(falcon_alibi(jnp.arange(length)[None], config))[0]
    assert np.abs(found - alibi_slopes(n_heads)[:, None] * np.arange(length) / 2).max() > 1e-3
    np.testing.assert_array_equal(found, expected.numpy())


def rotate(x, positions, config):
    return apply_rope(x, make_rotation(positions, None, config), config)


def make_config(**choices) -> ModelConfig:
    return ModelConfig(**{"n_layers": 1, "d_model": 16, "n_heads": 2, "n_vocab": 9, "seq_len": 8, **choices})


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_complex_multiplication(interleaved):
    """Channels (a, b) times e^(i p theta), theta = base^(-2j/r)."""
    config = make_config(positions="rope-interleaved" if interleaved else "rope-half", rope_dims=6)
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    positions = np.array([[0, 7, 2000]], np.int32)
    rotated = np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions), config))
    first, second = (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., :3], x[..., 3:6])
    product = (first + 1j * second) * np.exp(1j * positions[..., None, None] * 10_000.0 ** (-np.arange(3) / 3))
    expected = x.copy()
    if interleaved:
        expected[..., 0:6:2], expected[..., 1:6:2] = product.real, product.imag
    else:
        expected[..., :3], expected[..., 3:6] = product.real, product.imag
    assert np.abs(expected - x).max() > 0.1
    # At position 2000, rounding the angle to float32 costs 2000 * 6e-8.
    np.testing.assert_allclose(rotated, expected, atol=5e-4)
    np.testing.assert_allclose(rotated[:, :2], expected[:, :2], atol=2e-6)
    np.testing.assert_array_equal(rotated[..., 6:], x[..., 6:])


def test_rotation_makes_scores_depend_on_distance_alone():
    config = make_config(positions="rope-half")
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 2, 8)).astype(np.float32)

    def score(at_q, at_k):
        q_rotated = rotate(jnp.asarray(q), jnp.array([[at_q]]), config)
        k_rotated = rotate(jnp.asarray(k), jnp.array([[at_k]]), config)
        return np.sum(np.asarray(q_rotated * k_rotated), axis=-1)

    assert np.abs(score(9, 4) - score(9, 5)).max() > 1e-2
    np.testing.assert_allclose(score(9, 4), score(105, 100), atol=2e-5)


def test_rotation_keeps_dtype():
    x = jnp.ones((1, 2, 2, 8), jnp.bfloat16)
    assert rotate(x, jnp.array([[0, 1]]), make_config(positions="rope-interleaved")).dtype == jnp.bfloat16


SCALINGS = {  # native fields, and the rope_parameters of transformers
    "linear": (dict(factor=3.0), dict(factor=3.0)),
    "dynamic": (dict(factor=2.0, original_seq_len=16), dict(factor=2.0)),
    "llama3": (
        dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_seq_len=16),
        dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "yarn": (dict(factor=4.0, original_seq_len=16), dict(factor=4.0, original_max_position_embeddings=16)),
    "yarn-mscale": (
        dict(factor=4.0, original_seq_len=16, beta_fast=4.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=0.4),
        dict(
            factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=0.4
        ),
    ),
    "yarn-exact": (
        dict(factor=4.0, original_seq_len=64, truncate=False, attention_factor=0.8, beta_fast=8.0),
        dict(factor=4.0, original_max_position_embeddings=64, truncate=False, attention_factor=0.8, beta_fast=8.0),
    ),
    "longrope": (
        dict(
            short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(1.5, 2.0, 4.0, 9.0), original_seq_len=16, attention_factor=1.19
        ),
        dict(
            short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 2.0, 4.0, 9.0], original_max_position_embeddings=16,
            attention_factor=1.19,
        ),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [16, 33])
def test_scaled_rotation_equals_transformers(name, length):
    """Cosine and sine of all positions of a sequence of this length; "dynamic" with model.seq_len of that length."""
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    native, external = SCALINGS[name]
    kind = name.partition("-")[0]
    parameters = external | {"rope_type": kind, "rope_theta": 500.0}
    sizes = dict(hidden_size=16, num_attention_heads=2, max_position_embeddings=16 if kind == "dynamic" else 64)
    embedding = llama.LlamaRotaryEmbedding(llama.LlamaConfig(**sizes, rope_parameters=parameters))
    cos, sin = embedding(torch.zeros(1, length, 16), torch.arange(length)[None])
    seq_len = max(length, 16) if kind == "dynamic" else 64
    scaling = RopeScalingConfig(type=kind, **native)
    config = make_config(positions="rope-half", rope_theta=500.0, rope_scaling=scaling, seq_len=seq_len)
    rotation = make_rotation(jnp.arange(length)[None], None, config)
    unscaled = make_rotation(jnp.arange(length)[None], None, make_config(positions="rope-half", rope_theta=500.0))
    if not (kind == "dynamic" and length == 16):
        assert np.abs(rotation.cos - unscaled.cos).max() > 0.05
    np.testing.assert_allclose(rotation.cos, cos[..., :4], atol=1e-5)
    np.testing.assert_allclose(rotation.sin, sin[..., :4], atol=1e-5)


def test_longrope_depends_on_the_length_that_each_sequence_reaches():
    scaling = RopeScalingConfig(type="longrope", **SCALINGS["longrope"][0])
    config = make_config(positions="rope-half", rope_scaling=scaling, seq_len=64)
    positions = jnp.broadcast_to(jnp.arange(4), (3, 4)) + jnp.array([[0], [13], [0]])  # 4, 17 and 4 tokens
    cos = np.asarray(make_rotation(positions, None, config).cos)
    short, long = (
        1.19 * np.cos(np.asarray(positions)[..., None] * rope_frequencies(config, is_long=is_long))
        for is_long in (False, True)
    )
    assert np.abs(short - long).max() > 0.1
    np.testing.assert_allclose(cos[:2], np.stack([short[0], long[1]]), atol=1e-5)
    told = make_rotation(positions, jnp.array([17, 16, 16]), config).cos
    np.testing.assert_allclose(told, np.stack([long[0], short[1], short[2]]), atol=1e-5)


def test_local_layers_may_have_a_base_of_their_own():
    config = make_config(
        positions="rope-half",
        rope_theta=500.0,
        rope_local_theta=10.0,
        attention_pattern=("local",),
        rope_scaling=RopeScalingConfig(type="linear", factor=4.0),
    )
    np.testing.assert_allclose(rope_frequencies(config, local=True), 10.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(rope_frequencies(config), 500.0 ** (-np.arange(4) / 4) / 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(type="linear"), 'type="linear" requires factor'),
        (dict(type="linear", factor=2.0, original_seq_len=8), "original_seq_len=8 has no effect"),
        (dict(factor=2.0, low_freq_factor=4.0, high_freq_factor=1.0, original_seq_len=8), "must be less than"),
        (
            dict(type="longrope", short_factor=(1.0,), long_factor=(1.0,), original_seq_len=8),
            "requires attention_factor",
        ),
    ],
)
def test_wrong_scalings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScalingConfig(**fields)


def test_rope_fields_without_effect_are_refused():
    for fields, message in (
        (dict(rope_pattern=(True, False)), r"rope_pattern=\[true, false\] has no effect"),
        (dict(positions="rope-half", rope_local_theta=10.0), "rope_local_theta=10.0 has no effect"),
        (
            dict(
                positions="rope-half",
                rope_dims=4,
                rope_scaling=RopeScalingConfig(type="longrope", **SCALINGS["longrope"][0]),
            ),
            "short_factor has 4 elements and long_factor has 4; each must have 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(**fields)
