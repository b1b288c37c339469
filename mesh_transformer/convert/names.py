# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""One row for each Hugging Face family: its config.json and its tensors' names and layouts, used in both directions.

A layout is a pattern of lazy.View: "(heads head_dim) embed" is what PyTorch's Linear makes of our [embed, heads, head_dim].
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig


class Entry(NamedTuple):
    """Where an array of ours is in a file of theirs; {i} is the layer."""

    theirs: str
    pattern: str
    pick: int = 0  # place in the dim of the pattern that is a number
    aliases: tuple[str, ...] = ()  # names it has had


class Family(NamedTuple):
    """A row of this module's table."""

    architecture: str
    entries: Mapping[str, Entry]
    read_config: Callable[["Settings"], dict[str, Any]]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    prefix: str  # of names, which files of the bare model lack
    buffers: tuple[str, ...] = ()  # ends of names that are no weights


class Settings:
    """A config.json that is asked for one key after the other; what was not asked for does not matter to the function."""

    def __init__(self, table: Mapping[str, Any], where: object):
        self.table, self.where = table, where

    def get(self, *keys: str, default: Any = None) -> Any:
        """The value of the first of `keys` that is there; CheckpointError where there is neither one nor a default."""
        for key in keys:
            if self.table.get(key) is not None:
                return self.table[key]
        if default is None:
            raise CheckpointError(f"{self.where}: lacks {' or '.join(keys)}")
        return default

    def expect(self, key: str, *allowed: Any) -> None:
        """CheckpointError unless the key is absent, null, or one of `allowed`: other values are other functions."""
        value = self.table.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{self.where}: {key} = {value!r} is not supported; supported: {allowed}")

    def choose(self, choices: Mapping[Any, str], *keys: str, default: Any) -> str:
        """Our word for a choice of theirs."""
        value = self.get(*keys, default=default)
        if value not in choices:
            raise CheckpointError(f"{self.where}: {keys[0]} = {value!r} is not supported; supported: {list(choices)}")
        return choices[value]


ACTIVATIONS = {
    "gelu_new": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu": "gelu-erf",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
THEIR_ACTIVATIONS = {"gelu-tanh": "gelu_new", "gelu-erf": "gelu", "relu": "relu", "silu": "silu"}


def linear(ours: str, theirs: str, outputs: str, inputs: str, bias: str = "") -> dict[str, Entry]:
    """A weight [outputs, inputs], as torch.nn.Linear keeps it, and the bias of the same module, called `bias` in ours."""
    found = {ours: Entry(f"{theirs}.weight", f"{_group(outputs)} {_group(inputs)}")}
    return found | ({bias: Entry(f"{theirs}.bias", _group(outputs))} if bias else {})


def _group(words: str) -> str:
    return f"({words})" if " " in words else words


def norms(**names: str) -> dict[str, Entry]:
    """Scale and bias of norms."""
    scales = {f"{ours}/scale": Entry(f"{theirs}.weight", "embed") for ours, theirs in names.items()}
    return scales | {f"{ours}/bias": Entry(f"{theirs}.bias", "embed") for ours, theirs in names.items()}


def projections(theirs: str, **names: str) -> dict[str, Entry]:
    """q, k, v and o, each a Linear; names default to <x>_proj."""
    table: dict[str, Entry] = {}
    for x, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
        module = f"{theirs}.{names.get(x, f'{x}_proj')}"
        table |= linear(f"attention/w_{x}", module, f"{heads} head_dim", "embed", f"attention/b_{x}")
    output = f"{theirs}.{names.get('o', 'o_proj')}"
    return table | linear("attention/w_o", output, "embed", "heads head_dim", "attention/b_o")


def fused(theirs: str, before: str, weight: str) -> dict[str, Entry]:
    """q, k and v in one module: `weight` is its layout, `before` that of its bias; N stands for the heads."""
    table = {}
    for pick, (x, heads) in enumerate((("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))):
        table[f"attention/w_{x}"] = Entry(f"{theirs}.weight", weight.replace("N", heads), pick)
        table[f"attention/b_{x}"] = Entry(f"{theirs}.bias", before.replace("N", heads), pick)
    return table


HEAD = Entry("lm_head.weight", "vocab embed")
H = "transformer.h.{i}"
GPT2 = {
    "w_tokens": Entry("transformer.wte.weight", "vocab embed"),
    "w_positions": Entry("transformer.wpe.weight", "position embed"),
    **norms(norm_1=f"{H}.ln_1", norm_2=f"{H}.ln_2", norm_out="transformer.ln_f"),
    **fused(f"{H}.attn.c_attn", "(3 N head_dim)", "embed (3 N head_dim)"),  # Conv1D keeps [inputs, outputs]
    "attention/w_o": Entry(f"{H}.attn.c_proj.weight", "(heads head_dim) embed"),
    "attention/b_o": Entry(f"{H}.attn.c_proj.bias", "embed"),
    "feed_forward/w_in": Entry(f"{H}.mlp.c_fc.weight", "embed ff"),
    "feed_forward/b_in": Entry(f"{H}.mlp.c_fc.bias", "ff"),
    "feed_forward/w_out": Entry(f"{H}.mlp.c_proj.weight", "ff embed"),
    "feed_forward/b_out": Entry(f"{H}.mlp.c_proj.bias", "embed"),
    "w_head": HEAD,
}
GPT_NEO = {
    "w_tokens": Entry("transformer.wte.weight", "vocab embed"),
    "w_positions": Entry("transformer.wpe.weight", "position embed"),
    **norms(norm_1=f"{H}.ln_1", norm_2=f"{H}.ln_2", norm_out="transformer.ln_f"),
    **projections(f"{H}.attn.attention", o="out_proj"),
    **linear("feed_forward/w_in", f"{H}.mlp.c_fc", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{H}.mlp.c_proj", "embed", "ff", "feed_forward/b_out"),
    "w_head": HEAD,
}
GPT_J = {
    "w_tokens": Entry("transformer.wte.weight", "vocab embed"),
    **norms(norm_1=f"{H}.ln_1", norm_out="transformer.ln_f"),
    **projections(f"{H}.attn", o="out_proj"),
    **linear("feed_forward/w_in", f"{H}.mlp.fc_in", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{H}.mlp.fc_out", "embed", "ff", "feed_forward/b_out"),
    "w_head": HEAD,
    "b_head": Entry("lm_head.bias", "vocab"),
}
X = "gpt_neox.layers.{i}"
GPT_NEOX = {
    "w_tokens": Entry("gpt_neox.embed_in.weight", "vocab embed"),
    **norms(norm_1=f"{X}.input_layernorm", norm_2=f"{X}.post_attention_layernorm"),
    **norms(norm_out="gpt_neox.final_layer_norm"),
    **fused(f"{X}.attention.query_key_value", "(N 3 head_dim)", "(N 3 head_dim) embed"),
    **linear("attention/w_o", f"{X}.attention.dense", "embed", "heads head_dim", "attention/b_o"),
    **linear("feed_forward/w_in", f"{X}.mlp.dense_h_to_4h", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{X}.mlp.dense_4h_to_h", "embed", "ff", "feed_forward/b_out"),
    "w_head": Entry("embed_out.weight", "vocab embed", aliases=("lm_head.weight",)),
}
M = "model.layers.{i}"
LLAMA = {
    "w_tokens": Entry("model.embed_tokens.weight", "vocab embed"),
    **norms(norm_1=f"{M}.input_layernorm", norm_2=f"{M}.post_attention_layernorm", norm_out="model.norm"),
    **projections(f"{M}.self_attn"),
    **linear("feed_forward/w_gate", f"{M}.mlp.gate_proj", "ff", "embed", "feed_forward/b_gate"),
    **linear("feed_forward/w_in", f"{M}.mlp.up_proj", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{M}.mlp.down_proj", "embed", "ff", "feed_forward/b_out"),
    "w_head": HEAD,
}


def read_gpt2(s: Settings) -> dict[str, Any]:
    """GPT2Config."""
    s.expect("scale_attn_weights", True)
    s.expect("scale_attn_by_inverse_layer_idx", False)
    s.expect("add_cross_attention", False)
    model = dict(
        n_layers=s.get("n_layer"), d_model=s.get("n_embd"), n_heads=s.get("n_head"), n_vocab=s.get("vocab_size"),
        seq_len=s.get("n_positions", "n_ctx"), activation=s.choose(ACTIVATIONS, "activation_function", default="gelu_new"),
        norm_eps=s.get("layer_norm_epsilon", default=1e-5), tied_embeddings=s.table.get("tie_word_embeddings", True),
    )  # fmt: skip
    return model | {"d_ff": s.get("n_inner", default=4 * model["d_model"])}


def write_gpt2(c: ModelConfig) -> dict[str, Any]:
    """GPT2Config."""
    return dict(
        n_layer=c.n_layers, n_embd=c.d_model, n_head=c.n_heads, vocab_size=c.n_vocab, n_positions=c.seq_len,
        n_ctx=c.seq_len, activation_function=THEIR_ACTIVATIONS[c.activation], layer_norm_epsilon=c.norm_eps,
        n_inner=c.ff_dim,
    )  # fmt: skip


def read_gpt_neo(s: Settings) -> dict[str, Any]:
    """GPTNeoConfig."""
    kinds = s.table.get("attention_layers")
    if kinds is None:
        kinds = [kind for pattern, count in s.get("attention_types") for _ in range(count) for kind in pattern]
    period = next(
        n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0 and list(kinds[:n]) * (len(kinds) // n) == list(kinds)
    )  # fmt: skip
    model = dict(
        n_layers=s.get("num_layers"), d_model=s.get("hidden_size"), n_heads=s.get("num_heads"),
        n_vocab=s.get("vocab_size"), seq_len=s.get("max_position_embeddings"), attention_pattern=list(kinds[:period]),
        attention_window=s.get("window_size", default=256), attention_scale="none", qkv_bias=False,
        activation=s.choose(ACTIVATIONS, "activation_function", default="gelu_new"),
        norm_eps=s.get("layer_norm_epsilon", default=1e-5), tied_embeddings=s.table.get("tie_word_embeddings", True),
    )  # fmt: skip
    if len(kinds) != model["n_layers"]:
        raise CheckpointError(
            f"{s.where}: attention_types are of {len(kinds)} layers, num_layers = {model['n_layers']}"
        )
    return model | {"d_ff": s.get("intermediate_size", default=4 * model["d_model"])}


def write_gpt_neo(c: ModelConfig) -> dict[str, Any]:
    """GPTNeoConfig."""
    return dict(
        num_layers=c.n_layers, hidden_size=c.d_model, num_heads=c.n_heads, vocab_size=c.n_vocab,
        max_position_embeddings=c.seq_len, window_size=c.attention_window, intermediate_size=c.ff_dim,
        attention_types=[[list(c.attention_pattern), c.n_layers // len(c.attention_pattern)]],
        activation_function=THEIR_ACTIVATIONS[c.activation], layer_norm_epsilon=c.norm_eps,
    )  # fmt: skip


def read_gpt_j(s: Settings) -> dict[str, Any]:
    """GPTJConfig."""
    model = dict(
        n_layers=s.get("n_layer"), d_model=s.get("n_embd"), n_heads=s.get("n_head"), n_vocab=s.get("vocab_size"),
        seq_len=s.get("n_positions"), positions="rotary-pairs", residual="parallel", qkv_bias=False,
        attention_out_bias=False, head_bias=True, tied_embeddings=s.table.get("tie_word_embeddings", False),
        activation=s.choose(ACTIVATIONS, "activation_function", default="gelu_new"), init="gptj",
        norm_eps=s.get("layer_norm_epsilon", default=1e-5),
    )  # fmt: skip
    head = model["d_model"] // model["n_heads"]
    inner = s.get("n_inner", default=4 * model["d_model"])
    return model | {"rotary_dims": s.table.get("rotary_dim") or head, "d_ff": inner}


def write_gpt_j(c: ModelConfig) -> dict[str, Any]:
    """GPTJConfig."""
    return dict(
        n_layer=c.n_layers, n_embd=c.d_model, n_head=c.n_heads, vocab_size=c.n_vocab, n_positions=c.seq_len,
        rotary_dim=c.rotary_channels, n_inner=c.ff_dim, activation_function=THEIR_ACTIVATIONS[c.activation],
        layer_norm_epsilon=c.norm_eps,
    )  # fmt: skip


def _rope(s: Settings, *base_keys: str) -> tuple[dict[str, Any], float]:
    """The rope settings, wherever this version keeps them, and the base."""
    rope = s.table.get("rope_parameters") or s.table.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{s.where}: rotary embeddings of type {kind!r} are not supported; supported: 'default'")
    return rope, float(rope.get("rope_theta") or s.get(*base_keys, default=10_000.0))


def read_gpt_neox(s: Settings) -> dict[str, Any]:
    """GPTNeoXConfig."""
    rope, base = _rope(s, "rotary_emb_base", "rope_theta")
    bias = s.table.get("attention_bias", True)
    model = dict(
        n_layers=s.get("num_hidden_layers"), d_model=s.get("hidden_size"), n_heads=s.get("num_attention_heads"),
        n_vocab=s.get("vocab_size"), seq_len=s.get("max_position_embeddings"), d_ff=s.get("intermediate_size"),
        positions="rotary-halves", rotary_base=base, qkv_bias=bias, attention_out_bias=bias,
        residual="parallel-two-norms" if s.table.get("use_parallel_residual", True) else "serial",
        activation=s.choose(ACTIVATIONS, "hidden_act", default="gelu"), norm_eps=s.get("layer_norm_eps", default=1e-5),
        tied_embeddings=s.table.get("tie_word_embeddings", False), init="neox",
    )  # fmt: skip
    share = rope.get("partial_rotary_factor") or s.get("rotary_pct", "partial_rotary_factor", default=0.25)
    return model | {"rotary_dims": int(model["d_model"] // model["n_heads"] * share)}


def write_gpt_neox(c: ModelConfig) -> dict[str, Any]:
    """GPTNeoXConfig, with the keys of transformers before 5 and since."""
    share = c.rotary_channels / c.head_dim
    return dict(
        num_hidden_layers=c.n_layers, hidden_size=c.d_model, num_attention_heads=c.n_heads, vocab_size=c.n_vocab,
        max_position_embeddings=c.seq_len, intermediate_size=c.ff_dim, rotary_pct=share, rotary_emb_base=c.rotary_base,
        rope_parameters={"rope_type": "default", "rope_theta": c.rotary_base, "partial_rotary_factor": share},
        use_parallel_residual=c.residual == "parallel-two-norms", hidden_act=THEIR_ACTIVATIONS[c.activation],
        layer_norm_eps=c.norm_eps, attention_bias=c.qkv_bias,
    )  # fmt: skip


def read_llama(s: Settings) -> dict[str, Any]:
    """LlamaConfig, MistralConfig and Qwen2Config."""
    s.expect("mlp_bias", False)
    _, base = _rope(s, "rope_theta")
    kind = s.table.get("model_type")
    heads = s.get("num_attention_heads")
    out_bias = s.table.get("attention_bias", False)
    model = dict(
        n_layers=s.get("num_hidden_layers"), d_model=s.get("hidden_size"), n_heads=heads, n_vocab=s.get("vocab_size"),
        seq_len=s.get("max_position_embeddings"), d_ff=s.get("intermediate_size"), norm="rmsnorm",
        n_kv_heads=s.get("num_key_value_heads", default=heads), d_head=s.get("head_dim", default=s.get("hidden_size") // heads),
        positions="rotary-halves", rotary_base=base, activation=s.choose(ACTIVATIONS, "hidden_act", default="silu"),
        gated=True, qkv_bias=True if kind == "qwen2" else out_bias, attention_out_bias=out_bias, ff_bias=False,
        norm_eps=s.get("rms_norm_eps", default=1e-6), tied_embeddings=s.table.get("tie_word_embeddings", False),
    )  # fmt: skip
    window = s.table.get("sliding_window")
    if window and (kind == "mistral" or s.table.get("use_sliding_window")):
        if s.table.get("use_sliding_window") and s.get("max_window_layers", default=0) != 0:
            raise CheckpointError(f"{s.where}: max_window_layers, windows on some layers only, is not supported")
        model |= dict(attention_pattern=["local"], attention_window=window)
    return model


def write_llama(c: ModelConfig) -> dict[str, Any]:
    """LlamaConfig, MistralConfig or Qwen2Config."""
    table = dict(
        num_hidden_layers=c.n_layers, hidden_size=c.d_model, num_attention_heads=c.n_heads, vocab_size=c.n_vocab,
        max_position_embeddings=c.seq_len, intermediate_size=c.ff_dim, num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim, hidden_act=THEIR_ACTIVATIONS[c.activation], rms_norm_eps=c.norm_eps, mlp_bias=False,
        attention_bias=c.attention_out_bias, rope_theta=c.rotary_base,
        rope_parameters={"rope_type": "default", "rope_theta": c.rotary_base},
    )  # fmt: skip
    if "local" in c.attention_pattern:
        table |= dict(sliding_window=c.attention_window)
    return table


FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", GPT2, read_gpt2, write_gpt2, "transformer.", (".attn.bias", ".attn.masked_bias")),
    "gpt_neo": Family(
        "GPTNeoForCausalLM", GPT_NEO, read_gpt_neo, write_gpt_neo, "transformer.",
        (".attn.attention.bias", ".attn.attention.masked_bias"),
    ),
    "gptj": Family("GPTJForCausalLM", GPT_J, read_gpt_j, write_gpt_j, "transformer.", (".attn.bias", ".attn.masked_bias")),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", GPT_NEOX, read_gpt_neox, write_gpt_neox, "gpt_neox.",
        (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
    "llama": Family("LlamaForCausalLM", LLAMA, read_llama, write_llama, "model.", (".rotary_emb.inv_freq",)),
    "mistral": Family("MistralForCausalLM", LLAMA, read_llama, write_llama, "model.", (".rotary_emb.inv_freq",)),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA, read_llama, write_llama, "model.", (".rotary_emb.inv_freq",)),
}  # fmt: skip
