# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The same prompts through both sides of a conversion: our model a layer at a time, and the foreign side in its own layout."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.gptj.reader import find_weights
from mesh_transformer.convert.huggingface.reference import product, read_rows, run_huggingface, run_v1
from mesh_transformer.convert.huggingface.reference_t5 import run_t5
from mesh_transformer.convert.huggingface.tensor_files import find_tensors
from mesh_transformer.convert.huggingface.tensor_map import WITH_ENCODER
from mesh_transformer.convert.import_plan import PREFIX, make_model_config
from mesh_transformer.convert.lazy_arrays import Lazy, whole
from mesh_transformer.convert.out_of_core_forward import run_layers
from mesh_transformer.convert.reshard import Source
from mesh_transformer.model.attention.masks import AttentionContext, EncoderOutput
from mesh_transformer.model.norms import Norm
from mesh_transformer.model.params import STACK
from mesh_transformer.model.transformer import Transformer
from mesh_transformer.storage.errors import CheckpointError

PROMPTS, PROMPT_LEN = 2, 32
TOLERANCE = 1e-4  # of the largest logit: what float32 arithmetic in another order may differ by, after tens of layers
OVERHEAD = 2  # times the values of a layer as read and in float32: what running it takes


class Difference(NamedTuple):
    """How far the logits of two checkpoints are apart."""

    largest: float
    scale: float  # the largest logit
    tokens: int


def compare_logits(
    source: Source, result: Source, ceiling: int, progress: Callable[[str, int, int], None]
) -> Difference:
    """The largest difference over random prompts, in about `ceiling` bytes; `progress` hears of those read, as in reshard.py."""
    config = make_model_config(source.foreign.model, source.path)
    shape = (PROMPTS, min(PROMPT_LEN, config.seq_len))
    tokens = np.random.default_rng(0).integers(0, config.n_vocab, shape, dtype=np.int32)
    sizes = [sum(_nbytes(array) for array in side.foreign.arrays.values()) for side in (source, result)]
    progress("comparing logits", 0, sum(sizes))
    theirs = run_source(source, tokens, ceiling)
    progress("comparing logits", sizes[0], sum(sizes))
    ours = run_source(result, tokens, ceiling)
    progress("comparing logits", sum(sizes), sum(sizes))
    return Difference(float(np.abs(theirs - ours).max()), float(np.abs(theirs).max()), tokens.size)


def run_source(source: Source, tokens: np.ndarray, ceiling: int) -> np.ndarray:
    """Logits [B, T, V], float32, of a checkpoint of any kind, by its own layout."""
    match source.kind:
        case "huggingface":
            if source.settings["model_type"] in WITH_ENCODER:
                sources = find_sources(tokens)
                return run_t5(find_tensors(source.path), source.settings, tokens, sources, np.ones_like(sources))
            return run_huggingface(find_tensors(source.path), source.settings, tokens)
        case "gptj-v1":
            return run_v1(find_weights(source.path, source.settings), source.settings, tokens)
        case _:
            return run_native(
                make_model_config(source.foreign.model, source.path), source.foreign.arrays, tokens, ceiling
            )


def run_native(
    config: ModelConfig, arrays: Mapping[str, Lazy], tokens: np.ndarray, ceiling: int | None = None
) -> np.ndarray:
    """Logits [B, T, V] of our model, float32; one period of its layers in memory at a time, or less to keep a ceiling."""
    config = dataclasses.replace(config, dtype="float32", dropout=0.0, attention_kernel="dense", preset=None)
    weights = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}

    def embed(ids: np.ndarray) -> np.ndarray:
        x = read_rows(weights["transformer/w_tokens"], ids)
        learned = config.positions == "learned"
        return x + read_rows(weights["transformer/w_positions"], np.arange(ids.shape[1])) if learned else x

    memory = None
    if config.encoder is not None:
        start = "transformer/encoder/"
        inside = {f"transformer/{name.removeprefix(start)}": a for name, a in weights.items() if name.startswith(start)}
        memory = _run_stack(config.encoder, inside, embed(find_sources(tokens)), None, ceiling)
    x = _run_stack(config, weights, embed(tokens), memory, ceiling)
    x = x * config.d_model**-0.5 if config.logit_scale == "rsqrt_d_model" else x
    head = "transformer/w_tokens" if config.tied_embeddings else "transformer/w_head"
    logits = product(x, weights[head], transposed=config.tied_embeddings)
    if config.head_bias:
        bias = weights["transformer/b_head"]
        logits = logits + bias.read(whole(bias)).astype(np.float32)
    return logits


def find_sources(tokens: np.ndarray) -> np.ndarray:
    """What an encoder reads beside these prompts: other ones, as long."""
    return np.ascontiguousarray(tokens[:, ::-1])


def _run_stack(
    config: ModelConfig, weights: Mapping[str, Lazy], x: np.ndarray, memory: np.ndarray | None, ceiling: int | None
) -> np.ndarray:
    """All layers of a decoder or an encoder over the stream [B, T, D], and the norm behind them."""
    pattern = len(config.pattern)
    period = dataclasses.replace(config, n_layers=pattern)
    layers = jax.jit(hk.without_apply_rng(hk.transform(lambda x, memory: _run_period(period, x, memory))).apply)
    see = hk.without_apply_rng(hk.transform(lambda x: _see(Transformer(config), x)))
    norm = hk.without_apply_rng(hk.transform(lambda x: Norm(config, name="norm_out")(x)))
    outside = {
        name: a
        for name, a in weights.items()
        if name.startswith(("transformer/norm_out/", "transformer/relative_bias/"))
    }
    rows = {name: array for name, array in weights.items() if name.startswith(f"transformer/{STACK}/")}
    in_parts = ceiling is not None and OVERHEAD * _count_period(config, rows) > ceiling
    if in_parts:
        if memory is not None:
            raise CheckpointError(
                "a decoder with an encoder is run a period of its layers at a time: raise --max-memory"
            )
        inside = {name.removeprefix(f"transformer/{STACK}/"): array for name, array in rows.items()}
        x = run_layers(config, inside, x, see.apply(_read(outside), jnp.asarray(x)))
    for i in range(0 if in_parts else config.n_layers // pattern):
        x = np.asarray(layers(_read(rows, i) | _read(outside), jnp.asarray(x), memory))
    return np.asarray(norm.apply({"norm_out": _read(outside)["transformer/norm_out"]}, jnp.asarray(x)))


def _run_period(config: ModelConfig, x: jax.Array, memory: jax.Array | None) -> jax.Array:
    transformer = Transformer(config)
    sight = _see(transformer, x)
    if memory is not None:
        sight = sight._replace(memory=EncoderOutput(memory, jnp.ones((1, x.shape[1], memory.shape[1]), bool)))
    return transformer.run_layers(x, sight, None)[0]


def _see(transformer: Transformer, x: jax.Array) -> AttentionContext:
    return transformer.see(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), None, None)


def _read(arrays: Mapping[str, Lazy], place: int | None = None) -> dict[str, dict[str, jax.Array]]:
    """Arrays, or the row `place` of each, as parameters in float32."""
    params: dict[str, dict[str, jax.Array]] = {}
    for name, array in arrays.items():
        index = whole(array) if place is None else (slice(place, place + 1), *whole(array)[1:])
        module, _, leaf = name.rpartition("/")
        params.setdefault(module, {})[leaf] = jnp.asarray(array.read(index).astype(np.float32, copy=False))
    return params


def _count_period(config: ModelConfig, stacked: Mapping[str, Lazy]) -> int:
    """Bytes of one period of layers, as read and in float32."""
    sizes = [(4 + array.dtype.itemsize) * math.prod(array.shape) for array in stacked.values()]
    return sum(sizes) * len(config.pattern) // config.n_layers


def _nbytes(array: Lazy) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
