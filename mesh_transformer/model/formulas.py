# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Formulas that several computations share, each stated once.

The forward pass, decoding, the chunked loss, ring attention, the log-likelihood scorer and the checks of converted
checkpoints all use these functions. Functions of arrays accept JAX and NumPy arrays, and are differentiated by JAX even
where other gradients are written by hand. A new architectural choice of this kind needs a field or a value in
config/model.py and a change in this module.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mesh_transformer.config import ModelConfig

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)


def input_embeddings(
    tokens: Float[ArrayT, "B T D"], positions: Float[ArrayT, "*B T D"] | None, config: ModelConfig
) -> Float[ArrayT, "B T D"]:
    """Return the residual stream before the first layer, given the embeddings of tokens and learned positions."""
    if config.embedding_scale == "sqrt_d_model":
        scale = np.asarray(config.d_model**0.5).astype(tokens.dtype)  # rounded to the dtype, as in transformers
        tokens = tokens * scale
    if config.positions != "learned":
        return tokens
    assert positions is not None
    return tokens + positions


def norm_scale(scale: Float[ArrayT, "*D"], config: ModelConfig) -> Float[ArrayT, "*D"]:
    """Return the factor that multiplies a normalized vector, given the stored parameter "scale" of the norm."""
    return 1.0 + scale if config.norm == "gemma-rmsnorm" else scale


def initial_norm_scale(config: ModelConfig) -> float:
    """Return the initial value of the stored parameter "scale", at which `norm_scale` is 1."""
    return 0.0 if config.norm == "gemma-rmsnorm" else 1.0


def attention_scale(config: ModelConfig) -> float:
    """Return the factor that multiplies every dot product of a query and a key."""
    match config.attention_scale:
        case "rsqrt_d_head":
            return config.head_dim**-0.5
        case "none":
            return 1.0
        case number:
            return float(number)


def clip_qkv(x: Float[ArrayT, "*B C"], config: ModelConfig) -> Float[ArrayT, "*B C"]:
    """Return queries, keys or values, clipped to absolute values of at most `config.clip_qkv`."""
    return x if config.clip_qkv is None else x.clip(-config.clip_qkv, config.clip_qkv)


def finish_scores(scores: Float[ArrayT, "*B T S"], config: ModelConfig) -> Float[ArrayT, "*B T S"]:
    """Return the attention scores before biases and masks, given the scaled dot products of queries and keys in float32."""
    return soft_cap(scores, config.attention_softcap)


def soft_cap(x: ArrayT, cap: float | None) -> ArrayT:
    """Return cap * tanh(x / cap), which is between -cap and cap; x if `cap` is None."""
    if cap is None:
        return x
    tanh: Any = np.tanh if isinstance(x, np.ndarray) else jnp.tanh
    return cap * tanh(x / cap)


class Branches(NamedTuple):
    """The functions of one layer. Each branch returns its contribution to the residual stream [B, T, D]."""

    norm: Callable[[str, Any], Any]  # (name of the norm, x) -> normalized x
    attention: Callable[[Any], Any]
    feed_forward: Callable[[Any], Any]
    cross_attention: Callable[[Any], Any] | None = None  # in the decoder of an encoder-decoder model


def apply_branches(x: Any, branches: Branches, config: ModelConfig) -> Any:
    """Return the residual stream after one layer, with the residual connections of `config.residual`."""
    norm, attention, feed_forward, cross_attention = branches
    match config.residual:
        case "serial":
            x = x + attention(norm("norm_1", x))
            if cross_attention is not None:
                x = x + cross_attention(norm("norm_cross", x))
            return x + feed_forward(norm("norm_2", x))
        case "parallel":  # GPT-J: one norm for both branches
            normed = norm("norm_1", x)
            return x + attention(normed) + feed_forward(normed)
        case "parallel-two-norms":  # GPT-NeoX
            return x + attention(norm("norm_1", x)) + feed_forward(norm("norm_2", x))
        case "reordered-norm":  # OLMo 2
            x = x + norm("norm_1_post", attention(x))
            return x + norm("norm_2_post", feed_forward(x))
        case "post-norm":  # Vaswani et al. 2017, BERT
            x = norm("norm_1", x + attention(x))
            return norm("norm_2", x + feed_forward(x))
        case "sandwich":  # Gemma 2
            x = x + norm("norm_1_post", attention(norm("norm_1", x)))
            return x + norm("norm_2_post", feed_forward(norm("norm_2", x)))


def scale_hidden_states(x: Float[ArrayT, "*B D"], config: ModelConfig) -> Float[ArrayT, "*B D"]:
    """Return the input of the head's matmul, given the output of the final norm."""
    return x * config.d_model**-0.5 if config.logit_scale == "rsqrt_d_model" else x


def finish_logits(
    product: Float[ArrayT, "*B V"], bias: Float[ArrayT, "V"] | None, config: ModelConfig
) -> Float[ArrayT, "*B V"]:
    """Return the logits, given the float32 product of the hidden states and the head's weight.

    The operation is elementwise, so V may be a device's shard of the vocabulary.
    """
    if config.head_bias:
        assert bias is not None
        product = product + bias.reshape(*[1] * (product.ndim - 1), -1)
    if isinstance(config.logit_scale, float):
        product = product * config.logit_scale
    return soft_cap(product, config.logit_softcap)
