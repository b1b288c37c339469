# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Names and layouts of the tensors of each Hugging Face family, used for both import and export.

A layout is a pattern of layout_views.py: "(heads head_dim) embed" is the layout of a torch.nn.Linear weight that is natively
[embed, heads, head_dim].
"""

from collections.abc import Callable
from typing import NamedTuple

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.layout_views import Split


class TensorMapping(NamedTuple):
    """The external tensor of a native weight. In names, {i} is the layer; {e} is the expert, if experts have separate tensors."""

    name: str
    pattern: str  # layout of the tensor; with `split`, of one part
    # Index along the dimension that is a number in the pattern, such as 3 in "(3 heads head_dim)"; with `split`, index of
    # the part
    component: int = 0
    aliases: tuple[str, ...] = ()  # names in files of other versions
    gated_name: str = ""  # name in a gated feed-forward layer, if it is different
    split: Callable[[ModelConfig], Split] | None = None  # division of a tensor that joins several weights
    shared_name: str = ""  # name in the shared expert of a layer with experts, if it is different
    # Name, layout and component in files that have one tensor for all experts of a layer
    stacked: "tuple[str, str, int] | None" = None


def linear(weight: str, module: str, outputs: str, inputs: str, bias: str = "") -> dict[str, TensorMapping]:
    """Return the mappings of torch.nn.Linear: a native weight stored as [outputs, inputs], and its bias if it has one."""
    mappings = {weight: TensorMapping(f"{module}.weight", f"{_group(outputs)} {_group(inputs)}")}
    return mappings | ({bias: TensorMapping(f"{module}.bias", _group(outputs))} if bias else {})


def _group(words: str) -> str:
    return f"({words})" if " " in words else words


def norms(**modules: str) -> dict[str, TensorMapping]:
    """Return the mappings of scale and bias of norms, given the external module of each native norm."""
    scales = {f"{norm}/scale": TensorMapping(f"{module}.weight", "embed") for norm, module in modules.items()}
    return scales | {f"{norm}/bias": TensorMapping(f"{module}.bias", "embed") for norm, module in modules.items()}


def projections(module: str, **names: str) -> dict[str, TensorMapping]:
    """Return the mappings of q, k, v and o as separate Linear modules; `names` replaces the default names <x>_proj."""
    mappings: dict[str, TensorMapping] = {}
    for x, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
        projection = f"{module}.{names.get(x, f'{x}_proj')}"
        mappings |= linear(f"attention/w_{x}", projection, f"{heads} head_dim", "embed", f"attention/b_{x}")
    output = f"{module}.{names.get('o', 'o_proj')}"
    return mappings | linear("attention/w_o", output, "embed", "heads head_dim", "attention/b_o")


def fused(module: str, bias: str, weight: str) -> dict[str, TensorMapping]:
    """Return the mappings of q, k and v in one module.

    `bias` and `weight` are layouts, in which N stands for "heads" (q) or "kv_heads" (k and v).
    """
    mappings: dict[str, TensorMapping] = {}
    for component, (x, heads) in enumerate((("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))):
        mappings[f"attention/w_{x}"] = TensorMapping(f"{module}.weight", weight.replace("N", heads), component)
        mappings[f"attention/b_{x}"] = TensorMapping(f"{module}.bias", bias.replace("N", heads), component)
    return mappings


def split_qkv(c: ModelConfig) -> Split:
    """Return the division into the rows of all queries, all keys and all values (MPT, Phi 3)."""
    return Split(1, (c.n_heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim))


def split_qkv_by_group(c: ModelConfig) -> Split:
    """Return the division by key-value head into the rows of its queries, key and value (Falcon, GPT-BigCode)."""
    return Split(c.kv_heads, (c.n_heads // c.kv_heads * c.head_dim, c.head_dim, c.head_dim))


def joined(module: str, split: Callable[[ModelConfig], Split]) -> dict[str, TensorMapping]:
    """Return the mappings of q, k and v, which may have different sizes, in one torch.nn.Linear."""
    mappings: dict[str, TensorMapping] = {}
    for i, (x, heads) in enumerate((("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))):
        mappings[f"attention/w_{x}"] = TensorMapping(f"{module}.weight", f"({heads} head_dim) embed", i, split=split)
        mappings[f"attention/b_{x}"] = TensorMapping(f"{module}.bias", f"({heads} head_dim)", i, split=split)
    return mappings


def experts(module: str) -> dict[str, TensorMapping]:
    """Return the mappings of gated experts: one tensor per expert, or stacked as in the modules of transformers 5."""
    single = f"{module}.{{e}}"
    gate_up = f"{module}.gate_up_proj"
    return {
        "experts/w_gate": TensorMapping(
            f"{single}.gate_proj.weight", "ff embed", stacked=(gate_up, "expert (2 ff) embed", 0)
        ),
        "experts/w_in": TensorMapping(
            f"{single}.up_proj.weight", "ff embed", stacked=(gate_up, "expert (2 ff) embed", 1)
        ),
        "experts/w_out": TensorMapping(
            f"{single}.down_proj.weight", "embed ff", stacked=(f"{module}.down_proj", "expert embed ff", 0)
        ),
    }


def shared_expert(native: str, module: str) -> dict[str, TensorMapping]:
    """Return the mappings of Llama's dense feed-forward layers, with the names of the shared expert in layers with experts."""
    parts = (("w_gate", "gate_proj.weight"), ("w_in", "up_proj.weight"), ("w_out", "down_proj.weight"))
    parts += (("b_gate", "gate_proj.bias"), ("b_in", "up_proj.bias"), ("b_out", "down_proj.bias"))
    names = {f"{native}/{weight}": f"{module}.{part}" for weight, part in parts}
    return {weight: LLAMA[weight]._replace(shared_name=name) for weight, name in names.items()}


HEAD = TensorMapping("lm_head.weight", "vocab embed")
H = "transformer.h.{i}"
GPT2 = {
    "w_tokens": TensorMapping("transformer.wte.weight", "vocab embed"),
    "w_positions": TensorMapping("transformer.wpe.weight", "position embed"),
    **norms(norm_1=f"{H}.ln_1", norm_2=f"{H}.ln_2", norm_out="transformer.ln_f"),
    **fused(f"{H}.attn.c_attn", "(3 N head_dim)", "embed (3 N head_dim)"),  # Conv1D stores [inputs, outputs]
    "attention/w_o": TensorMapping(f"{H}.attn.c_proj.weight", "(heads head_dim) embed"),
    "attention/b_o": TensorMapping(f"{H}.attn.c_proj.bias", "embed"),
    "feed_forward/w_in": TensorMapping(f"{H}.mlp.c_fc.weight", "embed ff"),
    "feed_forward/b_in": TensorMapping(f"{H}.mlp.c_fc.bias", "ff"),
    "feed_forward/w_out": TensorMapping(f"{H}.mlp.c_proj.weight", "ff embed"),
    "feed_forward/b_out": TensorMapping(f"{H}.mlp.c_proj.bias", "embed"),
    "w_head": HEAD,
}
GPT_NEO = {
    "w_tokens": TensorMapping("transformer.wte.weight", "vocab embed"),
    "w_positions": TensorMapping("transformer.wpe.weight", "position embed"),
    **norms(norm_1=f"{H}.ln_1", norm_2=f"{H}.ln_2", norm_out="transformer.ln_f"),
    **projections(f"{H}.attn.attention", o="out_proj"),
    **linear("feed_forward/w_in", f"{H}.mlp.c_fc", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{H}.mlp.c_proj", "embed", "ff", "feed_forward/b_out"),
    "w_head": HEAD,
}
GPT_J = {
    "w_tokens": TensorMapping("transformer.wte.weight", "vocab embed"),
    **norms(norm_1=f"{H}.ln_1", norm_out="transformer.ln_f"),
    **projections(f"{H}.attn", o="out_proj"),
    **linear("feed_forward/w_in", f"{H}.mlp.fc_in", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{H}.mlp.fc_out", "embed", "ff", "feed_forward/b_out"),
    "w_head": HEAD,
    "b_head": TensorMapping("lm_head.bias", "vocab"),
}
X = "gpt_neox.layers.{i}"
GPT_NEOX = {
    "w_tokens": TensorMapping("gpt_neox.embed_in.weight", "vocab embed"),
    **norms(norm_1=f"{X}.input_layernorm", norm_2=f"{X}.post_attention_layernorm"),
    **norms(norm_out="gpt_neox.final_layer_norm"),
    **fused(f"{X}.attention.query_key_value", "(N 3 head_dim)", "(N 3 head_dim) embed"),
    **linear("attention/w_o", f"{X}.attention.dense", "embed", "heads head_dim", "attention/b_o"),
    **linear("feed_forward/w_in", f"{X}.mlp.dense_h_to_4h", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{X}.mlp.dense_4h_to_h", "embed", "ff", "feed_forward/b_out"),
    "w_head": TensorMapping("embed_out.weight", "vocab embed", aliases=("lm_head.weight",)),
}
M = "model.layers.{i}"
LLAMA = {
    "w_tokens": TensorMapping("model.embed_tokens.weight", "vocab embed"),
    **norms(norm_1=f"{M}.input_layernorm", norm_2=f"{M}.post_attention_layernorm", norm_out="model.norm"),
    **projections(f"{M}.self_attn"),
    **linear("feed_forward/w_gate", f"{M}.mlp.gate_proj", "ff", "embed", "feed_forward/b_gate"),
    **linear("feed_forward/w_in", f"{M}.mlp.up_proj", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{M}.mlp.down_proj", "embed", "ff", "feed_forward/b_out"),
    "w_head": HEAD,
}
MOE = f"{M}.block_sparse_moe"
STACKED = experts(f"{M}.mlp.experts")
MIXTRAL = {name: mapping for name, mapping in LLAMA.items() if not name.startswith("feed_forward/")} | {
    "experts/w_router": TensorMapping(f"{MOE}.gate.weight", "router embed", aliases=(f"{M}.mlp.gate.weight",)),
    **{
        f"experts/{weight}": STACKED[f"experts/{weight}"]._replace(name=f"{MOE}.experts.{{e}}.{name}.weight")
        for weight, name in (("w_gate", "w1"), ("w_in", "w3"), ("w_out", "w2"))
    },
}
QWEN3 = LLAMA | {f"attention/norm_{x}/scale": TensorMapping(f"{M}.self_attn.{x}_norm.weight", "head_dim") for x in "qk"}


def t5_stack(native: str, external: str, feed_forward: str, *, shared_bias: bool = True) -> dict[str, TensorMapping]:
    """Return the mappings of the encoder or decoder of T5, whose feed-forward module is called `feed_forward`.

    If `shared_bias`, the first layer has the table of the relative bias of all layers; otherwise each layer has its own.
    """
    block = f"{external}.block.{{i}}.layer"
    is_decoder = external == "decoder"
    ff = f"{block}.{2 if is_decoder else 1}"
    mappings = projections(f"{block}.0.SelfAttention", q="q", k="k", v="v", o="o")
    mappings |= norms(
        norm_1=f"{block}.0.layer_norm", norm_2=f"{ff}.layer_norm", norm_out=f"{external}.final_layer_norm"
    )
    if is_decoder:
        cross = projections(f"{block}.1.EncDecAttention", q="q", k="k", v="v", o="o")
        mappings |= {f"cross_{name}": mapping for name, mapping in cross.items()}
        mappings |= norms(norm_cross=f"{block}.1.layer_norm")
    for kind, path in (("feed_forward", f"{ff}.{feed_forward}"), ("experts", f"{ff}.mlp.experts.expert_{{e}}")):
        mappings[f"{kind}/w_in"] = TensorMapping(f"{path}.wi.weight", "ff embed", gated_name=f"{path}.wi_1.weight")
        mappings |= linear(f"{kind}/w_gate", f"{path}.wi_0", "ff", "embed")
        mappings |= linear(f"{kind}/w_out", f"{path}.wo", "embed", "ff")
    mappings |= linear("experts/w_router", f"{ff}.mlp.router.classifier", "router", "embed")
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    if shared_bias:
        mappings["relative_bias/table"] = TensorMapping(f"{external}.block.0.{bias}", "buckets heads")
    else:
        mappings["attention/relative_bias"] = TensorMapping(f"{external}.block.{{i}}.{bias}", "buckets heads")
    return {native + name: mapping for name, mapping in mappings.items()}


SHARED = {"w_tokens": TensorMapping("shared.weight", "vocab embed"), "w_head": HEAD}
T5, SWITCH = (
    SHARED | t5_stack("", "decoder", dense) | t5_stack("encoder/", "encoder", dense)
    for dense in ("DenseReluDense", "mlp")
)
UMT5 = (
    SHARED
    | t5_stack("", "decoder", "DenseReluDense", shared_bias=False)
    | t5_stack("encoder/", "encoder", "DenseReluDense", shared_bias=False)
)
