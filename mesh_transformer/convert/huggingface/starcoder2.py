# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""StarCoder 2 (arXiv 2402.19173): tensor names and config.json."""

from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import ACTIVATIONS, read_sizes, write_sizes
from mesh_transformer.convert.huggingface.gemma2 import HF_ACTIVATIONS
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.rope_map import read_rope, write_rope
from mesh_transformer.convert.huggingface.tensor_map import LLAMA, M, linear

TENSORS = {name: mapping for name, mapping in LLAMA.items() if not name.startswith("feed_forward/")} | {
    **linear("feed_forward/w_in", f"{M}.mlp.c_fc", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{M}.mlp.c_proj", "embed", "ff", "feed_forward/b_out"),
}


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a Starcoder2Config."""
    bias = s["use_bias"]
    heads = s["num_attention_heads"]
    model = read_sizes(s) | dict(
        n_kv_heads=s["num_key_value_heads"],
        d_head=s.find("head_dim") or s["hidden_size"] // heads,
        norm="layernorm",
        norm_eps=s["norm_epsilon"],
        positions="rope-half",
        activation=s.translate(ACTIVATIONS, "hidden_act"),
        qkv_bias=bias,
        attention_out_bias=bias,
        ff_bias=bias,
        **read_rope(s)[1],
    )
    window = s["sliding_window"]
    return model if window is None else model | dict(attention_pattern=["local"], attention_window=window)


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Starcoder2Config."""
    return (
        write_sizes(c)
        | write_rope(c)
        | dict(
            norm_epsilon=c.norm_eps,
            hidden_act=HF_ACTIVATIONS[c.activation],
            sliding_window=c.attention_window if "local" in c.attention_pattern else None,
            use_bias=c.qkv_bias,
        )
    )
