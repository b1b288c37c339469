# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""MPT (MosaicML 2023, github.com/mosaicml/llm-foundry): tensor names and config.json.

transformers ignores some keys that MosaicML's training code uses. A config.json is rejected if the value of such a key gives
another function in the training code than in transformers.
"""

import json
from collections.abc import Mapping
from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.tensor_map import HEAD, TensorMapping, joined, linear, norms, split_qkv
from mesh_transformer.storage.errors import CheckpointError

B = "transformer.blocks.{i}"
TENSORS = {
    "w_tokens": TensorMapping("transformer.wte.weight", "vocab embed"),
    **norms(norm_1=f"{B}.norm_1", norm_2=f"{B}.norm_2", norm_out="transformer.norm_f"),
    **joined(f"{B}.attn.Wqkv", split_qkv),
    **linear("attention/w_o", f"{B}.attn.out_proj", "embed", "heads head_dim"),
    **linear("feed_forward/w_in", f"{B}.ffn.up_proj", "ff", "embed"),
    **linear("feed_forward/w_out", f"{B}.ffn.down_proj", "embed", "ff"),
    "w_head": HEAD,
}
# Keys of attn_config that change the function in training, with the only value that transformers implements.
REQUIRED = dict(attn_type="multihead_attention", prefix_lm=False, qk_ln=False, alibi=True, alibi_bias_max=8)


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for an MptConfig."""
    s.require("expansion_ratio", 4)
    s.require("no_bias", True)
    s.require("logit_scale")
    s.require("norm_type", "low_precision_layernorm", "layernorm")
    # ALiBi replaces learned positions; embedding_fraction is a factor of gradients.
    s.was_read |= {"learned_pos_emb", "embedding_fraction"}
    attention: Mapping[str, Any] = s["attn_config"] or {}
    for key, allowed in REQUIRED.items():
        if attention.get(key, allowed) != allowed:
            raise CheckpointError(
                f"{s.where}: attn_config.{key} = {json.dumps(attention[key])} is not supported; supported: {json.dumps(allowed)}, "
                "the only value that transformers implements"
            )
    scale = attention.get("softmax_scale")
    return dict(
        n_layers=s["n_layers"],
        d_model=s["d_model"],
        n_heads=s["n_heads"],
        n_vocab=s["vocab_size"],
        seq_len=s["max_seq_len"],
        positions="alibi",
        attention_scale="rsqrt_d_head" if scale is None else float(scale),
        clip_qkv=float(attention["clip_qkv"]) if attention.get("clip_qkv") else None,
        activation="gelu-erf",
        norm_eps=s["layer_norm_epsilon"],
        norm_bias=False,
        qkv_bias=False,
        attention_out_bias=False,
        ff_bias=False,
        tied_embeddings=s["tie_word_embeddings"],
    )


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of an MptConfig."""
    scale = {"rsqrt_d_head": None, "none": 1.0}.get(str(c.attention_scale), c.attention_scale)
    return dict(
        n_layers=c.n_layers,
        d_model=c.d_model,
        n_heads=c.n_heads,
        vocab_size=c.n_vocab,
        max_seq_len=c.seq_len,
        layer_norm_epsilon=c.norm_eps,
        no_bias=True,
        attn_config=REQUIRED | dict(clip_qkv=c.clip_qkv, softmax_scale=scale),
    )
