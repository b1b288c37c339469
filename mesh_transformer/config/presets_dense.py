# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Presets of dense decoder-only models since Llama 2, from the published config.json of each model."""

import math
from typing import Any


def with_sizes(family: dict[str, Any], n_layers: int, d_model: int, n_heads: int, **rest: Any) -> dict[str, Any]:
    """Return the fields of a family with these sizes and further fields."""
    return dict(family, n_layers=n_layers, d_model=d_model, n_heads=n_heads, **rest)


NO_BIASES = dict(qkv_bias=False, attention_out_bias=False, ff_bias=False)
LLAMA = dict(
    n_vocab=32000,
    norm="rmsnorm",
    positions="rope-half",
    activation="silu",
    gated_ffn=True,
    **NO_BIASES,
    tied_embeddings=False,
)
LLAMA3 = dict(LLAMA, n_vocab=128_256, n_kv_heads=8, rope_theta=500_000.0)
LLAMA3_SCALING = dict(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_seq_len=8192)
LLAMA31 = dict(LLAMA3, seq_len=131_072, rope_scaling=LLAMA3_SCALING)
LLAMA32 = dict(LLAMA31, rope_scaling=dict(LLAMA3_SCALING, factor=32.0), tied_embeddings=True)
QWEN2 = dict(LLAMA, n_vocab=151_936, qkv_bias=True, norm_eps=1e-6, rope_theta=1e6, seq_len=32_768)
QWEN25 = dict(QWEN2, seq_len=131_072)
QWEN3 = dict(
    LLAMA, n_vocab=151_936, norm_eps=1e-6, rope_theta=1e6, seq_len=40_960, n_kv_heads=8, d_head=128, qk_norm=True
)
GEMMA = dict(
    n_vocab=256_000,
    seq_len=8192,
    norm="gemma-rmsnorm",
    norm_eps=1e-6,
    positions="rope-half",
    activation="gelu-tanh",
    gated_ffn=True,
    embedding_scale="sqrt_d_model",
    d_head=256,
    **NO_BIASES,
)
# arXiv 2503.19786. n_vocab is that of the text-only models; multimodal models have 64 more rows
GEMMA3 = dict(
    GEMMA,
    n_vocab=262_144,
    seq_len=131_072,
    residual="sandwich",
    qk_norm="gemma-rmsnorm",
    rope_theta=1e6,
    rope_local_theta=10_000.0,
    attention_pattern=["local", "local", "local", "local", "local", "global"],
    attention_window=1024,
)
GEMMA3_LONG = dict(GEMMA3, n_vocab=262_208, rope_scaling=dict(type="linear", factor=8.0))
PHI3 = dict(LLAMA, n_vocab=32_064, seq_len=4096, attention_pattern=["local"], attention_window=2047)
# LongRoPE (arXiv 2402.13753) of Phi 3.5 mini and Phi 4 mini: divisors of the frequencies of the 48 rotated pairs of channels.
# The windows of 262,144 keys in their config.json have no effect on 131,072 tokens.
PHI35_SHORT = [
    1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705, 1.0499999523162842, 1.0499999523162842,
    1.0499999523162842, 1.0499999523162842, 1.0499999523162842, 1.0699999332427979, 1.0999999046325684, 1.1099998950958252,
    1.1599998474121094, 1.1599998474121094, 1.1699998378753662, 1.2899998426437378, 1.339999794960022, 1.679999828338623,
    1.7899998426437378, 1.8199998140335083, 1.8499997854232788, 1.8799997568130493, 1.9099997282028198, 1.9399996995925903,
    1.9899996519088745, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346,
    2.0199997425079346, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914,
    2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0799996852874756, 2.0899996757507324,
    2.189999580383301, 2.2199995517730713, 2.5899994373321533, 2.729999542236328, 2.749999523162842, 2.8399994373321533,
]  # fmt: skip
PHI35_LONG = [
    1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115, 1.600000023841858,
    1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863, 4.789999961853027, 7.400000095367432,
    7.700000286102295, 9.09000015258789, 12.199999809265137, 17.670000076293945, 24.46000099182129, 28.57000160217285,
    30.420001983642578, 30.840002059936523, 32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992,
    50.340003967285156, 50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457,
    62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457, 63.77000427246094,
    63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688, 64.06999969482422, 64.08000183105469,
    64.12000274658203, 64.41000366210938, 64.4800033569336, 64.51000213623047, 64.52999877929688, 64.83999633789062,
]  # fmt: skip
PHI4_MINI_LONG = [
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897,
    1.956131817, 2.187582649, 2.446418898, 2.735880826, 3.059592084, 3.421605075,
    3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651,
    14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418,
    28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6,
    32.61, 32.64, 32.66, 32.7, 32.71, 32.93,
    32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
LONGROPE = dict(type="longrope", original_seq_len=4096, attention_factor=(1 + math.log(32) / math.log(4096)) ** 0.5)
PHI_MINI = dict(LLAMA, seq_len=131_072, d_ff=8192)
OLMO = dict(LLAMA, n_vocab=50_304, seq_len=2048, norm="nonparametric-layernorm")
OLMO2 = dict(
    LLAMA,
    n_vocab=100_352,
    seq_len=4096,
    norm_eps=1e-6,
    residual="reordered-norm",
    qk_norm="rmsnorm-all-heads",
    rope_theta=500_000.0,
)
STABLELM2 = dict(LLAMA, n_vocab=100_352, seq_len=4096, norm="layernorm")
SMOLLM2 = dict(LLAMA, n_vocab=49_152, seq_len=8192, rope_theta=100_000.0, tied_embeddings=True)
STARCODER2 = dict(
    n_vocab=49_152,
    seq_len=16_384,
    norm="layernorm",
    positions="rope-half",
    activation="gelu-tanh",
    attention_pattern=["local"],
    attention_window=4096,
)
COMMAND_R = dict(
    LLAMA,
    n_vocab=256_000,
    seq_len=131_072,
    norm="layernorm",
    norm_bias=False,
    residual="parallel",
    positions="rope-interleaved",
    tied_embeddings=True,
)

DENSE_PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": with_sizes(LLAMA, 32, 4096, 32, d_ff=11008, seq_len=4096),
    "llama2-13b": with_sizes(LLAMA, 40, 5120, 40, d_ff=13824, seq_len=4096),
    "llama2-70b": with_sizes(LLAMA, 80, 8192, 64, n_kv_heads=8, d_ff=28672, seq_len=4096),
    "llama3-8b": with_sizes(LLAMA3, 32, 4096, 32, d_ff=14336, seq_len=8192),
    "llama3-70b": with_sizes(LLAMA3, 80, 8192, 64, d_ff=28672, seq_len=8192),
    "llama3.1-8b": with_sizes(LLAMA31, 32, 4096, 32, d_ff=14336),
    "llama3.1-70b": with_sizes(LLAMA31, 80, 8192, 64, d_ff=28672),
    "llama3.1-405b": with_sizes(LLAMA31, 126, 16384, 128, d_ff=53248),
    "llama3.2-1b": with_sizes(LLAMA32, 16, 2048, 32, d_ff=8192),
    "llama3.2-3b": with_sizes(LLAMA32, 28, 3072, 24, d_ff=8192),
    "llama3.3-70b": with_sizes(LLAMA31, 80, 8192, 64, d_ff=28672),
    "mistral-7b-v0.1": with_sizes(
        LLAMA,
        32,
        4096,
        32,
        n_kv_heads=8,
        d_ff=14336,
        seq_len=32_768,
        attention_pattern=["local"],
        attention_window=4096,
    ),
    "mistral-7b-v0.3": with_sizes(
        LLAMA, 32, 4096, 32, n_kv_heads=8, d_ff=14336, seq_len=32_768, n_vocab=32_768, rope_theta=1e6
    ),
    "mistral-nemo-12b": with_sizes(
        LLAMA, 40, 5120, 32, n_kv_heads=8, d_head=128, d_ff=14336, seq_len=131_072, n_vocab=131_072, rope_theta=1e6
    ),
    "qwen2-0.5b": with_sizes(QWEN2, 24, 896, 14, n_kv_heads=2, d_ff=4864, seq_len=131_072, tied_embeddings=True),
    "qwen2-1.5b": with_sizes(QWEN2, 28, 1536, 12, n_kv_heads=2, d_ff=8960, seq_len=131_072, tied_embeddings=True),
    "qwen2-7b": with_sizes(QWEN2, 28, 3584, 28, n_kv_heads=4, d_ff=18944, n_vocab=152_064, seq_len=131_072),
    "qwen2-72b": with_sizes(
        QWEN2, 80, 8192, 64, n_kv_heads=8, d_ff=29568, n_vocab=152_064, seq_len=131_072, norm_eps=1e-5
    ),
    "qwen2.5-0.5b": with_sizes(QWEN2, 24, 896, 14, n_kv_heads=2, d_ff=4864, tied_embeddings=True),
    "qwen2.5-1.5b": with_sizes(QWEN25, 28, 1536, 12, n_kv_heads=2, d_ff=8960, tied_embeddings=True),
    "qwen2.5-3b": with_sizes(QWEN2, 36, 2048, 16, n_kv_heads=2, d_ff=11008, tied_embeddings=True),
    "qwen2.5-7b": with_sizes(QWEN25, 28, 3584, 28, n_kv_heads=4, d_ff=18944, n_vocab=152_064),
    "qwen2.5-14b": with_sizes(QWEN25, 48, 5120, 40, n_kv_heads=8, d_ff=13824, n_vocab=152_064, norm_eps=1e-5),
    "qwen2.5-32b": with_sizes(QWEN25, 64, 5120, 40, n_kv_heads=8, d_ff=27648, n_vocab=152_064, norm_eps=1e-5),
    "qwen2.5-72b": with_sizes(QWEN25, 80, 8192, 64, n_kv_heads=8, d_ff=29568, n_vocab=152_064, norm_eps=1e-5),
    "qwen3-0.6b": with_sizes(QWEN3, 28, 1024, 16, d_ff=3072, tied_embeddings=True),
    "qwen3-1.7b": with_sizes(QWEN3, 28, 2048, 16, d_ff=6144, tied_embeddings=True),
    "qwen3-4b": with_sizes(QWEN3, 36, 2560, 32, d_ff=9728, tied_embeddings=True),
    "qwen3-8b": with_sizes(QWEN3, 36, 4096, 32, d_ff=12288),
    "qwen3-14b": with_sizes(QWEN3, 40, 5120, 40, d_ff=17408),
    "qwen3-32b": with_sizes(QWEN3, 64, 5120, 64, d_ff=25600),
    "gemma-2b": with_sizes(GEMMA, 18, 2048, 8, n_kv_heads=1, d_ff=16384),
    "gemma-7b": with_sizes(GEMMA, 28, 3072, 16, d_ff=24576),
    "gemma3-1b": with_sizes(GEMMA3, 26, 1152, 4, n_kv_heads=1, d_ff=6912, attention_window=512, seq_len=32_768),
    "gemma3-4b": with_sizes(GEMMA3_LONG, 34, 2560, 8, n_kv_heads=4, d_ff=10240),
    "gemma3-12b": with_sizes(GEMMA3_LONG, 48, 3840, 16, n_kv_heads=8, d_ff=15360),
    # the attention scores are scaled by (d_model / n_heads)^-0.5
    "gemma3-27b": with_sizes(
        GEMMA3_LONG, 62, 5376, 32, n_kv_heads=16, d_head=128, d_ff=21504, attention_scale=168**-0.5
    ),
    "phi3-mini": with_sizes(PHI3, 32, 3072, 32, d_ff=8192),
    "phi3-medium": with_sizes(PHI3, 40, 5120, 40, n_kv_heads=10, d_ff=17920),
    "phi3.5-mini": with_sizes(
        dict(PHI_MINI, n_vocab=32_064),
        32,
        3072,
        32,
        rope_scaling=dict(LONGROPE, short_factor=PHI35_SHORT, long_factor=PHI35_LONG),
    ),
    # 96 of the 128 channels of a head are rotated
    "phi4-mini": with_sizes(
        dict(PHI_MINI, n_vocab=200_064),
        32,
        3072,
        24,
        n_kv_heads=8,
        rope_dims=96,
        tied_embeddings=True,
        rope_scaling=dict(LONGROPE, short_factor=[1.0] * 48, long_factor=PHI4_MINI_LONG),
    ),
    "phi4": with_sizes(
        dict(LLAMA, n_vocab=100_352, seq_len=16_384, rope_theta=250_000.0), 40, 5120, 40, n_kv_heads=10, d_ff=17920
    ),
    "olmo-1b": with_sizes(OLMO, 16, 2048, 16, d_ff=8192, tied_embeddings=True),
    "olmo-7b": with_sizes(OLMO, 32, 4096, 32, d_ff=11008),
    "olmo2-1b": with_sizes(OLMO2, 16, 2048, 16, d_ff=8192),
    "olmo2-7b": with_sizes(OLMO2, 32, 4096, 32, d_ff=11008),
    "olmo2-13b": with_sizes(OLMO2, 40, 5120, 40, d_ff=13824),
    "olmo2-32b": with_sizes(OLMO2, 64, 5120, 40, n_kv_heads=8, d_ff=27648),
    "stablelm2-1.6b": with_sizes(STABLELM2, 24, 2048, 32, d_ff=5632, rope_dims=16, qkv_bias=True),
    "stablelm2-12b": with_sizes(
        STABLELM2,
        40,
        5120,
        32,
        n_kv_heads=8,
        d_ff=13824,
        rope_dims=40,
        residual="parallel",
        qk_norm="layernorm-per-head",
    ),
    "smollm2-135m": with_sizes(SMOLLM2, 30, 576, 9, n_kv_heads=3, d_ff=1536),
    "smollm2-360m": with_sizes(SMOLLM2, 32, 960, 15, n_kv_heads=5, d_ff=2560),
    "smollm2-1.7b": with_sizes(SMOLLM2, 24, 2048, 32, d_ff=8192, rope_theta=130_000.0),
    "smollm3-3b": with_sizes(
        dict(LLAMA, n_vocab=128_256, seq_len=65_536, norm_eps=1e-6, rope_theta=5e6, tied_embeddings=True),
        36,
        2048,
        16,
        n_kv_heads=4,
        d_ff=11008,
        rope_pattern=[True, True, True, False],
    ),
    "starcoder2-3b": with_sizes(STARCODER2, 30, 3072, 24, n_kv_heads=2, d_ff=12288, rope_theta=999_999.4420358813),
    "starcoder2-7b": with_sizes(STARCODER2, 32, 4608, 36, n_kv_heads=4, d_ff=18432, rope_theta=1e6),
    "starcoder2-15b": with_sizes(
        STARCODER2, 40, 6144, 48, n_kv_heads=4, d_ff=24576, rope_theta=100_000.0, tied_embeddings=False
    ),
    "command-r": with_sizes(COMMAND_R, 40, 8192, 64, d_ff=22528, rope_theta=8e6, logit_scale=0.0625),
    "command-r-plus": with_sizes(
        COMMAND_R,
        64,
        12288,
        96,
        n_kv_heads=8,
        d_ff=33792,
        rope_theta=75e6,
        logit_scale=0.8333333333333334,
        qk_norm="layernorm-per-head",
    ),
}
