# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The language-model head: final hidden states -> logits.

Every computation of logits uses these functions: the forward pass, the chunked loss, the log-likelihood scorer and the
comparison of converted checkpoints. They accept JAX and NumPy arrays, except for `lm_logits`, which needs JAX.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.linear import linear
from mesh_transformer.model.quantization import Quantized

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)


class LMHead(NamedTuple):
    """Parameters of the head as they are stored."""

    w: Float[Array, "..."] | Quantized  # [V, D], the embedding matrix, with model.tied_embeddings; otherwise [D, V]
    b: Float[Array, "V"] | None


def lm_head(params: Any, config: ModelConfig) -> LMHead:
    """Return the head's parameters from those of the model."""
    arrays = params["transformer"]
    return LMHead(arrays["w_tokens" if config.tied_embeddings else "w_head"], arrays.get("b_head"))


def head_matrix(head: LMHead, config: ModelConfig) -> Float[Array, "D V"]:
    """Return the head's weight, not quantized, as the right-hand side of a matmul."""
    assert not isinstance(head.w, Quantized)
    return head.w.T if config.tied_embeddings else head.w


def scale_hidden_states(x: Float[ArrayT, "*B D"], config: ModelConfig) -> Float[ArrayT, "*B D"]:
    """Return the output of the final norm, scaled as the input of the head's matmul."""
    return x * config.d_model**-0.5 if config.logit_scale == "rsqrt_d_model" else x


def finish_logits(
    product: Float[ArrayT, "*B V"], bias: Float[ArrayT, "V"] | None, config: ModelConfig
) -> Float[ArrayT, "*B V"]:
    """Return the logits, given the float32 product of the hidden states and the head's weight.

    The operation is elementwise, so V may be a device's shard of the vocabulary.
    """
    if not config.head_bias:
        return product
    assert bias is not None
    return product + bias.reshape(*[1] * (product.ndim - 1), -1)


def lm_logits(x: Float[Array, "*B D"], head: LMHead, config: ModelConfig) -> Float[Array, "*B V"]:
    """Return the float32 logits of hidden states that `scale_hidden_states` has scaled."""
    return finish_logits(linear(x, head.w, transposed=config.tied_embeddings, dtype="float32"), head.b, config)
