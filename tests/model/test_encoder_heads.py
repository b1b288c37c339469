# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Encoder-only models with their heads: padding, shared layers, and equality across meshes, remat and dtype.

Equality with transformers is tested in tests/convert/huggingface/test_bert.py and beside it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ConfigError, MeshConfig, ModelConfig
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.mesh import make_layout, use_layout
from mesh_transformer.model.attention.ring import to_zigzag
from mesh_transformer.model.lm_head import head_matrix, lm_head
from mesh_transformer.model.shapes import count_params, describe_params
from mesh_transformer.model.transformer import make_model
from mesh_transformer.train.loss import LossOptions, chunked_cross_entropy, require_head

PAD = 1
BERT: dict[str, Any] = dict(
    n_layers=2, d_model=32, n_heads=4, n_vocab=64, seq_len=16, residual="post-norm", activation="gelu-erf",
    causal=False, embedding_norm=True, n_token_types=2, head="masked-lm", head_bias=True, pooler=True, n_labels=3,
)  # fmt: skip
CONFIG = ModelConfig(**BERT)
ALL = ModelConfig(
    **BERT | dict(d_embedding=16, shared_layers=True, position_offset=PAD + 1, position_padding_token=PAD, n_layers=3)
)
CONFIGS = pytest.mark.parametrize("config", [CONFIG, ALL], ids=["bert", "all-choices"])
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(2, 64, (8, 16), dtype=np.int32)
TYPES = RNG.integers(0, 2, (8, 16), dtype=np.int32)
LENGTHS = np.array([[16], [12], [9], [3], [16], [1], [5], [8]])
IDS = (np.arange(16) < LENGTHS).astype(np.int32)
PADDED = np.where(IDS == 1, TOKENS, PAD)


def draw_params(config: ModelConfig) -> Any:
    """Return weights that are large enough for every input to affect the output."""
    rng = np.random.default_rng(1)
    return {
        module: {name: jnp.asarray(rng.normal(size=info.shape) / 3, jnp.float32) for name, info in arrays.items()}
        for module, arrays in describe_params(config).items()
    }


def encode(config: ModelConfig, tokens: Any, **inputs: Any) -> Any:
    return jax.jit(make_model(config).encode)(draw_params(config), jnp.asarray(tokens), **inputs)


@CONFIGS
def test_padding_and_the_batch_have_no_influence(config):
    found = encode(config, PADDED, segment_ids=IDS, token_types=TYPES)
    for row, (length,) in enumerate(LENGTHS):
        alone = encode(config, PADDED[row : row + 1, :length], token_types=TYPES[row : row + 1, :length])
        np.testing.assert_allclose(alone.hidden_states[0], found.hidden_states[row, :length], atol=2e-5)
        np.testing.assert_allclose(alone.class_logits[0], found.class_logits[row], atol=2e-5)
    unmasked = encode(config, PADDED, token_types=TYPES)
    assert np.abs(unmasked.class_logits - found.class_logits)[1:4].max() > 1e-3


def test_positions_of_a_padding_token_number_the_others():
    left = np.concatenate([np.full((8, 3), PAD, np.int32), TOKENS], axis=1)[:, :16]
    ids = np.where(left == PAD, 0, 1)
    found = encode(ALL, left, segment_ids=ids).hidden_states[:, 3:]
    np.testing.assert_allclose(found, encode(ALL, TOKENS[:, :13]).hidden_states, atol=2e-5)
    other = dataclasses.replace(ALL, position_padding_token=None, position_offset=0)
    moved = encode(other, left, segment_ids=ids).hidden_states[:, 3:]
    assert np.abs(moved - encode(other, TOKENS[:, :13]).hidden_states).max() > 1e-2
    assert describe_params(ALL)["transformer"]["w_positions"].shape == (16 + PAD + 1, 16)


def test_shared_layers_equal_equal_layers():
    separate = dataclasses.replace(ALL, shared_layers=False)
    shared = draw_params(ALL)
    copies = {
        module: {name: jnp.tile(x, (3, *[1] * (x.ndim - 1))) for name, x in arrays.items()}
        if "/layers/" in module
        else arrays
        for module, arrays in shared.items()
    }
    assert count_params(ALL) < count_params(separate)
    found, expected = (make_model(c).encode(p, jnp.asarray(TOKENS)) for c, p in ((ALL, shared), (separate, copies)))
    np.testing.assert_allclose(found.hidden_states, expected.hidden_states, atol=1e-5)


def loss(config: ModelConfig, params: Any, tokens: Any) -> jax.Array:
    """Return a loss that reads all outputs: masked-LM cross entropy at some tokens, and the class logits."""
    model = make_model(config)
    inputs = dict(segment_ids=jnp.asarray(IDS), token_types=jnp.asarray(TYPES))
    x, _ = model.hidden_states(params, tokens, **inputs)
    head = lm_head(params, config)
    targets, mask = to_zigzag(jnp.asarray(TOKENS)), to_zigzag(jnp.asarray(IDS * (np.arange(16) % 3 == 0), jnp.float32))
    options = LossOptions(config, 1e-4, 1)
    total: Any = chunked_cross_entropy(x, head_matrix(head, config), head.b, targets, mask, options)
    class_logits: Any = model.encode(params, tokens, **inputs).class_logits
    return total[0] / 40 + jnp.mean(jnp.square(class_logits))


def gradients(config: ModelConfig, mesh: MeshConfig | None = None):
    params = draw_params(config)
    layout = None
    if mesh is not None:
        layout = make_layout(mesh, jax.devices()[:8])
        shardings = {
            module: {name: layout.sharding(info.axes, info.shape, name) for name, info in arrays.items()}
            for module, arrays in describe_params(config).items()
        }
        params = jax.device_put(params, shardings)

    def run(params: Any, tokens: Any):
        with use_layout(layout):
            return jax.value_and_grad(lambda p: loss(config, p, tokens))(params)

    return jax.tree.map(np.asarray, jax.jit(run)(params, jnp.asarray(PADDED)))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    assert abs(found[0] - expected[0]) <= tolerance * abs(expected[0])
    for module, arrays in expected[1].items():
        for name, value in arrays.items():
            scale = max(np.abs(value).max(), 1e-2)  # the gradients of key biases are zero but for rounding
            np.testing.assert_allclose(
                found[1][module][name], value, atol=tolerance * scale, err_msg=f"{module}/{name}"
            )


@pytest.mark.slow
@CONFIGS
@pytest.mark.parametrize(
    "mesh",
    [
        dict(data=8),
        dict(data=2, fsdp=2, tensor=2),
        dict(data=1, fsdp=4, tensor=2, sequence_parallel=True),
        dict(data=2, context=2, tensor=2),
        dict(data=4, expert=2),
    ],
    ids=lambda mesh: "-".join(f"{axis}{size}" for axis, size in mesh.items()),
)
def test_gradients_on_a_mesh_equal_those_of_one_device(config, mesh):
    config = dataclasses.replace(config, attention_kernel="dense")
    assert_close(gradients(config, MeshConfig(**mesh)), gradients(config), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots", "attention"])
def test_remat_does_not_change_gradients(remat):
    expected = gradients(ALL)
    assert all(np.abs(value).max() > 0 for arrays in expected[1].values() for value in arrays.values())
    assert_close(gradients(dataclasses.replace(ALL, remat=remat)), expected, 1e-5)


def test_bfloat16_is_near_float32():
    expected, found = (
        encode(dataclasses.replace(ALL, dtype=dtype), PADDED, segment_ids=IDS) for dtype in ("float32", "bfloat16")
    )
    assert found.hidden_states.dtype == jnp.bfloat16
    assert found.class_logits.dtype == jnp.float32
    difference = np.abs(found.class_logits - expected.class_logits).max() / np.abs(expected.class_logits).max()
    assert 0 < difference < 0.05


def test_context_parallelism_needs_the_dense_kernel():
    with pytest.raises(ConfigError, match=r'supports causal attention only, and model\.causal is false; use "dense"'):
        gradients(CONFIG, MeshConfig(data=4, context=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(causal=True), "n_token_types=2 requires causal=false"),
        (dict(pooler=False), "n_labels=3 requires pooler=true"),
        (dict(tied_embeddings=False), 'head="masked-lm" requires tied_embeddings=true'),
        (dict(d_embedding=16, head="lm"), 'd_embedding=16 requires head="masked-lm" or "none", not "lm"'),
        (dict(d_token_embedding=16), 'd_token_embedding=16 requires head="lm"'),
        (dict(position_padding_token=0), 'position_padding_token=0 requires positions="learned" and position_offset=1'),
        (
            dict(shared_layers=True, experts=ExpertsConfig(n_experts=2)),
            "shared_layers=true is not supported with experts",
        ),
    ],
)
def test_unsupported_choices_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**BERT | changes)


def test_a_model_without_a_head_has_no_logits():
    config = ModelConfig(**BERT | dict(head="none", head_bias=False))
    names = [f"{module}/{name}" for module, arrays in describe_params(config).items() for name in arrays]
    assert not [name for name in names if "masked_lm_head" in name or "w_head" in name]
    params = draw_params(config)
    with pytest.raises(ConfigError, match=r'model\.head="none" has no vocabulary logits'):
        make_model(config).apply(params, jnp.asarray(TOKENS))
    with pytest.raises(ConfigError, match=r'model\.head="none" computes no logits, which the loss requires'):
        require_head(config)
    plain = dataclasses.replace(config, n_token_types=None)
    with pytest.raises(ConfigError, match=r"token_types were given, but model\.n_token_types is not set"):
        encode(plain, TOKENS, token_types=TYPES)
