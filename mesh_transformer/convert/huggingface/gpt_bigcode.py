# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""GPT-BigCode: SantaCoder (arXiv 2301.03988) and StarCoder (arXiv 2305.06161): tensor names and config.json."""

import json
from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import ACTIVATIONS, HF_ACTIVATIONS
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.tensor_map import (
    HEAD,
    H,
    TensorMapping,
    joined,
    linear,
    norms,
    split_qkv_by_group,
)
from mesh_transformer.storage.errors import CheckpointError

TENSORS = {
    "w_tokens": TensorMapping("transformer.wte.weight", "vocab embed"),
    "w_positions": TensorMapping("transformer.wpe.weight", "position embed"),
    **norms(norm_1=f"{H}.ln_1", norm_2=f"{H}.ln_2", norm_out="transformer.ln_f"),
    **joined(f"{H}.attn.c_attn", split_qkv_by_group),
    **linear("attention/w_o", f"{H}.attn.c_proj", "embed", "heads head_dim", "attention/b_o"),
    **linear("feed_forward/w_in", f"{H}.mlp.c_fc", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{H}.mlp.c_proj", "embed", "ff", "feed_forward/b_out"),
    "w_head": HEAD,
}


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a GPTBigCodeConfig."""
    s.require("add_cross_attention", False)
    kv_heads = 1 if s["multi_query"] else s["n_head"]
    stored = s.get("num_key_value_heads", default=kv_heads)  # a file may have it; the class computes it
    if stored != kv_heads:
        raise CheckpointError(
            f"{s.where}: num_key_value_heads = {json.dumps(stored)} contradicts multi_query = {json.dumps(s['multi_query'])} "
            f"and n_head = {s['n_head']}, which give {kv_heads}; correct one of them"
        )
    return dict(
        n_layers=s["n_layer"],
        d_model=s["n_embd"],
        n_heads=s["n_head"],
        n_kv_heads=kv_heads,
        d_ff=s.get("n_inner", default=4 * s["n_embd"]),
        n_vocab=s["vocab_size"],
        seq_len=s["n_positions"],
        attention_scale="rsqrt_d_head" if s["scale_attn_weights"] else "none",
        activation=s.translate(ACTIVATIONS, "activation_function"),
        norm_eps=s["layer_norm_epsilon"],
        tied_embeddings=s["tie_word_embeddings"],
    )


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GPTBigCodeConfig."""
    return dict(
        n_layer=c.n_layers,
        n_embd=c.d_model,
        n_head=c.n_heads,
        n_inner=c.ff_dim,
        multi_query=c.kv_heads == 1,
        vocab_size=c.n_vocab,
        n_positions=c.seq_len,
        scale_attn_weights=c.attention_scale != "none",
        activation_function=HF_ACTIVATIONS[c.activation],
        layer_norm_epsilon=c.norm_eps,
    )
