# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""OPT (arXiv 2205.01068): tensor names and config.json.

OPT 350M differs from the others: its norms follow the sums, and its token embeddings are smaller than d_model.
"""

from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import ACTIVATIONS, HF_ACTIVATIONS
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.tensor_map import HEAD, TensorMapping, linear, norms, projections

L = "model.decoder.layers.{i}"
TENSORS = {
    "w_tokens": TensorMapping("model.decoder.embed_tokens.weight", "vocab embed"),
    "w_positions": TensorMapping("model.decoder.embed_positions.weight", "position embed"),
    "w_project_in": TensorMapping("model.decoder.project_in.weight", "embed embedding"),
    "w_project_out": TensorMapping("model.decoder.project_out.weight", "embedding embed"),
    **norms(norm_1=f"{L}.self_attn_layer_norm", norm_2=f"{L}.final_layer_norm"),
    **norms(norm_out="model.decoder.final_layer_norm"),
    **projections(f"{L}.self_attn", o="out_proj"),
    **linear("feed_forward/w_in", f"{L}.fc1", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{L}.fc2", "embed", "ff", "feed_forward/b_out"),
    "w_head": HEAD,
}


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for an OPTConfig. OPT does not use the first two rows of its position embeddings."""
    s.require("_remove_final_layer_norm", False)
    s.require("layer_norm_elementwise_affine", True)
    d_token_embedding = s["word_embed_proj_dim"]
    return dict(
        n_layers=s["num_hidden_layers"],
        d_model=s["hidden_size"],
        n_heads=s["num_attention_heads"],
        d_ff=s["ffn_dim"],
        n_vocab=s["vocab_size"],
        seq_len=s["max_position_embeddings"],
        position_offset=2,
        residual="serial" if s["do_layer_norm_before"] else "post-norm",
        d_token_embedding=None if d_token_embedding in (None, s["hidden_size"]) else d_token_embedding,
        activation=s.translate(ACTIVATIONS, "activation_function"),
        qkv_bias=s["enable_bias"],
        attention_out_bias=s["enable_bias"],
        ff_bias=s["enable_bias"],
        tied_embeddings=s["tie_word_embeddings"],
    )


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of an OPTConfig."""
    return dict(
        num_hidden_layers=c.n_layers,
        hidden_size=c.d_model,
        word_embed_proj_dim=c.token_embedding_dim,
        num_attention_heads=c.n_heads,
        ffn_dim=c.ff_dim,
        vocab_size=c.n_vocab,
        max_position_embeddings=c.seq_len,
        activation_function=HF_ACTIVATIONS[c.activation],
        enable_bias=c.qkv_bias,
        do_layer_norm_before=c.residual == "serial",
    )
