# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The feed-forward layer, with or without a gate."""

from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.linear import linear
from mesh_transformer.model.params import Inits, param

# Rematerialized: the backward pass recomputes an activation from its argument instead of reading up to five saved arrays.
ACTIVATIONS = {
    "gelu-tanh": jax.checkpoint(partial(jax.nn.gelu, approximate=True)),  # "gelu_new" and "gelu_fast" in transformers
    "gelu-erf": jax.checkpoint(partial(jax.nn.gelu, approximate=False)),
    "relu": jax.nn.relu,
    "silu": jax.checkpoint(jax.nn.silu),
}
SWIGLU_ALPHA = 1.702  # slope of the sigmoid in the published gpt-oss models
SWIGLU_LIMIT = 7.0  # maximum of the gate and of |x| in the published gpt-oss models; see `_clamped_swiglu`


@jax.checkpoint
def _clamped_swiglu(gate: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return gate * sigmoid(alpha * gate) * (x + 1), with gate and x clamped (gpt-oss)."""
    gate = jnp.minimum(gate, SWIGLU_LIMIT)
    return gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate) * (jnp.clip(x, -SWIGLU_LIMIT, SWIGLU_LIMIT) + 1.0)


def activate(x: Float[Array, "..."], gate: Float[Array, "..."] | None, activation: str) -> Float[Array, "..."]:
    """Return the hidden units, given x W_in and, in a gated layer, x W_gate."""
    if gate is None:
        return ACTIVATIONS[activation](x)
    if activation == "clamped-swiglu":
        return _clamped_swiglu(gate, x)
    return ACTIVATIONS[activation](gate) * x


class FeedForward(hk.Module):
    """activation(x W_in) W_out, or (activation(x W_gate) * x W_in) W_out if gated (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, inits: Inits, *, shared: bool = False):
        """`shared`: the layer is the shared expert of a mixture of experts."""
        super().__init__(name="feed_forward")
        self.config = config
        self.inits = inits
        self.ff_dim = config.shared_ff_dim if shared else config.ff_dim
        self.has_output_gate = shared and config.experts is not None and config.experts.shared_gate

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the contribution to the residual stream."""
        c = self.config
        ff_dim = self.ff_dim
        zeros = hk.initializers.Constant(0.0)
        w_in = param("w_in", self.inits.input, embed=c.d_model, ff=ff_dim)
        hidden = linear(x, w_in, param("b_in", zeros, ff=ff_dim) if c.ff_bias else None)
        gate = None
        if c.gated_ffn:
            w_gate = param("w_gate", self.inits.input, embed=c.d_model, ff=ff_dim)
            gate = linear(x, w_gate, param("b_gate", zeros, ff=ff_dim) if c.ff_bias else None)
        hidden = activate(hidden, gate, c.activation)
        w_out = param("w_out", self.inits.output, ff=ff_dim, embed=c.d_model)
        y = linear(hidden, w_out, param("b_out", zeros, embed=c.d_model) if c.ff_bias else None)
        return y * self._output_gate(x) if self.has_output_gate else y

    def _output_gate(self, x: Float[Array, "B T D"]) -> Float[Array, "B T 1"]:
        w = param("output_gate", self.inits.input, embed=self.config.d_model)
        return jax.nn.sigmoid(jnp.einsum("btd,d->bt", x, w.astype(x.dtype)))[..., None]
