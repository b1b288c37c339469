# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare the logits of the source and the result of a conversion on the same random tokens.

The files determine the implementation that computes the logits: for a native checkpoint or a GGUF file, the model of this
package, one period (repetition of the layer pattern) at a time; for a Hugging Face folder, transformers, if it is installed and
the model fits in memory, otherwise a NumPy reimplementation, which reads config.json with the importer's code; for
mesh-transformer-jax shards, a NumPy reimplementation.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.layers import LayerStack
from mesh_transformer.convert import library_logits
from mesh_transformer.convert.gptj.reader import open_raw_weights
from mesh_transformer.convert.gptj.reference import run_mtj
from mesh_transformer.convert.huggingface.families import ENCODER_DECODER, FAMILIES, has_reference, run_huggingface
from mesh_transformer.convert.huggingface.quantized.formats import open_tensors
from mesh_transformer.convert.huggingface.reference import matmul, read_rows, read_vector
from mesh_transformer.convert.import_plan import PREFIX
from mesh_transformer.convert.lazy_arrays import LazyArray, array_bytes, full_index
from mesh_transformer.convert.library_logits import run_library
from mesh_transformer.convert.out_of_core_forward import run_layers
from mesh_transformer.convert.progress import ByteCounter, Progress
from mesh_transformer.convert.readers import OpenCheckpoint
from mesh_transformer.model.attention.masks import AttentionContext, EncoderOutput
from mesh_transformer.model.embedding import default_positions, position_rows
from mesh_transformer.model.formulas import finish_logits
from mesh_transformer.model.params import Params
from mesh_transformer.model.transformer import Transformer
from mesh_transformer.storage.errors import CheckpointError

Verify = Literal["auto", "transformers", "own"]
SEQUENCES, SEQUENCE_LENGTH = 2, 32
TOLERANCE = (
    1e-4  # as a fraction of the largest logit: float32 rounding in another order of operations, after tens of layers
)
# Parameters outside the layers, except the matrices that are read a few rows at a time.
EMBEDDING = tuple(
    f"transformer/{name}" for name in ("w_token_types", "norm_embedding/", "w_project_in", "w_embedding", "b_embedding")
)
OUTSIDE = tuple(f"transformer/{name}" for name in ("norm_out/", "relative_bias/", "masked_lm_head/", "w_project_out"))
PERIOD_OVERHEAD = 2  # memory to run a period of layers, as a multiple of its weights as read and in float32


class LogitDifference(NamedTuple):
    """The difference between the logits of two checkpoints."""

    largest: float
    scale: float  # largest absolute logit
    tokens: int  # number of tokens
    implementations: tuple[str, str]  # code that computed the logits of the source, and of the result
    used_transformers: bool  # whether transformers computed the logits of source or result
    notes: tuple[str, ...] = ()


class SideLogits(NamedTuple):
    """The logits of one checkpoint and the implementation that computed them."""

    values: np.ndarray
    implementation: str
    used_transformers: bool = False
    note: str = ""  # the reason why transformers did not compute them


def compare_logits(
    source: OpenCheckpoint, result: OpenCheckpoint, max_memory: int, progress: Progress, verify: Verify = "own"
) -> LogitDifference | None:
    """Return the largest difference of logits on random tokens, using about `max_memory` bytes.

    Returns None if no implementation is available for the source or the result. `verify` selects the implementation for
    Hugging Face folders: "transformers", "own" (NumPy reimplementations), or "auto", which is transformers if possible.
    """
    config = source.plan.config
    shape = (SEQUENCES, min(SEQUENCE_LENGTH, config.seq_len))
    tokens = np.random.default_rng(0).integers(0, config.n_vocab, shape, dtype=np.int32)
    nbytes = [sum(array_bytes(array) for array in side.plan.values.values()) for side in (source, result)]
    counter = ByteCounter("comparing logits", sum(nbytes), progress)
    counter.add(0)
    sides: list[SideLogits] = []
    for checkpoint, n in sorted(zip((source, result), nbytes, strict=True), key=lambda side: side[0].kind == "native"):
        side = run_side(checkpoint, tokens, max_memory, verify)
        if side is None:
            return None
        sides.append(side)
        counter.add(n)
    if source.kind == "native":
        sides.reverse()
    largest = float(np.abs(sides[0].values - sides[1].values).max())
    return LogitDifference(
        largest,
        float(np.abs(sides[0].values).max()),
        tokens.size,
        (sides[0].implementation, sides[1].implementation),
        any(side.used_transformers for side in sides),
        tuple(dict.fromkeys(side.note for side in sides if side.note)),
    )


def run_side(checkpoint: OpenCheckpoint, tokens: np.ndarray, max_memory: int, verify: Verify) -> SideLogits | None:
    """Return the logits of a checkpoint for tokens [B, T]; None if no implementation is available.

    Raises CheckpointError if `verify` is "transformers" and transformers cannot run the model.
    """
    if checkpoint.kind != "huggingface":
        return SideLogits(logits_of(checkpoint, tokens, max_memory), str(implementation_of(checkpoint)))
    family = FAMILIES[checkpoint.external_config["model_type"]]
    note = ""
    if verify != "own":
        weights = sum(math.prod(array.shape) for array in checkpoint.plan.values.values())
        reason = library_logits.unavailable_reason(checkpoint.path, weights)
        if not reason:
            encoder_tokens = make_encoder_tokens(tokens) if checkpoint.plan.config.encoder is not None else None
            try:
                values = run_library(Path(str(checkpoint.path)), family.architecture, tokens, encoder_tokens)
                implementation = f"{library_logits.library_version()}, {family.architecture}"
                return SideLogits(values, implementation, used_transformers=True)
            except CheckpointError as error:
                reason = str(error)
        if verify == "transformers":
            raise CheckpointError(f"--verify transformers: {reason}; pass --verify own to compare without transformers")
        note = f"the logits were not compared with those of transformers: {reason}"
    implementation = implementation_of(checkpoint)
    if implementation is None:
        return None
    return SideLogits(logits_of(checkpoint, tokens, max_memory), implementation, note=note)


def implementation_of(checkpoint: OpenCheckpoint) -> str | None:
    """Return a description of the code that `logits_of` runs for a checkpoint; None if there is none."""
    match checkpoint.kind:
        case "huggingface":
            config = checkpoint.external_config
            name = f"this project's NumPy reimplementation of {config['model_type']}"
            return name if has_reference(config) else None
        case "gptj-v1":
            return "this project's NumPy reimplementation of mesh-transformer-jax"
        case _:
            return "the Mesh Transformer model"


def logits_of(checkpoint: OpenCheckpoint, tokens: np.ndarray, max_memory: int) -> np.ndarray:
    """Return the float32 logits [B, T, V] of a checkpoint of any format, computed from the arrays in the layout of its format."""
    external = checkpoint.external_config
    match checkpoint.kind:
        case "huggingface":
            tensors = open_tensors(checkpoint.path, external).tensors
            if external["model_type"] in ENCODER_DECODER:
                encoder_tokens = make_encoder_tokens(tokens)
                return run_huggingface(tensors, external, tokens, encoder_tokens, np.ones_like(encoder_tokens))
            return run_huggingface(tensors, external, tokens)
        case "gptj-v1":
            return run_mtj(open_raw_weights(checkpoint.path, external), external, tokens)
        case _:
            return run_native(checkpoint.plan.config, checkpoint.plan.values, tokens, max_memory)


def make_encoder_tokens(tokens: np.ndarray) -> np.ndarray:
    """Return input for the encoder: the decoder's tokens in reverse order."""
    return np.ascontiguousarray(tokens[:, ::-1])


def run_native(
    config: ModelConfig, arrays: Mapping[str, LazyArray], tokens: np.ndarray, max_memory: int | None = None
) -> np.ndarray:
    """Return the float32 logits [B, T, V] of the native model, or its hidden states [B, T, D] if it has no head.

    One period of layers is in memory at a time, or less if a period needs more than `max_memory` bytes.
    """
    config = dataclasses.replace(config, dtype="float32", dropout=0.0, attention_kernel="dense", preset=None)
    weights = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
    embedding = _read_params(_select(weights, *EMBEDDING))
    combine = _transform(lambda x, learned: Transformer(config).combine_embeddings(x, learned, None))

    def embed(ids: np.ndarray) -> np.ndarray:
        x = read_rows(weights["transformer/w_tokens"], ids)
        learned = None
        if config.positions == "learned":
            rows = position_rows(default_positions(jnp.asarray(ids), config), jnp.asarray(ids), config)
            learned = jnp.asarray(read_rows(weights["transformer/w_positions"], np.asarray(rows)))
        return np.asarray(combine(embedding, jnp.asarray(x), learned))

    encoder_output = None
    if config.encoder is not None:
        prefix = "transformer/encoder/"
        renamed = {
            f"transformer/{n.removeprefix(prefix)}": array for n, array in weights.items() if n.startswith(prefix)
        }
        encoder_output = _run_stack(config.encoder, renamed, embed(make_encoder_tokens(tokens)), None, max_memory)
    x = _run_stack(config, weights, embed(tokens), encoder_output, max_memory)
    if config.head == "none":
        return x
    head = weights["transformer/w_tokens" if config.tied_embeddings else "transformer/w_head"]
    product = matmul(x, head, transposed=config.tied_embeddings)
    bias = read_vector(weights["transformer/b_head"]) if config.head_bias else None
    return np.asarray(finish_logits(product, bias, config))


def _run_stack(
    config: ModelConfig,
    weights: Mapping[str, LazyArray],
    x: np.ndarray,
    encoder_output: np.ndarray | None,
    max_memory: int | None,
) -> np.ndarray:
    """Run all layers of a decoder or an encoder on the residual stream [B, T, D] and return the input of the head."""
    outside = _read_params(_select(weights, *OUTSIDE))
    for layers in config.layer_stacks:
        prefix = f"transformer/{layers.name}/"
        stacked = _select(weights, prefix)
        needed = PERIOD_OVERHEAD * _period_bytes(config, layers, stacked)
        if max_memory is None or needed <= max_memory:
            run = _make_period(config, layers)
            for i in range(layers.n_repeats):
                stored = 0 if config.shared_layers else i
                x = np.asarray(run(_read_params(stacked, stored) | outside, jnp.asarray(x), encoder_output))
            continue
        if encoder_output is not None:
            raise CheckpointError(
                f"one repetition of the decoder's layer pattern needs {needed:,} bytes, but --max-memory is {max_memory:,}; "
                "it cannot be divided in an encoder-decoder model, so raise --max-memory"
            )
        inside = {name.removeprefix(prefix): array for name, array in stacked.items()}
        make_context = _transform(lambda x: _attention_context(Transformer(config), x))
        x = run_layers(config, layers, inside, x, make_context(outside, jnp.asarray(x)))
    return np.asarray(_transform(lambda x: Transformer(config).head_input(x))(outside, jnp.asarray(x)))


def _select(weights: Mapping[str, LazyArray], *prefixes: str) -> dict[str, LazyArray]:
    return {name: array for name, array in weights.items() if name.startswith(prefixes)}


def _transform(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of Haiku modules as a pure function whose first argument is the parameters."""
    return hk.without_apply_rng(hk.transform(function)).apply


def _make_period(config: ModelConfig, layers: LayerStack) -> Callable[..., jax.Array]:
    """Return the function (parameters, x, encoder output) -> residual stream after one period of the layers."""

    def run_period(x: jax.Array, encoder_output: jax.Array | None) -> jax.Array:
        transformer = Transformer(config)
        context = _attention_context(transformer, x)
        if encoder_output is not None:
            mask = jnp.ones((1, x.shape[1], encoder_output.shape[1]), bool)
            context = context._replace(encoder_output=EncoderOutput(jnp.asarray(encoder_output), mask))
        return transformer.run_stack(x, context, None, layers._replace(n_repeats=1))[0]

    return jax.jit(_transform(run_period))


def _attention_context(transformer: Transformer, x: jax.Array) -> AttentionContext:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return transformer.attention_context(positions, None, None)


def _read_params(arrays: Mapping[str, LazyArray], index: int | None = None) -> Params:
    """Return arrays, or one index of the first dimension of each, as float32 parameters of Haiku."""
    params: Params = {}
    for name, array in arrays.items():
        everything = full_index(array)
        wanted = everything if index is None else (slice(index, index + 1), *everything[1:])
        module, _, leaf = name.rpartition("/")
        params.setdefault(module, {})[leaf] = jnp.asarray(array.read(wanted).astype(np.float32, copy=False))
    return params


def _period_bytes(config: ModelConfig, layers: LayerStack, stacked: Mapping[str, LazyArray]) -> int:
    """Return the size in bytes of one period of layers: its weights as read, plus the same weights in float32."""
    nbytes = [(4 + array.dtype.itemsize) * math.prod(array.shape) for array in stacked.values()]
    return sum(nbytes) * config.layer_uses // layers.n_repeats
