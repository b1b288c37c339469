# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (DeepSeek V2, arXiv 2405.04434, section 2.1): the KV cache holds one vector per token.

    c = norm(x W_down)           latent vector of keys and values, [kv_rank]
    r = rotate(x W_down')        rotated channels of the key, shared by all heads, [d_rotated]
    k = [c W_up_k, r]            of each head, [d_unrotated + d_rotated]
    v = c W_up_v                 of each head, [d_value]

The cache holds c and r: kv_rank + d_rotated numbers per token and layer, regardless of the number of heads. Two computations
give the same attention; the layer uses the one with fewer FLOPs for the given numbers of queries and keys. Training and long
prefills expand c to the keys and values of every head. Decoding absorbs W_up_k into the query and W_up_v into the output
(appendix C of the paper): this is multi-query attention with the key [c, r] and the value c.
"""

from functools import partial

import haiku as hk
import jax.numpy as jnp
from jaxtyping import Array, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.latent_attention import LatentAttentionConfig
from mesh_transformer.config.layers import LayerKind
from mesh_transformer.model.attention.dense import dense_attention
from mesh_transformer.model.attention.kernels import dispatch_attention
from mesh_transformer.model.attention.kv_cache import KVCache, read_kv, write_kv
from mesh_transformer.model.attention.masks import AttentionContext
from mesh_transformer.model.linear import linear
from mesh_transformer.model.norms import normalize
from mesh_transformer.model.params import Inits, param
from mesh_transformer.model.positions import apply_rope, make_rotation
from mesh_transformer.model.quantization import dequantize

NORM_EPS = 1e-6  # epsilon of the norms of latent vectors: the published code ignores norm_eps here


class LatentNorm(hk.Module):
    """RMSNorm of a latent vector."""

    def __call__(self, x: Float[Array, "B T R"]) -> Float[Array, "B T R"]:
        """Return the normalized x, in x's dtype."""
        scale = param("scale", hk.initializers.Constant(1.0), latent=x.shape[-1])
        return normalize(x, scale, jnp.zeros_like(scale), NORM_EPS, False)


class LatentAttention(hk.Module):
    """Self-attention whose keys and values are functions of a latent vector per token."""

    def __init__(self, config: ModelConfig, inits: Inits, kind: LayerKind):
        super().__init__(name="attention")
        assert config.latent_attention is not None
        self.config = config
        self.sizes = config.latent_attention
        self.inits = inits
        self.kind = kind

    def __call__(
        self, x: Float[Array, "B T D"], context: AttentionContext, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Return the contribution to the residual stream, and the cache with the new latent vectors and rotated keys."""
        c = self.config
        s = self.sizes
        q, latent, rotated = self._project(x, context)
        w_up = param("w_kv_up", self.inits.input, latent=s.kv_rank, heads=c.n_heads, head_dim=s.d_unrotated + s.d_value)
        if cache is not None:
            cache = write_kv(cache, latent[:, :, None], rotated, context.positions)
            cached, rotated = read_kv(cache, x.dtype)
            latent = cached[:, :, 0]
            if _absorbing_is_cheaper(q.shape[1], latent.shape[1], s):
                assert context.masks is not None, "attention with a cache uses the dense kernel"
                mask = context.masks.windowed if self.kind.local else context.masks.full
                return self._project_out(attend_absorbed(q, latent, rotated, dequantize(w_up, x.dtype), mask, c)), cache
        k, v = expand_latent(linear(latent, w_up), rotated, s)
        attend = partial(dispatch_attention, config=c, local=self.kind.local, context=context)
        if c.remat == "attention" and cache is None:
            attend = hk.remat(attend)
        return self._project_out(attend(q, k, v)), cache

    @hk.experimental.name_like("__call__")  # keeps the method's name out of the parameter names
    def _project(
        self, x: Float[Array, "B T D"], context: AttentionContext
    ) -> tuple[Float[Array, "B T H C"], Float[Array, "B T R"], Float[Array, "B T 1 P"]]:
        """Return the queries, the latent vectors, and the rotated channels of the keys."""
        c = self.config
        s = self.sizes
        heads = dict(heads=c.n_heads, head_dim=c.head_dim)
        if s.q_rank is None:
            q = linear(x, param("w_q", self.inits.query, embed=c.d_model, **heads))
        else:
            q_latent = LatentNorm(name="norm_q_latent")(self._project_down(x, "q_down", s.q_rank))
            q = linear(q_latent, param("w_q_up", self.inits.query, latent=s.q_rank, **heads))
        down = self._project_down(x, "kv_down", s.kv_rank + s.d_rotated)
        latent = LatentNorm(name="norm_kv_latent")(down[..., : s.kv_rank])
        rotation = make_rotation(context.positions, context.reached_len, c, local=self.kind.local)
        rotated = apply_rope(down[:, :, None, s.kv_rank :], rotation, c)
        q_rotated = apply_rope(q[..., s.d_unrotated :], rotation, c)
        return jnp.concatenate([q[..., : s.d_unrotated], q_rotated], axis=-1), latent, rotated

    def _project_down(self, x: Float[Array, "B T D"], name: str, size: int) -> Float[Array, "B T R"]:
        c = self.config
        w = param(f"w_{name}", self.inits.input, embed=c.d_model, latent=size)
        return linear(x, w, param(f"b_{name}", hk.initializers.Constant(0.0), latent=size) if c.qkv_bias else None)

    def _project_out(self, x: Float[Array, "B T H V"]) -> Float[Array, "B T D"]:
        c = self.config
        w_o = param("w_o", self.inits.attn_output, heads=c.n_heads, head_dim=self.sizes.d_value, embed=c.d_model)
        b_o = param("b_o", hk.initializers.Constant(0.0), embed=c.d_model) if c.attention_out_bias else None
        return linear(x, w_o, b_o, inputs=2)


def _absorbing_is_cheaper(n_queries: int, n_keys: int, sizes: LatentAttentionConfig) -> bool:
    """Return whether `attend_absorbed` needs fewer multiplications per head than expanding all latent vectors."""
    up = sizes.kv_rank * (sizes.d_unrotated + sizes.d_value)
    pairs = n_queries * n_keys
    absorbed = n_queries * up + pairs * (2 * sizes.kv_rank + sizes.d_rotated)
    return absorbed < n_keys * up + pairs * (sizes.d_unrotated + sizes.d_rotated + sizes.d_value)


def expand_latent(
    up: Float[Array, "B S H E"], rotated: Float[Array, "B S 1 P"], sizes: LatentAttentionConfig
) -> tuple[Float[Array, "B S H C"], Float[Array, "B S H V"]]:
    """Return the keys and values of every head, given the up-projected latent vectors and the shared rotated channels."""
    shared = jnp.broadcast_to(rotated, (*up.shape[:3], rotated.shape[-1]))
    return jnp.concatenate([up[..., : sizes.d_unrotated], shared], axis=-1), up[..., sizes.d_unrotated :]


def attend_absorbed(
    q: Float[Array, "B T H C"],
    latent: Float[Array, "B S R"],
    rotated: Float[Array, "B S 1 P"],
    w_up: Float[Array, "R H E"],
    mask: Array,
    config: ModelConfig,
) -> Float[Array, "B T H V"]:
    """Return the attention output, computed from the latent vectors without expanding them to keys and values."""
    assert config.latent_attention is not None
    d_unrotated = config.latent_attention.d_unrotated
    absorbed = jnp.einsum("bthc,rhc->bthr", q[..., :d_unrotated], w_up[..., :d_unrotated])
    q = jnp.concatenate([absorbed, q[..., d_unrotated:]], axis=-1)
    value = latent[:, :, None]
    out = dense_attention(q, jnp.concatenate([value, rotated], axis=-1), value, mask, None, config)
    return jnp.einsum("bthr,rhv->bthv", out, w_up[..., d_unrotated:])
