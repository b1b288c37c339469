# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Attention of a layer's queries over keys and values, its own or those kept in the cache."""

from functools import partial

import haiku as hk
from jaxtyping import Array, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.attention.kernels import attend_by
from mesh_transformer.model.attention.sight import Cache, Sight, recall, store
from mesh_transformer.model.linear import linear
from mesh_transformer.model.norms import HeadNorm
from mesh_transformer.model.params import Inits, param
from mesh_transformer.model.positions import rotate


class Attention(hk.Module):
    """Project, place, attend, project back."""

    def __init__(self, config: ModelConfig, inits: Inits, *, local: bool):
        super().__init__(name="attention")
        self.config, self.inits, self.local = config, inits, local

    def __call__(
        self, x: Float[Array, "B T D"], sight: Sight, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The layer's contribution to the residual stream, and its cache with the new keys and values added."""
        c = self.config
        q = self._project(x, "q", heads=c.n_heads)
        k = self._project(x, "k", kv_heads=c.kv_heads)
        v = self._project(x, "v", kv_heads=c.kv_heads)
        if c.qk_norm:
            q, k = HeadNorm(c, name="norm_q")(q), HeadNorm(c, name="norm_k")(k)
        if c.positions.startswith("rotary"):
            q, k = rotate(q, sight.positions, c), rotate(k, sight.positions, c)
        if cache is not None:
            cache = store(cache, k, v, sight.positions)
            k, v = recall(cache, x.dtype)
        attend = partial(attend_by, config=c, local=self.local, sight=sight)
        if c.remat == "attention" and cache is None:
            attend = hk.remat(attend)
        mixed = attend(q, k, v)
        w_o = param("w_o", self.inits.residual, heads=c.n_heads, head_dim=c.head_dim, embed=c.d_model)
        b_o = param("b_o", hk.initializers.Constant(0.0), embed=c.d_model) if c.attention_out_bias else None
        return linear(mixed, w_o, b_o, inputs=2), cache

    def _project(self, x: Float[Array, "B T D"], name: str, **heads: int) -> Float[Array, "B T N C"]:
        w = param(f"w_{name}", self.inits.inner, embed=self.config.d_model, **heads, head_dim=self.config.head_dim)
        b = None
        if self.config.qkv_bias:
            b = param(f"b_{name}", hk.initializers.Constant(0.0), **heads, head_dim=self.config.head_dim)
        return linear(x, w, b)
