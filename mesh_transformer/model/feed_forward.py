# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The feed-forward layer, gated or not."""

from functools import partial

import haiku as hk
import jax
from jaxtyping import Array, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.linear import linear
from mesh_transformer.model.params import Inits, param

# Checkpointed: the backward pass recomputes them from their argument instead of reading up to five saved arrays.
ACTIVATIONS = {
    "gelu-tanh": jax.checkpoint(partial(jax.nn.gelu, approximate=True)),  # "gelu_new" and "gelu_fast" in transformers
    "gelu-erf": jax.checkpoint(partial(jax.nn.gelu, approximate=False)),
    "relu": jax.nn.relu,
    "silu": jax.checkpoint(jax.nn.silu),
}


class FeedForward(hk.Module):
    """activation(x W_in) W_out, or (activation(x W_gate) * x W_in) W_out if gated (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, inits: Inits):
        super().__init__(name="feed_forward")
        self.config = config
        self.inits = inits

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the contribution to the residual stream."""
        c = self.config
        zeros = hk.initializers.Constant(0.0)
        activation = ACTIVATIONS[c.activation]
        w_in = param("w_in", self.inits.input, embed=c.d_model, ff=c.ff_dim)
        hidden = linear(x, w_in, param("b_in", zeros, ff=c.ff_dim) if c.ff_bias else None)
        if c.gated_ffn:
            w_gate = param("w_gate", self.inits.input, embed=c.d_model, ff=c.ff_dim)
            gate = linear(x, w_gate, param("b_gate", zeros, ff=c.ff_dim) if c.ff_bias else None)
            hidden = activation(gate) * hidden
        else:
            hidden = activation(hidden)
        w_out = param("w_out", self.inits.output, ff=c.ff_dim, embed=c.d_model)
        return linear(hidden, w_out, param("b_out", zeros, embed=c.d_model) if c.ff_bias else None)
