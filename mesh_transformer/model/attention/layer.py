# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Attention layers: self-attention, with or without a KV cache, and cross-attention to an encoder."""

from functools import partial

import haiku as hk
import jax.numpy as jnp
from jaxtyping import Array, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.layers import LayerKind
from mesh_transformer.model.attention.dense import dense_attention
from mesh_transformer.model.attention.kernels import dispatch_attention
from mesh_transformer.model.attention.kv_cache import KVCache, read_kv, write_kv
from mesh_transformer.model.attention.masks import AttentionContext
from mesh_transformer.model.formulas import clip_qkv
from mesh_transformer.model.linear import linear
from mesh_transformer.model.norms import QKNorm
from mesh_transformer.model.params import Inits, param
from mesh_transformer.model.positions import apply_rope, bias_table, bucket_bias, make_rotation


class Attention(hk.Module):
    """Multi-head self-attention: project to queries, keys and values, rotate, attend, and project back."""

    def __init__(self, config: ModelConfig, inits: Inits, kind: LayerKind, name: str = "attention"):
        super().__init__(name=name)
        self.config = config
        self.inits = inits
        self.kind = kind

    def __call__(
        self, x: Float[Array, "B T D"], context: AttentionContext, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Return the contribution to the residual stream, and the cache with the new keys and values."""
        c = self.config
        q = self._project(x, "q", heads=c.n_heads)
        k = self._project(x, "k", kv_heads=c.kv_heads)
        v = self._project(x, "v", kv_heads=c.kv_heads)
        if c.qk_norm:
            q = QKNorm(c, name="norm_q")(q)
            k = QKNorm(c, name="norm_k", heads="kv_heads")(k)
        if c.positions.startswith("rope") and self.kind.rotates:
            rotation = make_rotation(context.positions, context.reached_len, c, local=self.kind.local)
            q = apply_rope(q, rotation, c)
            k = apply_rope(k, rotation, c)
        if cache is not None:
            cache = write_kv(cache, k, v, context.positions)
            k, v = read_kv(cache, x.dtype)
        if context.masks is not None and context.masks.buckets is not None:
            bias = bucket_bias(bias_table("relative_bias", c), context.masks.buckets)
            context = context._replace(masks=context.masks._replace(bias=bias))
        sinks = param("sinks", hk.initializers.Constant(0.0), heads=c.n_heads) if c.attention_sinks else None
        attend = partial(dispatch_attention, config=c, local=self.kind.local, context=context, sinks=sinks)
        if c.remat == "attention" and cache is None:
            attend = hk.remat(attend)
        return self._project_out(attend(q, k, v)), cache

    def _project(self, x: Float[Array, "B T D"], name: str, **heads: int) -> Float[Array, "B T N C"]:
        init = self.inits.query if name == "q" else self.inits.input
        w = param(f"w_{name}", init, embed=self.config.d_model, **heads, head_dim=self.config.head_dim)
        b = None
        if self.config.qkv_bias:
            b = param(f"b_{name}", hk.initializers.Constant(0.0), **heads, head_dim=self.config.head_dim)
        return clip_qkv(linear(x, w, b), self.config)

    def _project_out(self, x: Float[Array, "B T H C"]) -> Float[Array, "B T D"]:
        c = self.config
        w_o = param("w_o", self.inits.attn_output, heads=c.n_heads, head_dim=c.head_dim, embed=c.d_model)
        b_o = param("b_o", hk.initializers.Constant(0.0), embed=c.d_model) if c.attention_out_bias else None
        return linear(x, w_o, b_o, inputs=2)


class CrossAttention(Attention):
    """A decoder's attention to the encoder output (Vaswani et al. 2017, section 3.2.3): no positions, not causal."""

    def __init__(self, config: ModelConfig, inits: Inits):
        super().__init__(config, inits, config.pattern[0], name="cross_attention")

    def __call__(
        self, x: Float[Array, "B T D"], context: AttentionContext, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Return the contribution to the residual stream, and the cache with the encoder's keys and values."""
        c = self.config
        encoder_output = context.encoder_output
        assert encoder_output is not None
        q = self._project(x, "q", heads=c.n_heads)
        q = QKNorm(c, name="norm_q")(q) if c.qk_norm else q
        if encoder_output.hidden_states is None:
            assert cache is not None
            k, v = read_kv(cache.cross_attention, x.dtype)
        else:
            k = self._project(encoder_output.hidden_states, "k", kv_heads=c.kv_heads)
            v = self._project(encoder_output.hidden_states, "v", kv_heads=c.kv_heads)
            k = QKNorm(c, name="norm_k", heads="kv_heads")(k) if c.qk_norm else k
            if cache is not None:
                positions = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
                cache = cache._replace(cross_attention=write_kv(cache.cross_attention, k, v, positions))
        attend = partial(dense_attention, config=c)
        if c.remat == "attention" and cache is None:
            attend = hk.remat(attend)
        return self._project_out(attend(q, k, v, encoder_output.mask, None)), cache
