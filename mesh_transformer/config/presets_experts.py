# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Presets of Qwen MoE, DeepSeek and gpt-oss models, from the published config.json of each model."""

import math
from typing import Any

from mesh_transformer.config.presets_dense import LLAMA, with_sizes

QWEN2_MOE = dict(LLAMA, n_vocab=151936, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True)
QWEN3_MOE = dict(
    LLAMA, n_vocab=151936, seq_len=40960, norm_eps=1e-6, rope_theta=1e6, n_kv_heads=4, d_head=128, qk_norm=True
)
# DeepSeek V2 (arXiv 2405.04434) and V3 (2412.19437), without multi-token prediction
DEEPSEEK = dict(LLAMA, seq_len=163840, norm_eps=1e-6, positions="rope-interleaved")
# gpt-oss (arXiv 2508.10925)
GPT_OSS = dict(
    n_vocab=201088,
    seq_len=131072,
    norm="rmsnorm",
    positions="rope-half",
    rope_theta=150_000.0,
    rope_scaling=dict(type="yarn", factor=32.0, original_seq_len=4096, beta_fast=32.0, beta_slow=1.0, truncate=False),
    activation="clamped-swiglu",
    gated_ffn=True,
    attention_pattern=["local", "global"],
    attention_window=128,
    attention_sinks=True,
    ff_bias=False,
    tied_embeddings=False,
)


def _deepseek(mscale: float, q_rank: int | None = 1536) -> dict[str, Any]:
    """Return the attention fields of a DeepSeek model, whose context length was extended by a factor of 40."""
    yarn_scale = 0.1 * mscale * math.log(40.0) + 1.0
    return dict(
        latent_attention=dict(kv_rank=512, q_rank=q_rank, d_unrotated=128, d_rotated=64, d_value=128),
        attention_scale=192**-0.5 * yarn_scale**2,
        rope_scaling=dict(
            type="yarn",
            factor=40.0,
            original_seq_len=4096,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=mscale,
            mscale_all_dim=mscale,
        ),
    )


def _experts(n_experts: int, n_experts_per_token: int, d_ff: int, **rest: Any) -> dict[str, Any]:
    return dict(n_experts=n_experts, n_experts_per_token=n_experts_per_token, d_ff=d_ff, **rest)


EXPERT_PRESETS: dict[str, dict[str, Any]] = {
    "qwen1.5-moe-a2.7b": with_sizes(
        QWEN2_MOE,
        24,
        2048,
        16,
        d_ff=5632,
        seq_len=8192,
        experts=_experts(60, 4, 1408, normalize_gates=False, shared_expert=True, shared_d_ff=5632, shared_gate=True),
    ),
    "qwen2-57b-a14b": with_sizes(
        QWEN2_MOE,
        28,
        3584,
        28,
        n_kv_heads=4,
        d_ff=18944,
        seq_len=131072,
        experts=_experts(64, 8, 2560, normalize_gates=False, shared_expert=True, shared_d_ff=20480, shared_gate=True),
    ),
    "qwen3-30b-a3b": with_sizes(QWEN3_MOE, 48, 2048, 32, d_ff=6144, experts=_experts(128, 8, 768)),
    "qwen3-235b-a22b": with_sizes(QWEN3_MOE, 94, 4096, 64, d_ff=12288, experts=_experts(128, 8, 1536)),
    "deepseek-v2-lite": with_sizes(
        DEEPSEEK | _deepseek(0.707, q_rank=None),
        27,
        2048,
        16,
        n_vocab=102400,
        d_ff=10944,
        experts=_experts(64, 6, 1408, normalize_gates=False, dense_layers=[0], shared_expert=True, shared_d_ff=2816),
    ),
    "deepseek-v2": with_sizes(
        DEEPSEEK | _deepseek(0.707),
        60,
        5120,
        128,
        n_vocab=102400,
        d_ff=12288,
        experts=_experts(
            160,
            6,
            1536,
            normalize_gates=False,
            gate_scale=16.0,
            n_expert_groups=8,
            n_groups_per_token=3,
            dense_layers=[0],
            shared_expert=True,
            shared_d_ff=3072,
        ),
    ),
    "deepseek-v3": with_sizes(
        DEEPSEEK | _deepseek(1.0),
        61,
        7168,
        128,
        n_vocab=129280,
        d_ff=18432,
        experts=_experts(
            256,
            8,
            2048,
            scores="sigmoid",
            selection_bias=True,
            gate_scale=2.5,
            n_expert_groups=8,
            n_groups_per_token=4,
            group_score="sum-of-top-2",
            dense_layers=[0, 1, 2],
            shared_expert=True,
            shared_d_ff=2048,
        ),
    ),
    "gpt-oss-20b": with_sizes(
        GPT_OSS,
        24,
        2880,
        64,
        n_kv_heads=8,
        d_head=64,
        d_ff=2880,
        experts=_experts(32, 4, 2880, bias=True, router_bias=True),
    ),
    "gpt-oss-120b": with_sizes(
        GPT_OSS,
        36,
        2880,
        64,
        n_kv_heads=8,
        d_head=64,
        d_ff=2880,
        experts=_experts(128, 4, 2880, bias=True, router_bias=True),
    ),
}
