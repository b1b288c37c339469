# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Forward pass of layers that do not fit in memory: each matmul reads a few rows of its weight at a time.

All other operations are those of the model package. The order of the operations is repeated here; a test compares the
result with the model's forward pass.
"""

import dataclasses
import math
from collections.abc import Mapping

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.layers import LayerKind, LayerStack
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.convert.huggingface.reference import BLOCK_BYTES
from mesh_transformer.convert.lazy_arrays import Index, LazyArray, full_index
from mesh_transformer.model.attention.dense import dense_attention
from mesh_transformer.model.attention.latent import LatentNorm, expand_latent
from mesh_transformer.model.attention.masks import AttentionContext
from mesh_transformer.model.feed_forward import activate
from mesh_transformer.model.formulas import Branches, apply_branches, clip_qkv
from mesh_transformer.model.moe.router import router_scores, select_experts
from mesh_transformer.model.norms import Norm, QKNorm
from mesh_transformer.model.positions import apply_rope, bucket_bias, make_rotation
from mesh_transformer.storage.errors import CheckpointError

Array = np.ndarray
ROUTER = ("experts/w_router", "experts/b_router", "experts/selection_bias")


class OutOfCoreLayer:
    """One layer whose weights are read from the checkpoint when they are used."""

    def __init__(self, config: ModelConfig, arrays: Mapping[str, LazyArray], index: int, kind: LayerKind):
        """Select layer `index` of `arrays`, which stack the weights of a block's layers by name ("attention/w_q")."""
        self.config = config
        self.kind = kind
        self.experts = config.experts if kind.has_experts else None
        self.arrays: dict[str, LazyArray] = {name: Index(array, index) for name, array in arrays.items()}

    def run(self, x: Array, context: AttentionContext) -> Array:
        """Return the float32 residual stream [B, T, D] after this layer."""
        branches = Branches(self.norm, lambda normed: self.attention(normed, context), self.feed_forward)
        return apply_branches(x, branches, self.config)

    def attention(self, x: Array, context: AttentionContext) -> Array:
        """Return the output of self-attention, as model.attention does."""
        q, k, v = self.project_latent(x, context) if self.config.latent_attention else self.project(x, context)
        masks = context.masks
        assert masks is not None, "only the dense kernel has masks"
        mask = masks.windowed if self.kind.local else masks.full
        bias = masks.bias
        if masks.buckets is not None:
            bias = bucket_bias(jnp.asarray(self.read("attention/relative_bias")), masks.buckets)
        sinks = jnp.asarray(self.read("attention/sinks")) if self.config.attention_sinks else None
        output = dense_attention(q, k, v, mask, bias, dataclasses.replace(self.config, dropout=0.0), sinks)
        return self.matmul(np.asarray(output), "attention/w_o", "attention/b_o", input_dims=2)

    def project(self, x: Array, context: AttentionContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values."""
        q, k, v = (clip_qkv(self.matmul(x, f"attention/w_{y}", f"attention/b_{y}"), self.config) for y in "qkv")
        if self.config.qk_norm:
            q = self.norm("attention/norm_q", q, QKNorm)
            k = self.norm("attention/norm_k", k, QKNorm)
        q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
        if self.config.positions.startswith("rope") and self.kind.rotates:
            rotation = make_rotation(context.positions, context.reached_len, self.config, local=self.kind.local)
            q = apply_rope(q, rotation, self.config)
            k = apply_rope(k, rotation, self.config)
        return q, k, v

    def project_latent(self, x: Array, context: AttentionContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values of latent attention."""
        sizes = self.config.latent_attention
        assert sizes is not None
        if sizes.q_rank is None:
            queries = self.matmul(x, "attention/w_q", "")
        else:
            q_latent = self.matmul(x, "attention/w_q_down", "attention/b_q_down")
            queries = self.matmul(self.latent_norm("attention/norm_q_latent", q_latent), "attention/w_q_up", "")
        q = jnp.asarray(queries)
        down = self.matmul(x, "attention/w_kv_down", "attention/b_kv_down")
        latent = self.latent_norm("attention/norm_kv_latent", down[..., : sizes.kv_rank])
        rotation = make_rotation(context.positions, context.reached_len, self.config, local=self.kind.local)
        rotated = apply_rope(jnp.asarray(down[:, :, None, sizes.kv_rank :]), rotation, self.config)
        q_rotated = apply_rope(q[..., sizes.d_unrotated :], rotation, self.config)
        q = jnp.concatenate([q[..., : sizes.d_unrotated], q_rotated], axis=-1)
        return q, *expand_latent(jnp.asarray(self.matmul(latent, "attention/w_kv_up", "")), rotated, sizes)

    def latent_norm(self, name: str, x: Array) -> Array:
        """Return a latent vector normalized."""
        run = hk.without_apply_rng(hk.transform(lambda y: LatentNorm(name="norm")(y)))
        params = {"norm": {"scale": jnp.asarray(self.read(f"{name}/scale"))}}
        return np.asarray(run.apply(params, jnp.asarray(x)))

    def feed_forward(self, x: Array) -> Array:
        """Return the output of the feed-forward layer: dense, mixture of experts, or the sum of both."""
        if self.experts is None:
            return self.run_dense(x, "feed_forward")
        y = self.run_experts(x, self.experts)
        return y + self.run_shared(x, self.experts) if self.experts.shared_expert else y

    def run_shared(self, x: Array, experts: ExpertsConfig) -> Array:
        """Return the output of the shared expert, as model.feed_forward does."""
        y = self.run_dense(x, "feed_forward")
        if not experts.shared_gate:
            return y
        return y * np.asarray(jax.nn.sigmoid(jnp.asarray(x @ self.read("feed_forward/output_gate"))))[..., None]

    def run_dense(self, x: Array, module: str) -> Array:
        """Return the output of a dense feed-forward layer, as model.feed_forward does."""
        hidden = jnp.asarray(self.matmul(x, f"{module}/w_in", f"{module}/b_in"))
        gate = None
        if self.config.gated_ffn:
            gate = jnp.asarray(self.matmul(x, f"{module}/w_gate", f"{module}/b_gate"))
        hidden = np.asarray(activate(hidden, gate, self.config.activation))
        return self.matmul(hidden, f"{module}/w_out", f"{module}/b_out")

    def run_experts(self, x: Array, config: ExpertsConfig) -> Array:
        """Return the output of a mixture of experts without capacity limits, as model.moe does."""
        logits = jnp.asarray(self.matmul(x, "experts/w_router", "experts/b_router"))
        selection_bias = jnp.asarray(self.read("experts/selection_bias")) if config.selection_bias else None
        selected = select_experts(router_scores(logits, config), selection_bias, config)
        gates, experts = (np.asarray(part) for part in selected)
        y = np.zeros_like(x)
        names = [name for name in self.arrays if name.startswith("experts/") and name not in ROUTER]
        for e in range(config.n_experts):
            is_routed = (experts == e).any(axis=-1)
            for name in names:
                self.arrays[f"expert/{name.rpartition('/')[2]}"] = Index(self.arrays[name], e)
            if is_routed.any():
                y[is_routed] += gates[experts == e][:, None] * self.run_dense(x[is_routed], "expert")
        return y

    def norm(self, name: str, x: Array, kind: type[Norm] | type[QKNorm] = Norm) -> Array:
        """Return x normalized by the norm `name` of the layer."""
        names = [full for full in self.arrays if full.startswith(f"{name}/")]
        params = {full.rpartition("/")[2]: jnp.asarray(self.read(full)) for full in names}
        run = hk.without_apply_rng(hk.transform(lambda y: kind(self.config, name="norm")(y)))
        return np.asarray(run.apply({"norm": params}, jnp.asarray(x)))

    def matmul(self, x: Array, weight: str, bias: str, *, input_dims: int = 1) -> Array:
        """Return x [..., inputs] times a weight [inputs, outputs] plus the bias, reading some rows of the weight at a time.

        The first `input_dims` dimensions of the weight are inputs.
        """
        w = self.arrays[weight]
        outputs = w.shape[input_dims:]
        inner = math.prod(w.shape[1:input_dims])
        x = x.reshape(*x.shape[: x.ndim - input_dims], -1)
        y = np.zeros((*x.shape[:-1], math.prod(outputs)), np.float32)
        step = max(BLOCK_BYTES // (4 * inner * math.prod(outputs)), 1)
        for first in range(0, w.shape[0], step):
            last = min(first + step, w.shape[0])
            block = w.read((slice(first, last), *full_index(w)[1:])).astype(np.float32)
            y += x[..., first * inner : last * inner] @ block.reshape(-1, math.prod(outputs))
        y = y.reshape(*x.shape[:-1], *outputs)
        return y + self.read(bias) if bias in self.arrays else y

    def read(self, name: str) -> Array:
        """Return all of a small array as float32."""
        return self.arrays[name].read(full_index(self.arrays[name])).astype(np.float32)


def run_layers(
    config: ModelConfig, layers: LayerStack, arrays: Mapping[str, LazyArray], x: Array, context: AttentionContext
) -> Array:
    """Return the residual stream [B, T, D] after the layers, given stacked weights by name ("block_0/attention/w_q").

    Raises CheckpointError for experts with capacity limits.
    """
    experts = config.experts
    if experts and (experts.eval_capacity_factor or experts.eval_capacity):
        limit = (
            f"eval_capacity = {experts.eval_capacity}"
            if experts.eval_capacity
            else f"eval_capacity_factor = {experts.eval_capacity_factor}"
        )
        raise CheckpointError(
            f"the capacity of the experts is limited ({limit}), which needs all weights of a layer in memory; raise --max-memory"
        )
    period = len(layers.pattern)
    for i in range(period * layers.n_repeats):
        block = f"block_{i % period}/"
        stacked = {name.removeprefix(block): array for name, array in arrays.items() if name.startswith(block)}
        layer = OutOfCoreLayer(config, stacked, 0 if config.shared_layers else i // period, layers.pattern[i % period])
        with jax.default_matmul_precision("highest"):
            x = layer.run(x, context)
    return x
