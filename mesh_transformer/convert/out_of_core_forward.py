# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Our model where not even one of its layers fits into memory: every product is taken over some rows of a weight at a time.

The model's own functions do all else; what is said again here is only which array is multiplied with what. A test holds
it against the one forward pass.
"""

import math
from collections.abc import Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.reference import BLOCK_BYTES
from mesh_transformer.convert.lazy_arrays import Lazy, Row, whole
from mesh_transformer.model.attention.dense import dense_attention
from mesh_transformer.model.attention.masks import AttentionContext
from mesh_transformer.model.feed_forward import ACTIVATIONS
from mesh_transformer.model.norms import QKNorm, Norm
from mesh_transformer.model.positions import apply_rope
from mesh_transformer.storage.errors import CheckpointError

Array = np.ndarray


class Layer:
    """One layer, whose arrays stay where they are."""

    def __init__(self, config: ModelConfig, arrays: Mapping[str, Lazy], place: int, *, local: bool, has_experts: bool):
        """`arrays` by their names inside a block ("attention/w_q"), each a stack of which `place` is this layer's."""
        self.config, self.local = config, local
        self.experts = config.experts if has_experts else None
        self.arrays = {name: Row(array, place) for name, array in arrays.items()}

    def run(self, x: Array, sight: AttentionContext) -> Array:
        """The residual stream [B, T, D] after this layer, float32; as model.transformer.Block."""
        normed = self.norm("norm_1", x)
        mixed = x + self.attend(normed, sight)
        match self.config.residual:
            case "serial":
                return mixed + self.feed_forward(self.norm("norm_2", mixed))
            case "parallel":
                return mixed + self.feed_forward(normed)
            case _:
                return mixed + self.feed_forward(self.norm("norm_2", x))

    def attend(self, x: Array, sight: AttentionContext) -> Array:
        """As model.attention.Attention."""
        c = self.config
        q, k, v = (self.multiply(x, f"attention/w_{y}", f"attention/b_{y}") for y in "qkv")
        if c.qk_norm:
            q, k = (self.norm(f"attention/norm_{y}", z, QKNorm) for y, z in (("q", q), ("k", k)))
        if c.positions.startswith("rope"):
            q, k = (apply_rope(jnp.asarray(y), sight.positions, c) for y in (q, k))
        scale = c.head_dim**-0.5 if c.attention_scale == "rsqrt_d_head" else 1.0
        q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
        masks = sight.masks
        assert masks is not None, "the kernel here is the plain one"
        mixed = dense_attention(q, k, v, masks.windowed if self.local else masks.full, masks.bias, scale=scale)
        return self.multiply(np.asarray(mixed), "attention/w_o", "attention/b_o", inputs=2)

    def feed_forward(self, x: Array) -> Array:
        """As in model.transformer.Block: dense, of experts, or both."""
        if self.experts is None:
            return self.run_dense(x, "feed_forward")
        mixed = self.mix_experts(x, self.experts.n_experts_per_token)
        return mixed + self.run_dense(x, "feed_forward") if self.experts.shared_expert else mixed

    def run_dense(self, x: Array, module: str) -> Array:
        """As model.feed_forward.FeedForward."""
        act = lambda y: np.asarray(ACTIVATIONS[self.config.activation](jnp.asarray(y)))  # noqa: E731
        hidden = self.multiply(x, f"{module}/w_in", f"{module}/b_in")
        gate = self.multiply(x, f"{module}/w_gate", f"{module}/b_gate") if self.config.gated_ffn else hidden
        hidden = act(gate) * hidden if self.config.gated_ffn else act(hidden)
        return self.multiply(hidden, f"{module}/w_out", f"{module}/b_out")

    def mix_experts(self, x: Array, n_experts_per_token: int) -> Array:
        """As model.moe.Experts without a capacity: each expert meets the tokens that chose it."""
        p = np.asarray(jax.nn.softmax(jnp.asarray(self.multiply(x, "experts/w_router", ""))))
        chosen = np.argsort(-p, axis=-1, kind="stable")[..., :n_experts_per_token]
        gates = np.take_along_axis(p, chosen, axis=-1)
        gates = gates / gates.sum(axis=-1, keepdims=True) if n_experts_per_token > 1 else gates
        y = np.zeros_like(x)
        for e in range(p.shape[-1]):
            own = (chosen == e).any(axis=-1)
            for name in [name for name in self.arrays if name.startswith("experts/") and name != "experts/w_router"]:
                self.arrays[f"expert/{name.rpartition('/')[2]}"] = Row(self.arrays[name], e)
            if own.any():
                y[own] += gates[chosen == e][:, None] * self.run_dense(x[own], "expert")
        return y

    def norm(self, name: str, x: Array, kind: Any = Norm) -> Array:
        """One of the layer's norms."""
        names = [full for full in self.arrays if full.startswith(f"{name}/")]
        params = {full.rpartition("/")[2]: jnp.asarray(self.read(full)) for full in names}
        run = hk.without_apply_rng(hk.transform(lambda y: kind(self.config, name="norm")(y)))
        return np.asarray(run.apply({"norm": params}, jnp.asarray(x)))

    def multiply(self, x: Array, weight: str, bias: str, *, inputs: int = 1) -> Array:
        """x [..., inputs] times the weight [inputs, outputs], some of whose rows are in memory at a time, plus the bias."""
        w = self.arrays[weight]
        outputs, inner = w.shape[inputs:], math.prod(w.shape[1:inputs])
        x = x.reshape(*x.shape[: x.ndim - inputs], -1)
        y = np.zeros((*x.shape[:-1], math.prod(outputs)), np.float32)
        step = max(BLOCK_BYTES // (4 * inner * math.prod(outputs)), 1)
        for first in range(0, w.shape[0], step):
            last = min(first + step, w.shape[0])
            block = w.read((slice(first, last), *whole(w)[1:])).astype(np.float32)
            y += x[..., first * inner : last * inner] @ block.reshape(-1, math.prod(outputs))
        y = y.reshape(*x.shape[:-1], *outputs)
        return y + self.read(bias) if bias in self.arrays else y

    def read(self, name: str) -> Array:
        """A small array, float32."""
        return self.arrays[name].read(whole(self.arrays[name])).astype(np.float32)


def run_layers(config: ModelConfig, arrays: Mapping[str, Lazy], x: Array, sight: AttentionContext) -> Array:
    """All layers over the stream [B, T, D]; `arrays` by their names in the stack ("block_0/attention/w_q")."""
    experts = config.experts
    if experts and (experts.eval_capacity_factor or experts.eval_capacity):
        raise CheckpointError("experts with a capacity are run a period of the layers at a time: raise --max-memory")
    period = len(config.pattern)
    for i in range(config.n_layers):
        block = f"block_{i % period}/"
        own = {name.removeprefix(block): array for name, array in arrays.items() if name.startswith(block)}
        local, has_experts = config.pattern[i % period]
        with jax.default_matmul_precision("highest"):
            x = Layer(config, own, i // period, local=local, has_experts=has_experts).run(x, sight)
    return x
