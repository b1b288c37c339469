# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Heads of encoder-only models: masked language modeling, pooling and classification (Devlin et al. 2018, BERT)."""

from typing import NamedTuple

import haiku as hk
import jax.numpy as jnp
from jaxtyping import Array, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.feed_forward import ACTIVATIONS
from mesh_transformer.model.linear import dropout, linear
from mesh_transformer.model.norms import Norm
from mesh_transformer.model.params import Inits, param

ZEROS = hk.initializers.Constant(0.0)


class Encoding(NamedTuple):
    """Outputs of an encoder for a batch of sequences."""

    hidden_states: Float[Array, "B T D"]  # after the last layer
    pooled: Float[Array, "B P"] | None  # None without model.pooler; P = D
    class_logits: Float[Array, "B C"] | None  # float32; None without model.n_labels


class MaskedLMTransform(hk.Module):
    """norm(activation(x W + b)): hidden states projected to the embedding size, the input of the masked-LM head's matmul."""

    def __init__(self, config: ModelConfig, inits: Inits):
        super().__init__(name="masked_lm_head")
        self.config = config
        self.inits = inits

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """Return the input of the matmul with the transposed embedding matrix."""
        c = self.config
        w = param("w", self.inits.input, embed=c.d_model, embedding=c.embedding_dim)
        x = ACTIVATIONS[c.activation](linear(x, w, param("b", ZEROS, embedding=c.embedding_dim)))
        return Norm(c, name="norm", dim=c.embedding_dim)(x)


class Pooler(hk.Module):
    """tanh(x W + b) of the first token's hidden state."""

    def __init__(self, config: ModelConfig, inits: Inits):
        super().__init__(name="pooler")
        self.config = config
        self.inits = inits

    def __call__(self, first: Float[Array, "B D"]) -> Float[Array, "B P"]:
        """Return the pooled output; P = D."""
        d_model = self.config.d_model
        w = param("w", self.inits.input, embed=d_model, pooled=d_model)
        return jnp.tanh(linear(first, w, param("b", ZEROS, pooled=d_model)))


class Classifier(hk.Module):
    """A linear layer from the pooled output to one logit for each of `n_labels`."""

    def __init__(self, config: ModelConfig, inits: Inits):
        super().__init__(name="classifier")
        self.config = config
        self.inits = inits

    def __call__(self, pooled: Float[Array, "B P"]) -> Float[Array, "B C"]:
        """Return the float32 logits of the labels."""
        c = self.config
        assert c.n_labels is not None
        w = param("w", self.inits.input, pooled=c.d_model, labels=c.n_labels)
        return linear(dropout(pooled, c.dropout), w, param("b", ZEROS, labels=c.n_labels), dtype="float32")
