# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""BLOOM (arXiv 2211.05100): tensor names and config.json."""

from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.tensor_map import HEAD, H, TensorMapping, fused, linear, norms

DEFAULT_SEQ_LEN = 2048  # in training; config.json may omit it, and no weight depends on it
TENSORS = {
    "w_tokens": TensorMapping("transformer.word_embeddings.weight", "vocab embed"),
    **norms(norm_embedding="transformer.word_embeddings_layernorm", norm_out="transformer.ln_f"),
    **norms(norm_1=f"{H}.input_layernorm", norm_2=f"{H}.post_attention_layernorm"),
    **fused(f"{H}.self_attention.query_key_value", "(N 3 head_dim)", "(N 3 head_dim) embed"),
    **linear("attention/w_o", f"{H}.self_attention.dense", "embed", "heads head_dim", "attention/b_o"),
    **linear("feed_forward/w_in", f"{H}.mlp.dense_h_to_4h", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{H}.mlp.dense_4h_to_h", "embed", "ff", "feed_forward/b_out"),
    "w_head": HEAD,
}


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a BloomConfig."""
    s.require("apply_residual_connection_post_layernorm", False)
    if s["pretraining_tp"] > 1:
        # with slow_but_exact, transformers leaves out the biases of output projections
        s.require("slow_but_exact", False)
    return dict(
        n_layers=s["n_layer"],
        d_model=s.get("n_embed", "hidden_size"),
        n_heads=s["n_head"],
        n_vocab=s["vocab_size"],
        seq_len=s.get("seq_length", default=DEFAULT_SEQ_LEN),
        positions="alibi",
        embedding_norm=True,
        norm_eps=s["layer_norm_epsilon"],
        tied_embeddings=s["tie_word_embeddings"],
    )


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a BloomConfig. BloomConfig has no `seq_length`; published config.json files do."""
    return dict(
        n_layer=c.n_layers,
        hidden_size=c.d_model,
        n_head=c.n_heads,
        vocab_size=c.n_vocab,
        seq_length=c.seq_len,
        layer_norm_epsilon=c.norm_eps,
    )
