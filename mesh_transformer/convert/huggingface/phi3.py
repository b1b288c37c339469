# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Phi 3, 3.5 and 4 (arXiv 2404.14219, 2412.08905): tensor names and config.json."""

from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import ACTIVATIONS, HF_ACTIVATIONS, read_sizes, write_sizes
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.rope_map import read_scaling, write_partial_rope
from mesh_transformer.convert.huggingface.tensor_map import LLAMA, M, TensorMapping, joined, split_qkv
from mesh_transformer.convert.layout_views import Split


def split_gate_up(c: ModelConfig) -> Split:
    """Return the division of a feed-forward layer's fused projection into the rows of gate and input."""
    return Split(1, (c.ff_dim, c.ff_dim))


GATE_UP = f"{M}.mlp.gate_up_proj.weight"
TENSORS = (
    LLAMA
    | joined(f"{M}.self_attn.qkv_proj", split_qkv)
    | {
        "feed_forward/w_gate": TensorMapping(GATE_UP, "ff embed", 0, split=split_gate_up),
        "feed_forward/w_in": TensorMapping(GATE_UP, "ff embed", 1, split=split_gate_up),
    }
)


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a Phi3Config."""
    rope = s.rope_parameters()
    s.was_read.add("original_max_position_embeddings")  # without effect if the frequencies are not scaled
    if rope["rope_type"] in ("su", "yarn"):  # names of longrope in the first files
        rope["rope_type"] = "longrope"
    heads = s["num_attention_heads"]
    d_head = s.find("head_dim") or s["hidden_size"] // heads
    model = read_sizes(s) | dict(
        n_kv_heads=s.get("num_key_value_heads", default=heads),
        d_head=d_head,
        norm="rmsnorm",
        norm_eps=s["rms_norm_eps"],
        positions="rope-half",
        rope_theta=float(rope["rope_theta"]),
        rope_dims=int(d_head * rope.get("partial_rotary_factor", 1.0)),
        activation=s.translate(ACTIVATIONS, "hidden_act"),
        gated_ffn=True,
        qkv_bias=False,
        attention_out_bias=False,
        ff_bias=False,
        **read_scaling(s, rope),
    )
    window = s["sliding_window"]
    return model if window is None else model | dict(attention_pattern=["local"], attention_window=window)


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Phi3Config."""
    trained_len = c.seq_len if c.rope_scaling is None else c.rope_scaling.original_seq_len
    return (
        write_sizes(c)
        | write_partial_rope(c)
        | dict(
            original_max_position_embeddings=trained_len,
            rms_norm_eps=c.norm_eps,
            hidden_act=HF_ACTIVATIONS[c.activation],
            sliding_window=c.attention_window if "local" in c.attention_pattern else None,
        )
        | ({} if c.head_dim * c.n_heads == c.d_model else {"head_dim": c.head_dim})
    )
