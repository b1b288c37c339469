# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a foreign checkpoint computes, from its own tensors under its own names in its own layout, in NumPy.

A conversion is held against this. It shares nothing with the importer: no table of names, no pattern of a layout, no
reading of config.json, so that a mistake there shows here. A few rows of a weight are in memory at a time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.special

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.convert.lazy_arrays import Lazy, whole

BLOCK_BYTES = 16_000_000  # of a weight in float32, in memory at once
Array = np.ndarray


class Tensors:
    """Tensors of a model folder by name, with or without the prefix that files of the bare model lack."""

    def __init__(self, tensors: Mapping[str, Lazy], prefix: str):
        self.tensors, self.prefix = tensors, prefix

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or name.removeprefix(self.prefix) in self.tensors

    def find(self, name: str) -> Lazy:
        """The tensor, unread."""
        return self.tensors[name if name in self.tensors else name.removeprefix(self.prefix)]

    def vector(self, name: str) -> Array:
        """A small tensor, float32."""
        tensor = self.find(name)
        return tensor.read(whole(tensor)).astype(np.float32)

    def rows(self, name: str, places: Array) -> Array:
        """Rows of a table, float32 [*places, D]."""
        return read_rows(self.find(name), places)

    def linear(self, name: str, x: Array) -> Array:
        """torch.nn.Linear: its weight is [outputs, inputs]."""
        y = product(x, self.find(f"{name}.weight"), transposed=True)
        return y + self.vector(f"{name}.bias") if f"{name}.bias" in self else y

    def conv(self, name: str, x: Array) -> Array:
        """transformers' Conv1D: its weight is [inputs, outputs]."""
        return product(x, self.find(f"{name}.weight")) + self.vector(f"{name}.bias")

    def norm(self, name: str, x: Array, eps: float) -> Array:
        """LayerNorm."""
        return layer_norm(x, eps) * self.vector(f"{name}.weight") + self.vector(f"{name}.bias")

    def rms(self, name: str, x: Array, eps: float) -> Array:
        """RMSNorm over the last dim."""
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * self.vector(f"{name}.weight")


def read_rows(table: Lazy, places: Array) -> Array:
    """Rows of a table, float32 [*places, D], one read for each that differs."""
    found = {int(i): table.read((slice(int(i), int(i) + 1), whole(table)[1]))[0] for i in np.unique(places)}
    return np.stack([found[int(i)] for i in places.reshape(-1)]).reshape(*places.shape, -1).astype(np.float32)


def product(x: Array, weight: Lazy, *, transposed: bool = False) -> Array:
    """x W, or x W' where W is `transposed`; some rows of W at a time."""
    rows = max(BLOCK_BYTES // max(4 * math.prod(weight.shape[1:]), 1), 1)
    y = np.zeros((*x.shape[:-1], weight.shape[0 if transposed else 1]), np.float32)
    for first in range(0, weight.shape[0], rows):
        part = slice(first, min(first + rows, weight.shape[0]))
        block = weight.read((part, whole(weight)[1])).astype(np.float32)
        if transposed:
            y[..., part] = x @ block.T
        else:
            y += x[..., part] @ block
    return y


def layer_norm(x: Array, eps: float) -> Array:
    """Without scale and bias."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def gelu_tanh(x: Array) -> Array:
    """transformers' gelu_new."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), gelu_tanh),
    **dict.fromkeys(("silu", "swish"), lambda x: x * scipy.special.expit(x)),
    "gelu": lambda x: 0.5 * x * (1 + scipy.special.erf(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
}


def heads(x: Array, n: int) -> Array:
    """[B, T, n C] as [B, n, T, C]."""
    return x.reshape(*x.shape[:2], n, -1).swapaxes(1, 2)


def attend(
    q: Array, k: Array, v: Array, *, scale: float, window: int | None = None, bias: Array | float = 0.0
) -> Array:
    """Causal attention over [B, H, T, C] as [B, T, H C]; each key-value head serves neighbouring heads."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * scale + bias
    distance = np.subtract.outer(np.arange(q.shape[2]), np.arange(q.shape[2]))
    hidden = (distance < 0) | (distance >= (window or q.shape[2]))
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ v
    return mixed.swapaxes(1, 2).reshape(q.shape[0], q.shape[2], -1)


def rotate_pairs(x: Array, r: int) -> Array:
    """The first r channels of [B, H, T, C], neighbours turning together (GPT-J)."""
    angles = np.arange(x.shape[2])[:, None] * 10000.0 ** (-np.arange(0, r, 2) / r)
    turned = (x[..., 0:r:2] + 1j * x[..., 1:r:2]) * np.exp(1j * angles)
    pairs = np.stack([turned.real, turned.imag], axis=-1).reshape(*x.shape[:3], r)
    return np.concatenate([pairs, x[..., r:]], axis=-1).astype(np.float32)


def rotate_halves(x: Array, r: int, frequencies: Array) -> Array:
    """The first r channels of [B, H, T, C], channel i turning with i + r / 2 (GPT-NeoX, Llama)."""
    turned = (x[..., : r // 2] + 1j * x[..., r // 2 : r]) * np.exp(1j * np.arange(x.shape[2])[:, None] * frequencies)
    return np.concatenate([turned.real, turned.imag, x[..., r:]], axis=-1).astype(np.float32)


def run_gpt2(t: Tensors, c: Mapping[str, Any], tokens: Array) -> Array:
    """GPT2LMHeadModel."""
    act, eps = ACTIVATIONS[c.get("activation_function", "gelu_new")], c.get("layer_norm_epsilon", 1e-5)
    p = "transformer."
    x = t.rows(f"{p}wte.weight", tokens) + t.rows(f"{p}wpe.weight", np.arange(tokens.shape[1]))
    for i in range(c["n_layer"]):
        h = f"{p}h.{i}."
        q, k, v = np.split(t.conv(f"{h}attn.c_attn", t.norm(f"{h}ln_1", x, eps)), 3, axis=-1)
        q, k, v = (heads(y, c["n_head"]) for y in (q, k, v))
        x = x + t.conv(f"{h}attn.c_proj", attend(q, k, v, scale=q.shape[-1] ** -0.5))
        x = x + t.conv(f"{h}mlp.c_proj", act(t.conv(f"{h}mlp.c_fc", t.norm(f"{h}ln_2", x, eps))))
    return _head(t, c, t.norm(f"{p}ln_f", x, eps), "lm_head", f"{p}wte.weight", tied=True)


def run_gpt_neo(t: Tensors, c: Mapping[str, Any], tokens: Array) -> Array:
    """GPTNeoForCausalLM: scores are not scaled."""
    act, eps = ACTIVATIONS[c.get("activation_function", "gelu_new")], c.get("layer_norm_epsilon", 1e-5)
    p = "transformer."
    kinds = [kind for group, times in c["attention_types"] for kind in group * times]
    x = t.rows(f"{p}wte.weight", tokens) + t.rows(f"{p}wpe.weight", np.arange(tokens.shape[1]))
    for i, kind in enumerate(kinds):
        h = f"{p}h.{i}."
        normed = t.norm(f"{h}ln_1", x, eps)
        q, k, v = (heads(t.linear(f"{h}attn.attention.{y}_proj", normed), c["num_heads"]) for y in "qkv")
        window = c.get("window_size", 256) if kind == "local" else None
        x = x + t.linear(f"{h}attn.attention.out_proj", attend(q, k, v, scale=1.0, window=window))
        x = x + t.linear(f"{h}mlp.c_proj", act(t.linear(f"{h}mlp.c_fc", t.norm(f"{h}ln_2", x, eps))))
    return _head(t, c, t.norm(f"{p}ln_f", x, eps), "lm_head", f"{p}wte.weight", tied=True)


def run_gptj(t: Tensors, c: Mapping[str, Any], tokens: Array) -> Array:
    """GPTJForCausalLM."""
    act, eps = ACTIVATIONS[c.get("activation_function", "gelu_new")], c.get("layer_norm_epsilon", 1e-5)
    p = "transformer."
    x = t.rows(f"{p}wte.weight", tokens)
    for i in range(c["n_layer"]):
        h = f"{p}h.{i}."
        normed = t.norm(f"{h}ln_1", x, eps)
        q, k, v = (heads(t.linear(f"{h}attn.{y}_proj", normed), c["n_head"]) for y in "qkv")
        r = c.get("rotary_dim") or q.shape[-1]
        mixed = attend(rotate_pairs(q, r), rotate_pairs(k, r), v, scale=q.shape[-1] ** -0.5)
        x = (
            x
            + t.linear(f"{h}attn.out_proj", mixed)
            + t.linear(f"{h}mlp.fc_out", act(t.linear(f"{h}mlp.fc_in", normed)))
        )
    return _head(t, c, t.norm(f"{p}ln_f", x, eps), "lm_head", f"{p}wte.weight", tied=False)


def run_gpt_neox(t: Tensors, c: Mapping[str, Any], tokens: Array) -> Array:
    """GPTNeoXForCausalLM: q, k and v of a head lie side by side."""
    act, eps, p = ACTIVATIONS[c.get("hidden_act", "gelu")], c.get("layer_norm_eps", 1e-5), "gpt_neox."
    rope = c.get("rope_parameters") or {}
    base = rope.get("rope_theta") or c.get("rotary_emb_base", 10000)
    share = rope.get("partial_rotary_factor") or c.get("rotary_pct", 0.25)
    x = t.rows(f"{p}embed_in.weight", tokens)
    for i in range(c["num_hidden_layers"]):
        h = f"{p}layers.{i}."
        fused = t.linear(f"{h}attention.query_key_value", t.norm(f"{h}input_layernorm", x, eps))
        q, k, v = np.split(heads(fused, c["num_attention_heads"]), 3, axis=-1)
        r = int(q.shape[-1] * share)
        frequencies = base ** (-np.arange(0, r, 2) / r)
        q, k = rotate_halves(q, r, frequencies), rotate_halves(k, r, frequencies)
        mixed = t.linear(f"{h}attention.dense", attend(q, k, v, scale=q.shape[-1] ** -0.5))
        before = x if c.get("use_parallel_residual", True) else x + mixed
        wide = act(t.linear(f"{h}mlp.dense_h_to_4h", t.norm(f"{h}post_attention_layernorm", before, eps)))
        x = x + mixed + t.linear(f"{h}mlp.dense_4h_to_h", wide)
    head = "embed_out" if "embed_out.weight" in t else "lm_head"
    return _head(t, c, t.norm(f"{p}final_layer_norm", x, eps), head, f"{p}embed_in.weight", tied=False)


def run_llama(t: Tensors, c: Mapping[str, Any], tokens: Array) -> Array:
    """LlamaForCausalLM, and Mistral, Mixtral, Qwen2 and Qwen3, which differ in windows, experts, biases and norms of heads."""
    act, eps, p, kind = ACTIVATIONS[c.get("hidden_act", "silu")], c.get("rms_norm_eps", 1e-6), "model.", c["model_type"]
    frequencies, windows = None, _llama_windows(c, kind)
    x = t.rows(f"{p}embed_tokens.weight", tokens)
    for i in range(c["num_hidden_layers"]):
        h = f"{p}layers.{i}."
        normed, n = t.rms(f"{h}input_layernorm", x, eps), c["num_attention_heads"]
        n_kv = c.get("num_key_value_heads") or n
        q, k, v = (
            heads(t.linear(f"{h}self_attn.{y}_proj", normed), m) for y, m in (("q", n), ("k", n_kv), ("v", n_kv))
        )
        if f"{h}self_attn.q_norm.weight" in t:
            q, k = (t.rms(f"{h}self_attn.{y}_norm", z, eps) for y, z in (("q", q), ("k", k)))
        if frequencies is None:
            frequencies = _llama_frequencies(c, q.shape[-1])
        q, k = rotate_halves(q, q.shape[-1], frequencies), rotate_halves(k, q.shape[-1], frequencies)
        x = x + t.linear(f"{h}self_attn.o_proj", attend(q, k, v, scale=q.shape[-1] ** -0.5, window=windows[i]))
        normed = t.rms(f"{h}post_attention_layernorm", x, eps)
        if kind == "mixtral":
            x = x + _mix_experts(t, c, f"{h}block_sparse_moe.", normed, act)
        else:
            x = x + _gated(t, normed, act, *(f"{h}mlp.{y}_proj" for y in ("gate", "up", "down")))
    return _head(t, c, t.rms(f"{p}norm", x, eps), "lm_head", f"{p}embed_tokens.weight", tied=False)


def _gated(t: Tensors, x: Array, act: Callable[[Array], Array], gate: str, up: str, down: str) -> Array:
    return t.linear(down, act(t.linear(gate, x)) * t.linear(up, x))


def _mix_experts(t: Tensors, c: Mapping[str, Any], prefix: str, x: Array, act: Callable[[Array], Array]) -> Array:
    """Mixtral: the likeliest experts of each token, weighted by their probabilities among themselves."""
    scores = t.linear(f"{prefix}gate", x)
    lowest = np.sort(scores, axis=-1)[..., -c.get("num_experts_per_tok", 2), None]
    weights = np.where(scores < lowest, 0, np.exp(scores - scores.max(axis=-1, keepdims=True)))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    y = np.zeros_like(x)
    for e in range(scores.shape[-1]):
        if (own := weights[..., e] > 0).any():
            out = _gated(t, x[own], act, *(f"{prefix}experts.{e}.w{n}" for n in (1, 3, 2)))
            y[own] += weights[own][:, e, None] * out
    return y


def _llama_windows(c: Mapping[str, Any], kind: str) -> list[int | None]:
    """Each layer's window: Mistral and Mixtral have one on all, Qwen on the layers that are named or from max_window_layers on."""
    layers = range(c["num_hidden_layers"])
    if kind in ("mistral", "mixtral"):
        return [c.get("sliding_window", 4096 if kind == "mistral" else None) for _ in layers]
    if kind == "llama" or not c.get("use_sliding_window"):
        return [None for _ in layers]
    if c.get("layer_types"):
        return [c["sliding_window"] if named == "sliding_attention" else None for named in c["layer_types"]]
    return [c["sliding_window"] if i >= c.get("max_window_layers", 28) else None for i in layers]


def _llama_frequencies(c: Mapping[str, Any], r: int) -> Array:
    """Llama 3.1 slows waves longer than the trained length over its low factor, and mixes up to its high factor."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    found = (rope.get("rope_theta") or c.get("rope_theta", 10000.0)) ** (-np.arange(0, r, 2) / r)
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return found
    wave, trained = 2 * math.pi / found, rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (trained / wave - low) / (high - low)
    mixed = (1 - smooth) * found / rope["factor"] + smooth * found
    return np.where(wave > trained / low, found / rope["factor"], np.where(wave < trained / high, found, mixed))


def _head(t: Tensors, c: Mapping[str, Any], x: Array, head: str, table: str, *, tied: bool) -> Array:
    if c.get("tie_word_embeddings", tied):
        return product(x, t.find(table), transposed=True)
    return t.linear(head, x)


RUNS = {
    "gpt2": run_gpt2, "gpt_neo": run_gpt_neo, "gptj": run_gptj, "gpt_neox": run_gpt_neox,
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3"), run_llama),
}  # fmt: skip


def run_huggingface(tensors: Mapping[str, Lazy], settings: Mapping[str, Any], tokens: Array) -> Array:
    """Logits [B, T, V] of a model folder's tensors, by its config.json; CheckpointError for a kind that is not here."""
    kind = settings["model_type"]
    if kind not in RUNS:
        raise CheckpointError(f"no way to compute what a {kind} computes; there are: {', '.join(RUNS)}")
    prefix = {"gpt_neox": "gpt_neox."}.get(kind, "transformer." if kind.startswith("gpt") else "model.")
    return RUNS[kind](Tensors(tensors, prefix), settings, tokens)


def run_v1(shards: Sequence[Sequence[Lazy]], settings: Mapping[str, Any], tokens: Array) -> Array:
    """Logits [B, T, V] of mesh-transformer-jax's slim leaves in their order: every shard adds its part, as there."""
    n, pe, d_head = len(shards), settings["pe"], settings["d_model"] // settings["n_heads"]
    leaves = [iter(shard) for shard in shards]
    take = lambda: [next(shard) for shard in leaves]  # noqa: E731  the next leaf of each shard
    vector = lambda leaf: leaf.read(whole(leaf)).astype(np.float32)  # noqa: E731
    places = take() if pe == "fixed" else []
    bias, tables = take(), take()
    x = sum(vector(b) for b in bias) + np.zeros((*tokens.shape, settings["d_model"]), np.float32)
    for s, table in enumerate(tables):
        own = tokens // table.shape[0] == s
        x = x + np.where(own[..., None], read_rows(table, np.where(own, tokens % table.shape[0], 0)), 0)
    if places:
        x = x + np.concatenate([read_rows(part, np.arange(tokens.shape[1])) for part in places], axis=-1)
    order = sorted(range(settings["layers"]), key=lambda layer: f"layer_{layer}")
    layer_norms = settings["norm"].startswith("layernorm")
    n_norms = 2 if layer_norms or settings["norm"].endswith("-bias") else 1
    layers = {layer: [take() for _ in range(8 + n_norms)] for layer in order}
    b_head, w_head, *norm_out = [take() for _ in range(2 + n_norms)]
    relative = [vector(part) for part in take()] if pe == "t5" else []

    def norm(*leaves: Sequence[Lazy]) -> Array:
        """Those of shard 0, the only ones that were used, or the others' mean; "layernorm-nobias" does not use its offset."""
        if not layer_norms:
            *offset, scale = (sum(map(vector, leaf)) / n for leaf in leaves)
            return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-5) * scale + (offset[0] if offset else 0.0)
        scale = vector(leaves[1][0])
        return layer_norm(x, 1e-5) * scale + (vector(leaves[0][0]) if settings["norm"] == "layernorm" else 0.0)

    for layer in range(settings["layers"]):
        w_q, w_v, w_k, w_o, b_in, w_in, b_out, w_out, *norms = layers[layer]
        normed = norm(*norms)
        for s in range(n):
            q, k, v = (heads(product(normed, w[s]), settings["n_heads"] // n) for w in (w_q, w_k, w_v))
            if pe == "rotary":
                r = min(settings.get("pe_rotary_dims", d_head), d_head)
                q, k = rotate_pairs(q, r), rotate_pairs(k, r)
            bias = _t5_bias(relative[s], tokens.shape[1]) if relative else 0.0
            wide = gelu_tanh(product(normed, w_in[s]) + vector(b_in[s]))
            mixed = attend(q, k, v, scale=d_head**-0.5, bias=bias)
            x = x + product(mixed, w_o[s]) + product(wide, w_out[s]) + vector(b_out[s])
    normed = norm(*norm_out)
    return np.concatenate([product(normed, w_head[s]) + vector(b_head[s]) for s in range(n)], axis=-1)


def _t5_bias(table: Array, length: int) -> Array:
    """A bias [H, T, T] for distances to the past: 16 buckets of one, 16 up to 128 that grow."""
    distance = np.maximum(np.subtract.outer(np.arange(length), np.arange(length)), 0)
    grown = 16 + (np.log(np.maximum(distance, 1) / 16) / math.log(128 / 16) * 16).astype(int)
    return table[:, np.where(distance < 16, distance, np.minimum(grown, 31))]
