# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Attention of a layer's queries over keys and values: its own, those kept in the cache, or an encoder's."""

from functools import partial

import haiku as hk
import jax.numpy as jnp
from jaxtyping import Array, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.attention.dense import dense_attention
from mesh_transformer.model.attention.kernels import dispatch_attention
from mesh_transformer.model.attention.masks import AttentionContext, KVCache, read_kv, write_kv
from mesh_transformer.model.linear import linear
from mesh_transformer.model.norms import QKNorm
from mesh_transformer.model.params import Inits, param
from mesh_transformer.model.positions import apply_rope


class Attention(hk.Module):
    """Project, place, attend, project back."""

    def __init__(self, config: ModelConfig, inits: Inits, *, local: bool = False, name: str = "attention"):
        super().__init__(name=name)
        self.config, self.inits, self.local = config, inits, local

    def __call__(
        self, x: Float[Array, "B T D"], sight: AttentionContext, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The layer's contribution to the residual stream, and its cache with the new keys and values added."""
        c = self.config
        q = self._project(x, "q", heads=c.n_heads)
        k = self._project(x, "k", kv_heads=c.kv_heads)
        v = self._project(x, "v", kv_heads=c.kv_heads)
        if c.qk_norm:
            q, k = QKNorm(c, name="norm_q")(q), QKNorm(c, name="norm_k")(k)
        if c.positions.startswith("rope"):
            q, k = apply_rope(q, sight.positions, c), apply_rope(k, sight.positions, c)
        if cache is not None:
            cache = write_kv(cache, k, v, sight.positions)
            k, v = read_kv(cache, x.dtype)
        attend = partial(dispatch_attention, config=c, local=self.local, sight=sight)
        if c.remat == "attention" and cache is None:
            attend = hk.remat(attend)
        return self._project_back(attend(q, k, v)), cache

    def _project_back(self, mixed: Float[Array, "B T H C"]) -> Float[Array, "B T D"]:
        c = self.config
        w_o = param("w_o", self.inits.attn_output, heads=c.n_heads, head_dim=c.head_dim, embed=c.d_model)
        b_o = param("b_o", hk.initializers.Constant(0.0), embed=c.d_model) if c.attention_out_bias else None
        return linear(mixed, w_o, b_o, inputs=2)

    def _project(self, x: Float[Array, "B T D"], name: str, **heads: int) -> Float[Array, "B T N C"]:
        init = self.inits.query if name == "q" else self.inits.input
        w = param(f"w_{name}", init, embed=self.config.d_model, **heads, head_dim=self.config.head_dim)
        b = None
        if self.config.qkv_bias:
            b = param(f"b_{name}", hk.initializers.Constant(0.0), **heads, head_dim=self.config.head_dim)
        return linear(x, w, b)


class CrossAttention(Attention):
    """A decoder's queries over what its encoder read (Vaswani et al. 2017, section 3.2.3): without places, nothing hidden."""

    def __init__(self, config: ModelConfig, inits: Inits):
        super().__init__(config, inits, name="cross_attention")

    def __call__(
        self, x: Float[Array, "B T D"], sight: AttentionContext, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The layer's contribution to the residual stream, and its cache with the encoder's keys and values, if these are new."""
        c, memory = self.config, sight.encoder_output
        assert memory is not None
        q = self._project(x, "q", heads=c.n_heads)
        q = QKNorm(c, name="norm_q")(q) if c.qk_norm else q
        if memory.hidden_states is None:
            assert cache is not None
            k, v = read_kv(cache.cross_attention, x.dtype)
        else:
            k, v = (self._project(memory.hidden_states, name, kv_heads=c.kv_heads) for name in "kv")
            k = QKNorm(c, name="norm_k")(k) if c.qk_norm else k
            if cache is not None:
                places = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
                cache = cache._replace(memory=write_kv(cache.cross_attention, k, v, places))
        scale = c.head_dim**-0.5 if c.attention_scale == "rsqrt_d_head" else 1.0
        look = partial(dense_attention, scale=scale, dropout_rate=c.dropout)
        if c.remat == "attention" and cache is None:
            look = hk.remat(look)
        return self._project_back(look(q, k, v, memory.mask, None)), cache
