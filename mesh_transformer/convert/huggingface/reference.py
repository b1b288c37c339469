# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""NumPy reference implementations of decoder-only Hugging Face models, computed from the tensors of their files.

A conversion is verified by comparing its logits with those of the reference implementation. The reference shares no code
with the importer's tensor names and layouts, so the comparison reveals mistakes in them. Importer and reference both read
config.json through `HFConfig`, so only a comparison with transformers (library_logits.py) reveals mistakes in `HFConfig`.
Only a few rows of a weight are in memory at a time.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.special

from mesh_transformer.convert.lazy_arrays import LazyArray, full_index

BLOCK_BYTES = 16_000_000  # bytes of the float32 rows of a weight that are in memory at once
Array = np.ndarray


class ExternalTensors:
    """Tensors of a model folder by name; files of a model without a head lack the prefix of the names."""

    def __init__(self, tensors: Mapping[str, LazyArray], prefix: str):
        self.tensors = tensors
        self.prefix = prefix

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or name.removeprefix(self.prefix) in self.tensors

    def find(self, name: str) -> LazyArray:
        """Return a tensor without reading it."""
        return self.tensors[name if name in self.tensors else name.removeprefix(self.prefix)]

    def vector(self, name: str) -> Array:
        """Return all values of a small tensor as float32."""
        return read_vector(self.find(name))

    def rows(self, name: str, indices: Array) -> Array:
        """Return rows of a matrix, float32 [*indices, D]."""
        return read_rows(self.find(name), indices)

    def linear(self, name: str, x: Array) -> Array:
        """Apply torch.nn.Linear, whose weight is [outputs, inputs]."""
        y = matmul(x, self.find(f"{name}.weight"), transposed=True)
        return y + self.vector(f"{name}.bias") if f"{name}.bias" in self else y

    def conv(self, name: str, x: Array) -> Array:
        """Apply transformers' Conv1D, whose weight is [inputs, outputs]."""
        return matmul(x, self.find(f"{name}.weight")) + self.vector(f"{name}.bias")

    def norm(self, name: str, x: Array, eps: float) -> Array:
        """Apply LayerNorm."""
        return layer_norm(x, eps) * self.vector(f"{name}.weight") + self.vector(f"{name}.bias")

    def rms(self, name: str, x: Array, eps: float) -> Array:
        """Apply RMSNorm over the last dimension."""
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * self.vector(f"{name}.weight")


def read_vector(array: LazyArray) -> Array:
    """Return all values of a small array as float32."""
    return array.read(full_index(array)).astype(np.float32)


def read_rows(matrix: LazyArray, indices: Array) -> Array:
    """Return rows of a matrix, float32 [*indices, D]; each distinct row is read once."""
    columns = full_index(matrix)[1]
    rows = {int(i): matrix.read((slice(int(i), int(i) + 1), columns))[0] for i in np.unique(indices)}
    return np.stack([rows[int(i)] for i in indices.reshape(-1)]).reshape(*indices.shape, -1).astype(np.float32)


def matmul(x: Array, weight: LazyArray, *, transposed: bool = False) -> Array:
    """Return x W, or x W^T if `transposed`, reading some rows of W at a time."""
    rows = max(BLOCK_BYTES // max(4 * math.prod(weight.shape[1:]), 1), 1)
    y = np.zeros((*x.shape[:-1], weight.shape[0 if transposed else 1]), np.float32)
    for first in range(0, weight.shape[0], rows):
        part = slice(first, min(first + rows, weight.shape[0]))
        block = weight.read((part, full_index(weight)[1])).astype(np.float32)
        if transposed:
            y[..., part] = x @ block.T
        else:
            y += x[..., part] @ block
    return y


def layer_norm(x: Array, eps: float) -> Array:
    """Return LayerNorm of x without scale and bias."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def gelu_tanh(x: Array) -> Array:
    """Return the tanh approximation of GELU, which transformers calls gelu_new."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), gelu_tanh),
    **dict.fromkeys(("silu", "swish"), lambda x: x * scipy.special.expit(x)),
    "gelu": lambda x: 0.5 * x * (1 + scipy.special.erf(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
}


def split_heads(x: Array, n: int) -> Array:
    """Reshape [B, T, n C] to [B, n, T, C]."""
    return x.reshape(*x.shape[:2], n, -1).swapaxes(1, 2)


def attend(
    q: Array, k: Array, v: Array, *, scale: float, window: int | None = None, bias: Array | float = 0.0
) -> Array:
    """Return causal attention over [B, H, T, C] as [B, T, H C]; neighboring query heads share a key-value head."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * scale + bias
    distance = np.subtract.outer(np.arange(q.shape[2]), np.arange(q.shape[2]))
    masked = (distance < 0) | (distance >= (window or q.shape[2]))
    scores = np.where(masked, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    output = (weights / weights.sum(axis=-1, keepdims=True)) @ v
    return output.swapaxes(1, 2).reshape(q.shape[0], q.shape[2], -1)


def apply_rope_interleaved(x: Array, r: int) -> Array:
    """Rotate the first r channels of [B, H, T, C] in pairs of neighboring channels (GPT-J)."""
    angles = np.arange(x.shape[2])[:, None] * 10000.0 ** (-np.arange(0, r, 2) / r)
    rotated = (x[..., 0:r:2] + 1j * x[..., 1:r:2]) * np.exp(1j * angles)
    pairs = np.stack([rotated.real, rotated.imag], axis=-1).reshape(*x.shape[:3], r)
    return np.concatenate([pairs, x[..., r:]], axis=-1).astype(np.float32)


def apply_rope_half(x: Array, r: int, frequencies: Array) -> Array:
    """Rotate the first r channels of [B, H, T, C], channel i together with i + r / 2 (GPT-NeoX, Llama)."""
    angles = np.arange(x.shape[2])[:, None] * frequencies
    rotated = (x[..., : r // 2] + 1j * x[..., r // 2 : r]) * np.exp(1j * angles)
    return np.concatenate([rotated.real, rotated.imag, x[..., r:]], axis=-1).astype(np.float32)


def run_gpt2(t: ExternalTensors, c: Mapping[str, Any], tokens: Array) -> Array:
    """Return the logits of GPT2LMHeadModel."""
    act = ACTIVATIONS[c["activation_function"]]
    eps = c["layer_norm_epsilon"]
    p = "transformer."
    x = t.rows(f"{p}wte.weight", tokens) + t.rows(f"{p}wpe.weight", np.arange(tokens.shape[1]))
    for i in range(c["n_layer"]):
        h = f"{p}h.{i}."
        q, k, v = np.split(t.conv(f"{h}attn.c_attn", t.norm(f"{h}ln_1", x, eps)), 3, axis=-1)
        q, k, v = (split_heads(y, c["n_head"]) for y in (q, k, v))
        x = x + t.conv(f"{h}attn.c_proj", attend(q, k, v, scale=q.shape[-1] ** -0.5))
        x = x + t.conv(f"{h}mlp.c_proj", act(t.conv(f"{h}mlp.c_fc", t.norm(f"{h}ln_2", x, eps))))
    return _head(t, c, t.norm(f"{p}ln_f", x, eps), "lm_head", f"{p}wte.weight")


def run_gpt_neo(t: ExternalTensors, c: Mapping[str, Any], tokens: Array) -> Array:
    """Return the logits of GPTNeoForCausalLM, whose attention scores are not scaled."""
    act = ACTIVATIONS[c["activation_function"]]
    eps = c["layer_norm_epsilon"]
    p = "transformer."
    types = c["attention_types"] or [[["global", "local"], 12]]
    kinds = c.get("attention_layers") or [kind for group, times in types for kind in group * times]
    x = t.rows(f"{p}wte.weight", tokens) + t.rows(f"{p}wpe.weight", np.arange(tokens.shape[1]))
    for i, kind in enumerate(kinds):
        h = f"{p}h.{i}."
        normed = t.norm(f"{h}ln_1", x, eps)
        q, k, v = (split_heads(t.linear(f"{h}attn.attention.{y}_proj", normed), c["num_heads"]) for y in "qkv")
        window = c["window_size"] if kind == "local" else None
        x = x + t.linear(f"{h}attn.attention.out_proj", attend(q, k, v, scale=1.0, window=window))
        x = x + t.linear(f"{h}mlp.c_proj", act(t.linear(f"{h}mlp.c_fc", t.norm(f"{h}ln_2", x, eps))))
    return _head(t, c, t.norm(f"{p}ln_f", x, eps), "lm_head", f"{p}wte.weight")


def run_gptj(t: ExternalTensors, c: Mapping[str, Any], tokens: Array) -> Array:
    """Return the logits of GPTJForCausalLM."""
    act = ACTIVATIONS[c["activation_function"]]
    eps = c["layer_norm_epsilon"]
    p = "transformer."
    x = t.rows(f"{p}wte.weight", tokens)
    for i in range(c["n_layer"]):
        h = f"{p}h.{i}."
        normed = t.norm(f"{h}ln_1", x, eps)
        q, k, v = (split_heads(t.linear(f"{h}attn.{y}_proj", normed), c["n_head"]) for y in "qkv")
        q, k = apply_rope_interleaved(q, c["rotary_dim"]), apply_rope_interleaved(k, c["rotary_dim"])
        attention = attend(q, k, v, scale=q.shape[-1] ** -0.5)
        hidden = act(t.linear(f"{h}mlp.fc_in", normed))
        x = x + t.linear(f"{h}attn.out_proj", attention) + t.linear(f"{h}mlp.fc_out", hidden)
    return _head(t, c, t.norm(f"{p}ln_f", x, eps), "lm_head", f"{p}wte.weight")


def run_gpt_neox(t: ExternalTensors, c: Mapping[str, Any], tokens: Array) -> Array:
    """Return the logits of GPTNeoXForCausalLM, which stores q, k and v of a head next to each other."""
    act = ACTIVATIONS[c["hidden_act"]]
    eps = c["layer_norm_eps"]
    p = "gpt_neox."
    rope = c["rope_parameters"]
    x = t.rows(f"{p}embed_in.weight", tokens)
    for i in range(c["num_hidden_layers"]):
        h = f"{p}layers.{i}."
        fused = t.linear(f"{h}attention.query_key_value", t.norm(f"{h}input_layernorm", x, eps))
        q, k, v = np.split(split_heads(fused, c["num_attention_heads"]), 3, axis=-1)
        r = int(q.shape[-1] * rope["partial_rotary_factor"])
        frequencies = _rope_frequencies(rope, r)
        q, k = apply_rope_half(q, r, frequencies), apply_rope_half(k, r, frequencies)
        attention = t.linear(f"{h}attention.dense", attend(q, k, v, scale=q.shape[-1] ** -0.5))
        mlp_input = x if c["use_parallel_residual"] else x + attention
        hidden = act(t.linear(f"{h}mlp.dense_h_to_4h", t.norm(f"{h}post_attention_layernorm", mlp_input, eps)))
        x = x + attention + t.linear(f"{h}mlp.dense_4h_to_h", hidden)
    head = "embed_out" if "embed_out.weight" in t else "lm_head"
    return _head(t, c, t.norm(f"{p}final_layer_norm", x, eps), head, f"{p}embed_in.weight")


def run_llama(t: ExternalTensors, c: Mapping[str, Any], tokens: Array) -> Array:
    """Return the logits of Llama, Mistral, Mixtral, Arcee, Qwen2 or Qwen3, which differ in windows, experts and norms."""
    act = ACTIVATIONS[c["hidden_act"]]
    eps = c["rms_norm_eps"]
    kind = c["model_type"]
    p = "model."
    frequencies = None
    windows = _llama_windows(c, kind)
    x = t.rows(f"{p}embed_tokens.weight", tokens)
    for i in range(c["num_hidden_layers"]):
        h = f"{p}layers.{i}."
        normed = t.rms(f"{h}input_layernorm", x, eps)
        n = c["num_attention_heads"]
        n_kv = c["num_key_value_heads"] or n
        q, k, v = (
            split_heads(t.linear(f"{h}self_attn.{y}_proj", normed), m) for y, m in (("q", n), ("k", n_kv), ("v", n_kv))
        )
        if f"{h}self_attn.q_norm.weight" in t:
            q, k = (t.rms(f"{h}self_attn.{y}_norm", z, eps) for y, z in (("q", q), ("k", k)))
        if frequencies is None:
            frequencies = _rope_frequencies(c["rope_parameters"], q.shape[-1])
        q, k = apply_rope_half(q, q.shape[-1], frequencies), apply_rope_half(k, q.shape[-1], frequencies)
        x = x + t.linear(f"{h}self_attn.o_proj", attend(q, k, v, scale=q.shape[-1] ** -0.5, window=windows[i]))
        normed = t.rms(f"{h}post_attention_layernorm", x, eps)
        if kind == "mixtral":
            x = x + _run_experts(t, c, f"{h}block_sparse_moe.", normed, act)
        elif kind == "arcee":
            x = x + t.linear(f"{h}mlp.down_proj", act(t.linear(f"{h}mlp.up_proj", normed)))
        else:
            x = x + _gated(t, normed, act, *(f"{h}mlp.{y}_proj" for y in ("gate", "up", "down")))
    return _head(t, c, t.rms(f"{p}norm", x, eps), "lm_head", f"{p}embed_tokens.weight")


def _gated(t: ExternalTensors, x: Array, act: Callable[[Array], Array], gate: str, up: str, down: str) -> Array:
    return t.linear(down, act(t.linear(gate, x)) * t.linear(up, x))


def _run_experts(
    t: ExternalTensors, c: Mapping[str, Any], prefix: str, x: Array, act: Callable[[Array], Array]
) -> Array:
    """Return the sum of each token's top-k experts, weighted by their router probabilities, which sum to 1 (Mixtral)."""
    scores = t.linear(f"{prefix}gate", x)
    lowest = np.sort(scores, axis=-1)[..., -c["num_experts_per_tok"], None]
    weights = np.where(scores < lowest, 0, np.exp(scores - scores.max(axis=-1, keepdims=True)))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    y = np.zeros_like(x)
    for e in range(scores.shape[-1]):
        if (is_routed := weights[..., e] > 0).any():
            out = _gated(t, x[is_routed], act, *(f"{prefix}experts.{e}.w{n}" for n in (1, 3, 2)))
            y[is_routed] += weights[is_routed][:, e, None] * out
    return y


def _llama_windows(c: Mapping[str, Any], kind: str) -> list[int | None]:
    """Return the attention window of each layer.

    In Mistral and Mixtral all layers have a window. In Qwen the layers with the layer_type sliding_attention have a window,
    by default the layers from max_window_layers on.
    """
    layers = range(c["num_hidden_layers"])
    if kind in ("mistral", "mixtral"):
        return [c["sliding_window"] for _ in layers]
    if kind in ("llama", "arcee") or not c["use_sliding_window"]:
        return [None for _ in layers]
    if c["layer_types"]:
        return [c["sliding_window"] if name == "sliding_attention" else None for name in c["layer_types"]]
    return [c["sliding_window"] if i >= c["max_window_layers"] else None for i in layers]


def _rope_frequencies(rope: Mapping[str, Any], r: int) -> Array:
    """Return the RoPE frequencies.

    Llama 3.1 divides the frequencies with wavelengths above trained length / low_freq_factor by `factor`, keeps the
    frequencies with wavelengths below trained length / high_freq_factor, and interpolates between these two cases.
    """
    frequencies = rope["rope_theta"] ** (-np.arange(0, r, 2) / r)
    if rope["rope_type"] != "llama3":
        return frequencies
    wavelength = 2 * math.pi / frequencies
    trained = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (trained / wavelength - low) / (high - low)
    interpolated = (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
    kept_or_interpolated = np.where(wavelength < trained / high, frequencies, interpolated)
    return np.where(wavelength > trained / low, frequencies / rope["factor"], kept_or_interpolated)


def _head(t: ExternalTensors, c: Mapping[str, Any], x: Array, head: str, embedding: str) -> Array:
    if c["tie_word_embeddings"]:
        return matmul(x, t.find(embedding), transposed=True)
    return t.linear(head, x)
