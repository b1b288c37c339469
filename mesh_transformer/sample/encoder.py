# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Encoder-only models (BERT, RoBERTa, ALBERT) on their devices: batches of texts, and the compiled forward pass.

Batches are padded on the right, and no token attends to padding, so the outputs of a text do not depend on the other texts.
Batch sizes and lengths are rounded up as in the engines (engine/buckets.py), so that compiled programs are reused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.data.file_tokenizer import FileTokenizer
from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.mesh import MeshLayout, constrain
from mesh_transformer.model.encoder_heads import Encoding
from mesh_transformer.sample.engine.buckets import Buckets
from mesh_transformer.sample.engine.programs import CompiledModel
from mesh_transformer.sample.engine.requests import PromptError
from mesh_transformer.sample.engine.weights import stack_layers


class EncoderInputs(NamedTuple):
    """A batch of token sequences, padded to the same length. Each array is int32 [batch, length]."""

    tokens: Int[np.ndarray, "B T"]
    attention_mask: Int[np.ndarray, "B T"]  # 1 for tokens, 0 for padding
    token_types: Int[np.ndarray, "B T"]  # rows of the token type embeddings: 1 for the second text of a pair (BERT)


# A text, a pair of texts or token IDs, or a batch: a sequence of any of these.
Texts: TypeAlias = (
    str | Sequence[str] | Sequence[tuple[str, str]] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray
)


def make_inputs(texts: Texts | EncoderInputs, tokenizer: Tokenizer, config: ModelConfig) -> EncoderInputs:
    """Return texts, pairs of texts or token IDs as one batch; `EncoderInputs` are only checked.

    Texts get the special tokens that the tokenizer's files add. Special tokens written in a text, such as [MASK], become the
    IDs of these tokens, as in transformers.

    Raises:
      PromptError: a sequence is empty or longer than seq_len, or an ID, mask or token type is out of range.
      TokenizerError: a text has lone surrogates.
    """
    if not isinstance(texts, EncoderInputs):
        is_single = isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], int | np.integer))
        rows: Sequence[Any] = [texts] if is_single else texts  # type: ignore[assignment]
        encoded = [_encode(row, tokenizer) for row in rows]
        texts = _pad(encoded, config)
    _check(texts, config)
    return texts


def mean_pool(
    hidden_states: Float[np.ndarray, "B T D"], attention_mask: Int[np.ndarray, "B T"], *, normalize: bool
) -> Float[np.ndarray, "B D"]:
    """Return the mean of the hidden states of each sequence's tokens, divided by its L2 norm if `normalize`."""
    weights = attention_mask[..., None].astype(np.float32)
    mean = np.sum(hidden_states * weights, axis=1) / np.sum(weights, axis=1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True) if normalize else mean


class EncoderPrograms(CompiledModel):
    """The compiled forward pass of an encoder-only model."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Mapping[str, Any]],
        layout: MeshLayout | None = None,
        *,
        weight_dtype: str = "saved",
    ):
        """See CompiledModel. Raises ConfigError also if the model is not encoder-only."""
        if config.causal:
            raise ConfigError(
                "model.causal=true: the model is no encoder; use DecoderOnlyEngine or EncoderDecoderEngine"
            )
        super().__init__(config, params, layout, weight_dtype=weight_dtype)
        self._buckets = Buckets(config.seq_len, layout.batch_shards if layout else 1)
        self._encode_program = self._program("encode", self._encode)
        self._logits_program = self._program("logits", self._logits)

    def hidden_states(self, inputs: EncoderInputs) -> Float[np.ndarray, "B T D"]:
        """Return the float32 hidden states after the last layer. Hidden states of padding have no meaning."""
        batch_size, length = inputs.tokens.shape
        return np.asarray(self._run(self._encode_program, inputs).hidden_states)[:batch_size, :length]

    def pooled(self, inputs: EncoderInputs) -> Float[np.ndarray, "B P"]:
        """Return the float32 output of the pooler. Raises ConfigError if the model has no pooler."""
        if not self.config.pooler:
            raise ConfigError(
                "model.pooler=false: the model has no pooler; use mean_pooled, or hidden_states of the first token"
            )
        return np.asarray(self._run(self._encode_program, inputs).pooled)[: len(inputs.tokens)]

    def logits(self, inputs: EncoderInputs) -> Float[np.ndarray, "B T V"]:
        """Return the float32 logits of the masked language-model head. Raises ConfigError if the model has no head."""
        if self.config.head == "none":
            raise ConfigError('model.head="none": the model has no masked language-model head; use hidden_states')
        batch_size, length = inputs.tokens.shape
        return np.asarray(self._run(self._logits_program, inputs))[:batch_size, :length]

    def class_logits(self, inputs: EncoderInputs) -> Float[np.ndarray, "B C"]:
        """Return the float32 logits of the labels. Raises ConfigError if the model has no classifier."""
        if self.config.n_labels is None:
            raise ConfigError("model.n_labels is not set: the model has no sequence classifier; use pooled")
        return np.asarray(self._run(self._encode_program, inputs).class_logits)[: len(inputs.tokens)]

    def _run(self, program: Any, inputs: EncoderInputs) -> Any:
        """Return the outputs of a program, on the devices, for `inputs` padded to a size with a compiled program."""
        batch_size, length = inputs.tokens.shape
        extra_rows = self._buckets.batch_size(batch_size) - batch_size
        extra_columns = self._buckets.prefill_len(length) - length
        padded = EncoderInputs(*(np.pad(array, ((0, extra_rows), (0, extra_columns))) for array in inputs))
        return program(self.weights, padded)

    def _encode(self, weights: Any, inputs: EncoderInputs) -> Encoding:
        encoding = self._model.encode(stack_layers(weights), inputs.tokens, **self._arguments(inputs))
        hidden_states = constrain(encoding.hidden_states, "batch", "sequence", "activation_embed")
        return jax.tree.map(lambda array: array.astype(jnp.float32), encoding._replace(hidden_states=hidden_states))

    def _logits(self, weights: Any, inputs: EncoderInputs) -> Any:
        logits, _ = self._model.apply(stack_layers(weights), inputs.tokens, **self._arguments(inputs))
        return constrain(logits, "batch", "sequence", "activation_embed")

    def _arguments(self, inputs: EncoderInputs) -> dict[str, Any]:
        types = {} if self.config.n_token_types is None else {"token_types": inputs.token_types}
        return {"segment_ids": inputs.attention_mask, **types}


def _encode(row: Any, tokenizer: Tokenizer) -> tuple[Sequence[int], Sequence[int]]:
    """Return the IDs and the token types of a text, a pair of texts, or token IDs."""
    if isinstance(row, str):
        ids: Sequence[int] = tokenizer.encode(row, add_special_tokens=True, parse_special=True)
    elif len(row) == 2 and all(isinstance(text, str) for text in row):
        if not isinstance(tokenizer, FileTokenizer):
            raise PromptError("pairs of texts need the special tokens of a tokenizer.json; this model reads bytes")
        return tokenizer.encode_pair(*row)
    else:
        ids = [int(token) for token in row]
    return ids, [0] * len(ids)


def _pad(encoded: Sequence[tuple[Sequence[int], Sequence[int]]], config: ModelConfig) -> EncoderInputs:
    """Return sequences of IDs and token types as a batch, padded on the right to the longest one."""
    lengths = [len(ids) for ids, _ in encoded]
    if not lengths or not 0 < min(lengths) <= max(lengths) <= config.seq_len:
        raise PromptError(
            f"got sequences of {lengths} tokens; an encoder needs at least one, each of 1 to seq_len={config.seq_len} tokens"
        )
    shape = (len(lengths), max(lengths))
    padding = config.position_padding_token or 0
    inputs = EncoderInputs(np.full(shape, padding, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32))
    for row, (ids, types) in enumerate(encoded):
        inputs.tokens[row, : len(ids)] = ids
        inputs.attention_mask[row, : len(ids)] = 1
        inputs.token_types[row, : len(ids)] = types
    return inputs


def _check(inputs: EncoderInputs, config: ModelConfig) -> None:
    """Raise PromptError for arrays that the model cannot read."""
    shape = np.shape(inputs.tokens)
    if len(shape) != 2 or 0 in shape or shape[1] > config.seq_len or {np.shape(array) for array in inputs} != {shape}:
        raise PromptError(
            f"got arrays of the shapes {[np.shape(array) for array in inputs]}; all must have the same "
            f"shape [batch, length] with a length of at most seq_len={config.seq_len}"
        )
    limits = (("tokens", config.n_vocab), ("attention_mask", 2), ("token_types", config.n_token_types or 1))
    for name, limit in limits:
        low, high = np.min(getattr(inputs, name)), np.max(getattr(inputs, name))
        if low < 0 or high >= limit:
            raise PromptError(f"got {name} of {low} to {high}; the values of this model are 0..{limit - 1}")
    if empty := np.flatnonzero(np.max(inputs.attention_mask, axis=1) == 0).tolist():
        raise PromptError(f"sequence {empty[0]} is padding only; set attention_mask to 1 for at least one token")
