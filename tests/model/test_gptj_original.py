# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Ours = the original's own GPT-J layers: a checkpoint in its v1 format, and the losses it computed from it itself.

The reader here is the smallest that makes the point: 16 pieces of leaves in order, one folder for each shard.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.transformer import make_model

FIXTURE = Path(__file__).parents[2].parent / "shared" / "fixtures" / "gptj_v1_4shards"
pytestmark = pytest.mark.skipif(
    not FIXTURE.exists(), reason="the original's fixtures are not on this machine (../shared/fixtures)"
)


@pytest.fixture(scope="module")
def config():
    old = json.loads((FIXTURE / "config.json").read_text())
    return ModelConfig(
        n_layers=old["layers"],
        d_model=old["d_model"],
        n_heads=old["n_heads"],
        n_vocab=old["n_vocab"],
        seq_len=old["seq"],
        positions="rotary-pairs",
        rotary_dims=old["pe_rotary_dims"],
        residual="parallel",
        qkv_bias=False,
        attention_out_bias=False,
        head_bias=True,
        tied_embeddings=False,
    )


def read_leaves(folder: Path) -> list[np.ndarray]:
    """Every leaf of the checkpoint in order, with the shards stacked in front."""
    shards = []
    for shard in range(4):
        leaves = []
        for piece in range(16):
            with np.load(folder / f"shard_{shard}" / f"{piece}.npz") as file:
                leaves += [file[f"arr_{i}"] for i in range(len(file.files))]
        shards.append([(x.view(ml_dtypes.bfloat16) if x.dtype.str == "|V2" else x) for x in leaves])
    return [np.stack([np.asarray(x, np.float32) for x in leaf]) for leaf in zip(*shards, strict=True)]


def beside(x: np.ndarray) -> np.ndarray:  # shards hold columns
    return np.concatenate(list(x), axis=-1)


def above(x: np.ndarray) -> np.ndarray:  # shards hold rows
    return np.concatenate(list(x), axis=0)


def first(x: np.ndarray) -> np.ndarray:  # only the first shard's norm is used
    return x[0]


def total(x: np.ndarray) -> np.ndarray:  # every shard adds its bias
    return x.sum(0)


LAYER = [  # in the order of sorted names: linear, linear_1 .. linear_5, replicated_layer_norm
    ("attention", "w_q", beside),
    ("attention", "w_v", beside),  # v before k
    ("attention", "w_k", beside),
    ("attention", "w_o", above),
    ("feed_forward", "b_in", beside),
    ("feed_forward", "w_in", beside),
    ("feed_forward", "b_out", total),
    ("feed_forward", "w_out", above),
    ("norm_1", "bias", first),
    ("norm_1", "scale", first),
]


def import_params(leaves: list[np.ndarray], config: ModelConfig):
    per_layer = len(LAYER)
    assert len(leaves) == 2 + per_layer * config.n_layers + 4
    order = sorted(range(config.n_layers), key=lambda layer: f"layer_{layer}")
    assert order != sorted(order)  # layer_10 comes before layer_2
    shapes = jax.eval_shape(make_model(config).init, jax.random.key(0))
    block = "transformer/layers/block_0"
    params = {module: dict(arrays) for module, arrays in shapes.items()}
    for i, (module, name, merge) in enumerate(LAYER):
        rows = [merge(leaves[2 + per_layer * order.index(layer) + i]) for layer in range(config.n_layers)]
        params[f"{block}/{module}"][name] = np.stack(rows).reshape(shapes[f"{block}/{module}"][name].shape)
    head_b, head_w, norm_bias, norm_scale = leaves[-4:]
    params["transformer"] = {
        "w_tokens": above(leaves[1]) + total(leaves[0]),
        "w_head": beside(head_w),
        "b_head": beside(head_b),
    }
    params["transformer/norm_out"] = {"bias": first(norm_bias), "scale": first(norm_scale)}
    jax.tree.map(
        lambda array, shape: array.shape == shape.shape or pytest.fail(f"{array.shape} for {shape.shape}"),
        params,
        shapes,
    )
    return params


@pytest.mark.parametrize("kind", ["full", "slim"])
def test_losses_equal_the_originals(kind, config):
    leaves = read_leaves(FIXTURE / kind / "step_1234")
    if kind == "full":  # count, mu, nu, count, then the weights
        n = (len(leaves) - 3) // 3
        leaves = leaves[2 + 2 * n :]
    assert leaves.pop().max() == 1234  # the step
    params = import_params(leaves, config)
    expected = np.load(FIXTURE / "expected.npz")
    tokens = jnp.asarray(expected["tokens"], jnp.int32)
    logits, _ = jax.jit(make_model(config).apply)(params, tokens[:, :-1])
    targets = tokens[:, 1:, None]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)[..., 0]
    wanted = expected[f"{kind}_token_loss"]
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(losses, wanted, atol=1e-5, rtol=0)
    correct = jnp.take_along_axis(logits, targets, axis=-1)[..., 0] == logits.max(-1)
    np.testing.assert_array_equal(correct, expected[f"{kind}_correct"])
