# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Chunked and sharded losses equal the dense one, and logits of all tokens or of the full vocabulary never exist."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import MeshConfig, ModelConfig
from mesh_transformer.mesh import make_layout, use_layout
from mesh_transformer.train.loss import LossOptions, chunked_cross_entropy

B, T, D, V = 8, 16, 8, 96
Z = 0.1


def make_arrays():
    keys = jax.random.split(jax.random.key(0), 5)
    x, w, b = (jax.random.normal(k, s) for k, s in zip(keys, ((B, T, D), (D, V), (V,)), strict=False))
    return x, w, b, jax.random.randint(keys[3], (B, T), 0, V), (jax.random.uniform(keys[4], (B, T)) < 0.8) * 1.0


def dense(x, w, b, targets, mask):
    logits = jnp.einsum("btd,dv->btv", x, w) + (0.0 if b is None else b[None, None])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    losses = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(losses * mask) + Z * jnp.sum(jnp.square(log_z) * mask)


def chunked(chunks: int, layout=None):
    def loss(x, w, b, targets, mask):
        with use_layout(layout):
            model = ModelConfig(n_layers=1, d_model=D, n_heads=1, n_vocab=V, seq_len=T, head_bias=b is not None)
            return 3.0 * chunked_cross_entropy(x, w, b, targets, mask, LossOptions(model, Z, chunks))[0]

    return loss


@pytest.mark.parametrize("mesh", [{}, dict(tensor=4, data=2), dict(fsdp=2, context=2, pipeline=2)], ids=str)
@pytest.mark.parametrize(("chunks", "bias"), [(1, False), (4, True)])
def test_chunked_loss_equals_the_dense_one(mesh, chunks, bias):
    x, w, b, targets, mask = make_arrays()
    b = b if bias else None
    expected = jax.value_and_grad(dense, argnums=(0, 1, 2) if bias else (0, 1))(x, w, b, targets, mask)
    layout = make_layout(MeshConfig(**{"data": 1, **mesh})) if mesh else None
    argnums = (0, 1, 2) if bias else (0, 1)
    found = jax.jit(jax.value_and_grad(chunked(chunks, layout), argnums=argnums))(x, w, b, targets, mask)
    alone = jax.jit(chunked(chunks, layout))(x, w, b, targets, mask)  # not differentiated: a separate code path
    np.testing.assert_allclose(alone, found[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a / 3, b, rtol=1e-5, atol=1e-5)


def buffers(program: str) -> set[tuple[int, ...]]:
    return {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", program)}


def holds(program: str, tokens: int, vocab: int) -> bool:
    """Return whether an array has `vocab` entries for each of `tokens`."""
    return any(np.prod(shape) == tokens * vocab and vocab in shape for shape in buffers(program))


def test_logits_of_all_tokens_never_exist():
    arrays = make_arrays()
    compiled = {
        chunks: jax.jit(jax.grad(chunked(chunks), argnums=(0, 1))).lower(*arrays).compile() for chunks in (1, 4)
    }
    programs = {chunks: program.as_text() for chunks, program in compiled.items()}
    assert holds(programs[1], B * T, V)
    assert not holds(programs[4], B * T, V)
    assert holds(programs[4], B * T // 4, V)
    one_chunk, four_chunks = (program.memory_analysis().temp_size_in_bytes for program in compiled.values())
    assert four_chunks < one_chunk - B * T * V * 4 / 2


def test_a_sharded_vocabulary_is_never_gathered():
    layout = make_layout(MeshConfig(data=2, tensor=4))
    arrays = make_arrays()
    with use_layout(layout):
        shardings = [
            layout.sharding(axes, x.shape, "x")
            for axes, x in zip(
                (
                    ("batch", "sequence", "activation_embed"),
                    ("embed", "vocab"),
                    ("vocab",),
                    *[("batch", "sequence")] * 2,
                ),
                arrays,
                strict=True,
            )
        ]
        step = jax.jit(jax.grad(chunked(1, layout), argnums=(0, 1, 2)), in_shardings=shardings)
        program = step.lower(*arrays).compile().as_text()
    assert holds(program, B * T // 2, V // 4)
    assert not holds(program, B * T // 2, V)
    moved = re.findall(r"(?:all-gather|all-to-all|collective-permute)\(", program)
    assert not moved, "only sums are communicated"
