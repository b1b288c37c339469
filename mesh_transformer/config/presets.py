# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Presets: the `[model]` keys of published models, selected by `preset = "name"`.

Each preset combines the fields of a model family with those of a size. `n_vocab` is the number of embedding rows in the
released files. Parameter counts are tested in tests/config/test_presets.py.
"""

from typing import Any

from mesh_transformer.config.presets_dense import DENSE_PRESETS, LLAMA, with_sizes
from mesh_transformer.config.presets_experts import EXPERT_PRESETS

GPT2 = dict(n_vocab=50257, seq_len=1024)
# GPT-3 alternates dense and banded layers. The layer order and the window are unpublished; these values are from GPT-Neo.
GPT3 = dict(n_vocab=50257, seq_len=2048, attention_pattern=["global", "local"], attention_window=256)
GPT_NEO = dict(
    n_vocab=50257,
    seq_len=2048,
    attention_pattern=["global", "local"],
    attention_window=256,
    attention_scale="none",
    qkv_bias=False,
)
GPT_J = dict(
    n_vocab=50400,
    seq_len=2048,
    positions="rope-interleaved",
    rope_dims=64,
    residual="parallel",
    qkv_bias=False,
    attention_out_bias=False,
    head_bias=True,
    tied_embeddings=False,
    init="gptj",
)
GPT_NEOX = dict(seq_len=2048, positions="rope-half", residual="parallel-two-norms", tied_embeddings=False, init="neox")
NEOX_SERIAL = dict(GPT_NEOX, residual="serial", n_vocab=50304)
PYTHIA = dict(GPT_NEOX, activation="gelu-erf")  # as in the released config; the training code used the tanh form
# Gemma 2 (arXiv 2408.00118)
GEMMA2 = dict(
    n_vocab=256_000,
    seq_len=8192,
    norm="gemma-rmsnorm",
    norm_eps=1e-6,
    residual="sandwich",
    positions="rope-half",
    activation="gelu-tanh",
    gated_ffn=True,
    attention_pattern=["local", "global"],
    attention_window=4096,
    attention_softcap=50.0,
    logit_softcap=30.0,
    embedding_scale="sqrt_d_model",
    qkv_bias=False,
    attention_out_bias=False,
    ff_bias=False,
)
MIXTRAL = dict(LLAMA, seq_len=32768, rope_theta=1e6, n_kv_heads=8)
# Encoder-decoder (arXiv 1910.10683): one relative bias shared by all layers of a stack, unscaled scores, no biases.
T5 = dict(
    n_vocab=32128,
    seq_len=512,
    norm="rmsnorm",
    norm_eps=1e-6,
    positions="t5",
    attention_scale="none",
    activation="relu",
    qkv_bias=False,
    attention_out_bias=False,
    ff_bias=False,
    logit_scale="rsqrt_d_model",
    init="t5",
)
T5_V1_1 = dict(T5, activation="gelu-tanh", gated_ffn=True, tied_embeddings=False, logit_scale="none")
MT5 = dict(T5_V1_1, n_vocab=250_112)
UMT5 = dict(T5_V1_1, n_vocab=256_384, t5_shared_bias=False)  # arXiv 2304.09151
# Switch (arXiv 2101.03961): T5 with experts, initialized with a tenth of the variance. Switch-C's 30 heads, XXL's 128
# experts and ReLU follow the released code.
SWITCH = dict(T5, init_scale=0.1)
SWITCH_DECODER = dict(SWITCH, logit_scale="none", init="gpt2")  # decoder-only variant; not published
# Encoders (BERT: arXiv 1810.04805, RoBERTa: 1907.11692, ALBERT: 1909.11942) with their masked language-model heads.
BERT = dict(
    seq_len=512,
    norm_eps=1e-12,
    residual="post-norm",
    activation="gelu-erf",
    causal=False,
    embedding_norm=True,
    n_token_types=2,
    head="masked-lm",
    head_bias=True,
    init="bert",
)
ROBERTA = dict(BERT, n_vocab=50265, norm_eps=1e-5, n_token_types=1, position_offset=2, position_padding_token=1)
ALBERT = dict(BERT, n_vocab=30000, activation="gelu-tanh", d_embedding=128, shared_layers=True)


def _switch(n_experts: int, layer_interval: int, capacity_factor: float, group_size: int = 1) -> dict[str, Any]:
    """Return the `experts` fields of a Switch model; `group_size` is max_group_size of the released code / 512 tokens."""
    return dict(
        n_experts=n_experts,
        layer_interval=layer_interval,
        capacity_factor=capacity_factor,
        group_size=group_size,
        eval_capacity_factor=2.0,
        router_z_loss=0.0,
        router_jitter=1e-2,
    )


def _t5(
    family: dict[str, Any], n_layers: int, d_model: int, n_heads: int, d_ff: int, d_head: int = 64, **rest: Any
) -> dict[str, Any]:
    """Return a T5 preset with `n_layers` layers in both encoder and decoder."""
    sizes = dict(d_ff=d_ff, d_head=d_head, n_encoder_layers=n_layers)
    return with_sizes(family, n_layers, d_model, n_heads, **sizes, **rest)


FALCON = dict(
    n_vocab=65024, seq_len=2048, activation="gelu-erf", qkv_bias=False, attention_out_bias=False, ff_bias=False,
    positions="rope-half",
)  # fmt: skip
FALCON_7B = dict(FALCON, residual="parallel", n_kv_heads=1)
FALCON_40B = dict(FALCON, residual="parallel-two-norms", n_kv_heads=8)
FALCON_RW = dict(seq_len=2048, activation="gelu-erf", positions="falcon-alibi")
OPT = dict(n_vocab=50272, seq_len=2048, position_offset=2, activation="relu")
BLOOM = dict(n_vocab=250_880, seq_len=2048, positions="alibi", embedding_norm=True)
MPT = dict(
    n_vocab=50432, positions="alibi", activation="gelu-erf", norm_bias=False, qkv_bias=False, attention_out_bias=False,
    ff_bias=False,
)  # fmt: skip
STARCODER = dict(n_vocab=49152, seq_len=8192, n_kv_heads=1)

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": with_sizes(GPT2, 12, 768, 12),
    "gpt2-medium": with_sizes(GPT2, 24, 1024, 16),
    "gpt2-large": with_sizes(GPT2, 36, 1280, 20),
    "gpt2-xl": with_sizes(GPT2, 48, 1600, 25),
    "gpt3-small": with_sizes(GPT3, 12, 768, 12),
    "gpt3-medium": with_sizes(GPT3, 24, 1024, 16),
    "gpt3-large": with_sizes(GPT3, 24, 1536, 16),
    "gpt3-xl": with_sizes(GPT3, 24, 2048, 16),  # the paper's 24 heads of size 128 do not give d_model = 2048
    "gpt3-2.7b": with_sizes(GPT3, 32, 2560, 32),
    "gpt3-6.7b": with_sizes(GPT3, 32, 4096, 32),
    "gpt3-13b": with_sizes(GPT3, 40, 5120, 40),  # the paper's 5140 is not 40 x 128
    "gpt3-175b": with_sizes(GPT3, 96, 12288, 96),
    "gpt-neo-125m": with_sizes(GPT_NEO, 12, 768, 12),
    "gpt-neo-350m": with_sizes(GPT_NEO, 24, 1024, 16),
    "gpt-neo-1.3b": with_sizes(GPT_NEO, 24, 2048, 16),
    "gpt-neo-2.7b": with_sizes(GPT_NEO, 32, 2560, 20),
    "gptj-6b": with_sizes(GPT_J, 28, 4096, 16),
    "gpt-neox-20b": with_sizes(GPT_NEOX, 44, 6144, 64, n_vocab=50432, rope_dims=24),
    # configs/*.yml of the GPT-NeoX library: serial residual, full rotary, vocabulary padded to 50304
    "neox-19m": with_sizes(NEOX_SERIAL, 6, 512, 8),
    "neox-49m": with_sizes(NEOX_SERIAL, 10, 640, 10),
    "neox-125m": with_sizes(NEOX_SERIAL, 12, 768, 12),
    "neox-350m": with_sizes(NEOX_SERIAL, 24, 1024, 16),
    "neox-760m": with_sizes(NEOX_SERIAL, 24, 1536, 16),
    "neox-800m": with_sizes(NEOX_SERIAL, 16, 2048, 8),
    "neox-1.3b": with_sizes(NEOX_SERIAL, 24, 2048, 16),
    "neox-2.7b": with_sizes(NEOX_SERIAL, 32, 2560, 32),
    "neox-6.7b": with_sizes(NEOX_SERIAL, 32, 4096, 32),
    "neox-13b": with_sizes(NEOX_SERIAL, 40, 5120, 40),
    "neox-175b": with_sizes(NEOX_SERIAL, 96, 12288, 96),
    "pythia-14m": with_sizes(PYTHIA, 6, 128, 4, n_vocab=50304, rope_dims=8),
    "pythia-31m": with_sizes(PYTHIA, 6, 256, 8, n_vocab=50304, rope_dims=8),
    "pythia-70m": with_sizes(PYTHIA, 6, 512, 8, n_vocab=50304, rope_dims=16),
    "pythia-160m": with_sizes(PYTHIA, 12, 768, 12, n_vocab=50304, rope_dims=16),
    "pythia-410m": with_sizes(PYTHIA, 24, 1024, 16, n_vocab=50304, rope_dims=16),
    "pythia-1b": with_sizes(PYTHIA, 16, 2048, 8, n_vocab=50304, rope_dims=64),
    "pythia-1.4b": with_sizes(PYTHIA, 24, 2048, 16, n_vocab=50304, rope_dims=32),
    "pythia-2.8b": with_sizes(PYTHIA, 32, 2560, 32, n_vocab=50304, rope_dims=20),
    "pythia-6.9b": with_sizes(PYTHIA, 32, 4096, 32, n_vocab=50432, rope_dims=32),
    "pythia-12b": with_sizes(PYTHIA, 36, 5120, 40, n_vocab=50688, rope_dims=32),
    "llama-7b": with_sizes(LLAMA, 32, 4096, 32, d_ff=11008, seq_len=2048, norm_eps=1e-6),
    "llama-13b": with_sizes(LLAMA, 40, 5120, 40, d_ff=13824, seq_len=2048, norm_eps=1e-6),
    "llama-33b": with_sizes(LLAMA, 60, 6656, 52, d_ff=17920, seq_len=2048, norm_eps=1e-6),
    "llama-65b": with_sizes(LLAMA, 80, 8192, 64, d_ff=22016, seq_len=2048, norm_eps=1e-6),
    "gemma2-2b": with_sizes(GEMMA2, 26, 2304, 8, n_kv_heads=4, d_head=256, d_ff=9216),
    "gemma2-9b": with_sizes(GEMMA2, 42, 3584, 16, n_kv_heads=8, d_head=256, d_ff=14336),
    # the attention scores are scaled by (d_model / n_heads)^-0.5
    "gemma2-27b": with_sizes(GEMMA2, 46, 4608, 32, n_kv_heads=16, d_head=128, d_ff=36864, attention_scale=144**-0.5),
    "mixtral-8x7b": with_sizes(MIXTRAL, 32, 4096, 32, d_ff=14336, experts=dict(n_experts=8, n_experts_per_token=2)),
    "mixtral-8x22b": with_sizes(
        MIXTRAL, 56, 6144, 48, d_ff=16384, seq_len=65536, experts=dict(n_experts=8, n_experts_per_token=2)
    ),
    "falcon-7b": with_sizes(FALCON_7B, 32, 4544, 71),
    "falcon-11b": with_sizes(
        FALCON_7B, 60, 4096, 32, n_kv_heads=8, d_ff=16384, seq_len=8192, rope_theta=500_042.0, tied_embeddings=False
    ),
    "falcon-40b": with_sizes(FALCON_40B, 60, 8192, 128),
    "falcon-180b": with_sizes(FALCON_40B, 80, 14848, 232),
    "falcon-rw-1b": with_sizes(FALCON_RW, 24, 2048, 32, n_vocab=50304),
    "falcon-rw-7b": with_sizes(FALCON_RW, 36, 4096, 64, n_vocab=65024),
    "opt-125m": with_sizes(OPT, 12, 768, 12),
    "opt-350m": with_sizes(OPT, 24, 1024, 16, residual="post-norm", d_token_embedding=512),
    "opt-1.3b": with_sizes(OPT, 24, 2048, 32),
    "opt-2.7b": with_sizes(OPT, 32, 2560, 32),
    "opt-6.7b": with_sizes(OPT, 32, 4096, 32),
    "opt-13b": with_sizes(OPT, 40, 5120, 40),
    "opt-30b": with_sizes(OPT, 48, 7168, 56),
    "opt-66b": with_sizes(OPT, 64, 9216, 72),
    "bloom-560m": with_sizes(BLOOM, 24, 1024, 16),
    "bloom-1b1": with_sizes(BLOOM, 24, 1536, 16),
    "bloom-1b7": with_sizes(BLOOM, 24, 2048, 16),
    "bloom-3b": with_sizes(BLOOM, 30, 2560, 32),
    "bloom-7b1": with_sizes(BLOOM, 30, 4096, 32),
    "bloom-176b": with_sizes(BLOOM, 70, 14336, 112),
    "mpt-7b": with_sizes(MPT, 32, 4096, 32, seq_len=2048),
    "mpt-30b": with_sizes(MPT, 48, 7168, 64, seq_len=8192),
    "santacoder": with_sizes(STARCODER, 24, 2048, 16, n_vocab=49280, seq_len=2048),
    "starcoderbase-1b": with_sizes(STARCODER, 24, 2048, 16),
    "starcoderbase-3b": with_sizes(STARCODER, 36, 2816, 22),
    "starcoderbase-7b": with_sizes(STARCODER, 42, 4096, 32),
    "starcoder": with_sizes(STARCODER, 40, 6144, 48),
    "t5-small": _t5(T5, 6, 512, 8, 2048),
    "t5-base": _t5(T5, 12, 768, 12, 3072),
    "t5-large": _t5(T5, 24, 1024, 16, 4096),
    "t5-3b": _t5(T5, 24, 1024, 32, 16384, 128),
    "t5-11b": _t5(T5, 24, 1024, 128, 65536, 128),
    "t5-v1.1-small": _t5(T5_V1_1, 8, 512, 6, 1024),
    "t5-v1.1-base": _t5(T5_V1_1, 12, 768, 12, 2048),
    "t5-v1.1-large": _t5(T5_V1_1, 24, 1024, 16, 2816),
    "t5-v1.1-xl": _t5(T5_V1_1, 24, 2048, 32, 5120),
    "t5-v1.1-xxl": _t5(T5_V1_1, 24, 4096, 64, 10240),
    # Flan-T5 has the sizes of T5 v1.1
    "flan-t5-small": _t5(T5_V1_1, 8, 512, 6, 1024),
    "flan-t5-base": _t5(T5_V1_1, 12, 768, 12, 2048),
    "flan-t5-large": _t5(T5_V1_1, 24, 1024, 16, 2816),
    "flan-t5-xl": _t5(T5_V1_1, 24, 2048, 32, 5120),
    "flan-t5-xxl": _t5(T5_V1_1, 24, 4096, 64, 10240),
    "mt5-small": _t5(MT5, 8, 512, 6, 1024),
    "mt5-base": _t5(MT5, 12, 768, 12, 2048),
    "mt5-large": _t5(MT5, 24, 1024, 16, 2816),
    "mt5-xl": _t5(MT5, 24, 2048, 32, 5120),
    "mt5-xxl": _t5(MT5, 24, 4096, 64, 10240),
    "umt5-small": _t5(UMT5, 8, 512, 6, 1024),
    "umt5-base": _t5(UMT5, 12, 768, 12, 2048),
    "umt5-xl": _t5(UMT5, 24, 2048, 32, 5120),
    "umt5-xxl": _t5(UMT5, 24, 4096, 64, 10240),
    "ul2": _t5(dict(T5_V1_1, activation="silu"), 32, 4096, 16, 16384, 256),
    "bert-base-uncased": with_sizes(BERT, 12, 768, 12, n_vocab=30522),
    "bert-base-cased": with_sizes(BERT, 12, 768, 12, n_vocab=28996),
    "bert-large-uncased": with_sizes(BERT, 24, 1024, 16, n_vocab=30522),
    "bert-large-cased": with_sizes(BERT, 24, 1024, 16, n_vocab=28996),
    "roberta-base": with_sizes(ROBERTA, 12, 768, 12),
    "roberta-large": with_sizes(ROBERTA, 24, 1024, 16),
    "albert-base-v2": with_sizes(ALBERT, 12, 768, 12),
    "albert-large-v2": with_sizes(ALBERT, 24, 1024, 16),
    "albert-xlarge-v2": with_sizes(ALBERT, 24, 2048, 16),
    "albert-xxlarge-v2": with_sizes(ALBERT, 12, 4096, 64),
    # a sentence encoder (mean of the hidden states), released without a masked language-model head
    "all-minilm-l6-v2": with_sizes(
        dict(BERT, head="none", head_bias=False, pooler=True), 6, 384, 12, d_ff=1536, n_vocab=30522
    ),
    "switch-base-8": _t5(SWITCH, 12, 768, 12, 3072, experts=_switch(8, 2, 1.25, 16)),
    "switch-base-16": _t5(SWITCH, 12, 768, 12, 3072, experts=_switch(16, 2, 1.25, 16)),
    "switch-base-32": _t5(SWITCH, 12, 768, 12, 3072, experts=_switch(32, 2, 1.25, 16)),
    "switch-base-64": _t5(SWITCH, 12, 768, 12, 3072, experts=_switch(64, 2, 1.25, 16)),
    "switch-base-128": _t5(SWITCH, 12, 768, 12, 3072, experts=_switch(128, 2, 1.25, 16)),
    "switch-base-256": _t5(SWITCH, 12, 768, 12, 3072, experts=_switch(256, 2, 1.25, 16)),
    "switch-large-128": _t5(SWITCH, 24, 1024, 16, 4096, experts=_switch(128, 2, 1.25, 8)),
    "switch-xxl": _t5(
        dict(T5_V1_1, init_scale=0.1),
        24,
        4096,
        64,
        10240,
        experts=_switch(128, 2, 1.25, 8) | {"eval_capacity_factor": 4.0},
    ),
    "switch-c": _t5(
        SWITCH, 15, 2080, 30, 6144, tied_embeddings=False, logit_scale="none", experts=_switch(2048, 1, 1.0, 4)
    ),
    "switch-decoder-base-8": with_sizes(SWITCH_DECODER, 12, 768, 12, d_ff=3072, experts=_switch(8, 2, 1.25)),
    "switch-decoder-base-128": with_sizes(SWITCH_DECODER, 12, 768, 12, d_ff=3072, experts=_switch(128, 2, 1.25)),
    "switch-decoder-c": with_sizes(
        SWITCH_DECODER, 15, 2080, 30, d_head=64, d_ff=6144, tied_embeddings=False, experts=_switch(2048, 1, 1.0)
    ),
    **DENSE_PRESETS,
    **EXPERT_PRESETS,
}
