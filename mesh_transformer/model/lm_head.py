# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The language-model head: final hidden states -> logits.

The formulas of logits are in formulas.py; the chunked loss and the comparison of converted checkpoints use them as well.
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.formulas import finish_logits
from mesh_transformer.model.linear import linear
from mesh_transformer.model.quantization import Quantized


class LMHead(NamedTuple):
    """Parameters of the head, as stored in a checkpoint."""

    w: Float[Array, "..."] | Quantized  # [V, D], the embedding matrix, with model.tied_embeddings; otherwise [D, V]
    b: Float[Array, "V"] | None


def lm_head(params: Any, config: ModelConfig) -> LMHead:
    """Return the head's parameters, given the model's parameters."""
    arrays = params["transformer"]
    return LMHead(arrays["w_tokens" if config.tied_embeddings else "w_head"], arrays.get("b_head"))


def head_matrix(head: LMHead, config: ModelConfig) -> Float[Array, "D V"]:
    """Return the head's unquantized weight as the right-hand side of a matmul."""
    assert not isinstance(head.w, Quantized)
    return head.w.T if config.tied_embeddings else head.w


def lm_logits(x: Float[Array, "*B D"], head: LMHead, config: ModelConfig) -> Float[Array, "*B V"]:
    """Return the float32 logits, given the output of `scale_hidden_states`."""
    return finish_logits(linear(x, head.w, transposed=config.tied_embeddings, dtype="float32"), head.b, config)
