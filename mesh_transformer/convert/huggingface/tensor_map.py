# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""One row for each Hugging Face family: its tensors' names and layouts, used in both directions.

A layout is a pattern of lazy.View: "(heads head_dim) embed" is what PyTorch's Linear makes of our [embed, heads, head_dim].
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface import config_map, config_map_t5


class Entry(NamedTuple):
    """Where an array of ours is in a file of theirs; {i} is the layer. With {e} each expert is a tensor by itself."""

    theirs: str
    pattern: str
    pick: int = 0  # place in the dim of the pattern that is a number
    aliases: tuple[str, ...] = ()  # names it has had
    gated: str = ""  # its name where the feed-forward layer is gated, if that is another


class Family(NamedTuple):
    """A row of this module's table."""

    architecture: str
    entries: Mapping[str, Entry]
    read_config: Callable[[config_map.Settings], dict[str, Any]]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    prefix: str  # of names, which files of the bare model lack
    buffers: tuple[str, ...] = ()  # ends of names that are no weights
    copies: tuple[str, ...] = ()  # other names of the embedding, which files may hold
    needs_copies: bool = False  # and must, where the head is not tied: transformers then ties nothing
    experts_key: str = "num_local_experts"  # of config.json


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
W = f"{M}.block_sparse_moe.experts.{{e}}.w"  # in files; in memory newer versions keep all experts of a layer as one
MIXTRAL = {name: entry for name, entry in LLAMA.items() if not name.startswith("feed_forward/")} | {
    "experts/w_router": Entry(f"{M}.block_sparse_moe.gate.weight", "router embed"),
    **linear("experts/w_gate", f"{W}1", "ff", "embed"),
    **linear("experts/w_in", f"{W}3", "ff", "embed"),
    **linear("experts/w_out", f"{W}2", "embed", "ff"),
}
QWEN3 = LLAMA | {f"attention/norm_{x}/scale": Entry(f"{M}.self_attn.{x}_norm.weight", "head_dim") for x in "qk"}


def t5_stack(ours: str, theirs: str, feed_forward: str) -> dict[str, Entry]:
    """An encoder, or the decoder, whose layers attend to it; `feed_forward` is what its module is called."""
    block, is_decoder = f"{theirs}.block.{{i}}.layer", theirs == "decoder"
    ff = f"{block}.{2 if is_decoder else 1}"
    found = projections(f"{block}.0.SelfAttention", q="q", k="k", v="v", o="o")
    found |= norms(norm_1=f"{block}.0.layer_norm", norm_2=f"{ff}.layer_norm", norm_out=f"{theirs}.final_layer_norm")
    if is_decoder:
        cross = projections(f"{block}.1.EncDecAttention", q="q", k="k", v="v", o="o")
        found |= {f"cross_{name}": entry for name, entry in cross.items()} | norms(norm_cross=f"{block}.1.layer_norm")
    for kind, path in (("feed_forward", f"{ff}.{feed_forward}"), ("experts", f"{ff}.mlp.experts.expert_{{e}}")):
        found[f"{kind}/w_in"] = Entry(f"{path}.wi.weight", "ff embed", gated=f"{path}.wi_1.weight")
        found |= linear(f"{kind}/w_gate", f"{path}.wi_0", "ff", "embed")
        found |= linear(f"{kind}/w_out", f"{path}.wo", "embed", "ff")
    found |= linear("experts/w_router", f"{ff}.mlp.router.classifier", "router", "embed")
    bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    found["relative_bias/table"] = Entry(bias, "buckets heads")
    return {ours + name: entry for name, entry in found.items()}


SHARED = {"w_tokens": Entry("shared.weight", "vocab embed"), "w_head": HEAD}
T5, SWITCH = (
    SHARED | t5_stack("", "decoder", dense) | t5_stack("encoder/", "encoder", dense)
    for dense in ("DenseReluDense", "mlp")
)
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = (".EncDecAttention.relative_attention_bias.weight",)  # T5's first files have one that nothing reads

LLAMA_SETTINGS = (config_map.read_llama, config_map.write_llama, "model.", (".rotary_emb.inv_freq",))
FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", GPT2, config_map.read_gpt2, config_map.write_gpt2, "transformer.", (".attn.bias", ".attn.masked_bias")
    ),
    "gpt_neo": Family(
        "GPTNeoForCausalLM", GPT_NEO, config_map.read_gpt_neo, config_map.write_gpt_neo, "transformer.",
        (".attn.attention.bias", ".attn.attention.masked_bias"),
    ),
    "gptj": Family(
        "GPTJForCausalLM", GPT_J, config_map.read_gpt_j, config_map.write_gpt_j, "transformer.", (".attn.bias", ".attn.masked_bias")
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", GPT_NEOX, config_map.read_gpt_neox, config_map.write_gpt_neox, "gpt_neox.",
        (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
    "llama": Family("LlamaForCausalLM", LLAMA, *LLAMA_SETTINGS),
    "mistral": Family("MistralForCausalLM", LLAMA, *LLAMA_SETTINGS),
    "mixtral": Family("MixtralForCausalLM", MIXTRAL, config_map.read_mixtral, config_map.write_mixtral, *LLAMA_SETTINGS[2:]),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA, *LLAMA_SETTINGS),
    "qwen3": Family("Qwen3ForCausalLM", QWEN3, *LLAMA_SETTINGS),
    "t5": Family(
        "T5ForConditionalGeneration", T5, config_map_t5.read_t5, config_map_t5.write_t5, "", UNUSED, copies=COPIES
    ),
    "switch_transformers": Family(
        "SwitchTransformersForConditionalGeneration", SWITCH, config_map_t5.read_switch, config_map_t5.write_switch, "", UNUSED,
        copies=COPIES, needs_copies=True, experts_key="num_experts",
    ),
}  # fmt: skip
WITH_ENCODER = ("t5", "switch_transformers")
