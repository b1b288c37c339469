# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Falcon (arXiv 2311.16867): tensor names and config.json.

Three variants: multi-query attention in parallel with the feed-forward layer (7B), grouped attention with one or two norms
(11B, 40B, 180B), and serial layers with ALiBi (RW).
"""

import json
from collections.abc import Mapping
from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import (
    ACTIVATIONS,
    HF_ACTIVATIONS,
    require_full_rotation,
)
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.rope_map import read_rope, write_rope
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
    "w_tokens": TensorMapping("transformer.word_embeddings.weight", "vocab embed"),
    **norms(norm_1=f"{H}.input_layernorm", norm_2=f"{H}.post_attention_layernorm", norm_out="transformer.ln_f"),
    **joined(f"{H}.self_attention.query_key_value", split_qkv_by_group),
    **linear("attention/w_o", f"{H}.self_attention.dense", "embed", "heads head_dim", "attention/b_o"),
    **linear("feed_forward/w_in", f"{H}.mlp.dense_h_to_4h", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{H}.mlp.dense_4h_to_h", "embed", "ff", "feed_forward/b_out"),
    "w_head": HEAD,
}
TWO_NORMS = norms(norm_1=f"{H}.ln_attn", norm_2=f"{H}.ln_mlp")


def name_norms(c: ModelConfig) -> Mapping[str, TensorMapping]:
    """Return the mappings that differ from TENSORS: if the parallel branches have two norms, these have other names."""
    return TWO_NORMS if c.residual == "parallel-two-norms" else {}


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a FalconConfig."""
    grouped = bool(s["new_decoder_architecture"])
    parallel = bool(s["parallel_attn"])
    n_norms = s["num_ln_in_parallel_attn"]
    heads = s["num_attention_heads"]
    if (grouped and not parallel) or n_norms not in ((None, 1, 2) if grouped else (None, 1)):
        raise CheckpointError(
            f"{s.where}: parallel_attn = {json.dumps(parallel)}, num_ln_in_parallel_attn = {json.dumps(n_norms)} with "
            f"new_decoder_architecture = {json.dumps(grouped)} are not supported; supported: parallel_attn = true with "
            "num_ln_in_parallel_attn = null, 1 or 2 if new_decoder_architecture is true, otherwise num_ln_in_parallel_attn = "
            "null or 1"
        )
    multi_query = s["multi_query"] and not grouped
    kv_heads = 1 if multi_query else s.get("num_kv_heads", default=heads)
    if not grouped and not multi_query:
        s.require("num_kv_heads", heads)
    s.was_read |= {"num_kv_heads", "rope_parameters", "rope_scaling"}  # these keys have no effect in some variants
    positions: dict[str, Any] = dict(positions="falcon-alibi")
    if not s["alibi"]:
        rope, positions = read_rope(s)
        require_full_rotation(s, rope)
        positions["positions"] = "rope-half"
    residual = "serial"
    if parallel:
        residual = "parallel-two-norms" if grouped and n_norms != 1 else "parallel"
    d_model = s.get("n_embed", "hidden_size")
    return positions | dict(
        n_layers=s["num_hidden_layers"],
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_ff=s.get("ffn_hidden_size", default=4 * d_model),
        n_vocab=s["vocab_size"],
        seq_len=s["max_position_embeddings"],
        norm_eps=s["layer_norm_epsilon"],
        residual=residual,
        activation=s.translate(ACTIVATIONS, "activation"),
        qkv_bias=bool(s["bias"]),
        attention_out_bias=bool(s["bias"]),
        ff_bias=bool(s["bias"]),
        tied_embeddings=s["tie_word_embeddings"],
    )


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a FalconConfig."""
    grouped = c.residual == "parallel-two-norms" or (c.residual == "parallel" and c.kv_heads not in (1, c.n_heads))
    return dict(
        num_hidden_layers=c.n_layers,
        hidden_size=c.d_model,
        num_attention_heads=c.n_heads,
        num_kv_heads=c.kv_heads if grouped else c.n_heads,
        new_decoder_architecture=grouped,
        multi_query=c.kv_heads == 1 and not grouped,
        parallel_attn=c.residual != "serial",
        num_ln_in_parallel_attn=(2 if c.residual == "parallel-two-norms" else 1) if grouped else None,
        ffn_hidden_size=c.ff_dim,
        vocab_size=c.n_vocab,
        max_position_embeddings=c.seq_len,
        layer_norm_epsilon=c.norm_eps,
        activation=HF_ACTIVATIONS[c.activation],
        bias=c.qkv_bias,
        alibi=c.positions == "falcon-alibi",
        **({} if c.positions == "falcon-alibi" else write_rope(c)),
    )
