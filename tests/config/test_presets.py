# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every row of the families table makes a model of exactly the published size."""

import pytest

from mesh_transformer.config import ModelConfig, parse_model
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.config.presets_dense import DENSE_PRESETS
from mesh_transformer.model.shapes import count_params, describe_params
from mesh_transformer.plan.estimate import count_active, describe_model

# Counts of the released files as transformers instantiates them, except GPT-3 (never released: the paper's table 2.1 in
# GPT-2's form) and neox-* (the library's yml files: by the closed formula below alone). GPT-J is the unique count, as
# in transformers: its README's 6,053,381,344 also counts what each of eight shards keeps a copy of.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-xl": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
    "gpt-neo-125m": 125_198_592,
    "gpt-neo-350m": 355_798_016,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
    "gptj-6b": 6_050_882_784,
    "gpt-neox-20b": 20_554_567_680,
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "falcon-7b": 6_921_720_704,
    "falcon-11b": 11_102_822_400,
    "falcon-40b": 41_303_293_952,
    "falcon-180b": 178_557_088_768,
    "falcon-rw-1b": 1_311_625_216,
    "falcon-rw-7b": 7_516_020_736,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "mpt-7b": 6_649_286_656,
    "mpt-30b": 29_957_200_896,
    "santacoder": 1_124_886_528,
    "starcoderbase-1b": 1_137_207_296,
    "starcoderbase-3b": 3_043_311_104,
    "starcoderbase-7b": 7_327_263_232,
    "starcoder": 15_517_456_384,
    # experts (DeepSeek V3: without the multi-token prediction layer of its files)
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
    "flan-t5-small": 76_961_152,
    "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
    "umt5-small": 306_601_984,
    "umt5-base": 592_043_520,
    "umt5-xl": 3_768_356_864,
    "umt5-xxl": 12_972_531_712,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
    "ul2": 19_591_209_984,
    "switch-base-8": 619_339_008,
    "switch-base-16": 1_072_397_568,
    "switch-base-32": 1_978_514_688,
    "switch-base-64": 3_790_748_928,
    "switch-base-128": 7_415_217_408,
    "switch-base-256": 14_664_154_368,
    "switch-large-128": 26_309_291_008,
    "bert-base-uncased": 109_514_298,
    "bert-base-cased": 108_340_804,
    "bert-large-uncased": 335_174_458,
    "bert-large-cased": 333_610_308,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "albert-base-v2": 11_221_680,
    "albert-large-v2": 16_795_824,
    "albert-xlarge-v2": 54_821_040,
    "albert-xxlarge-v2": 206_368_944,
    "all-minilm-l6-v2": 22_713_216,
}
# Encoders without their masked language-model head, with a pooler and a classifier of this many labels.
WITH_POOLER = {
    ("bert-base-uncased", None): 109_482_240,
    ("bert-large-cased", None): 333_579_264,
    ("roberta-base", None): 124_645_632,
    ("albert-base-v2", None): 11_683_584,
    ("albert-large-v2", None): 17_683_968,
    ("albert-xlarge-v2", None): 58_724_864,
    ("albert-xxlarge-v2", 2): 222_603_778,
}
# Known to three or four digits: sizes that were published but not as files that transformers reads (Switch, table 9;
# of XXL with the 128 experts of its code), and a decoder-only variant, which was never published.
OURS = {
    "switch-xxl": 395_000_000_000,
    "switch-c": 1_571_000_000_000,
    "switch-decoder-base-8": 309_000_000,
    "switch-decoder-base-128": 3_700_000_000,
    "switch-decoder-c": 786_000_000_000,
}
# n_layers, d_model, n_heads, d_head of the papers' and libraries' tables: counts hardly depend on the heads.
PUBLISHED_SHAPES = {
    "gpt2": (12, 768, 12, 64),
    "gpt2-medium": (24, 1024, 16, 64),
    "gpt2-large": (36, 1280, 20, 64),
    "gpt2-xl": (48, 1600, 25, 64),
    "gpt3-small": (12, 768, 12, 64),
    "gpt3-medium": (24, 1024, 16, 64),
    "gpt3-large": (24, 1536, 16, 96),
    "gpt3-xl": (24, 2048, 16, 128),
    "gpt3-2.7b": (32, 2560, 32, 80),
    "gpt3-6.7b": (32, 4096, 32, 128),
    "gpt3-13b": (40, 5120, 40, 128),
    "gpt3-175b": (96, 12288, 96, 128),
    "gpt-neo-125m": (12, 768, 12, 64),
    "gpt-neo-350m": (24, 1024, 16, 64),
    "gpt-neo-1.3b": (24, 2048, 16, 128),
    "gpt-neo-2.7b": (32, 2560, 20, 128),
    "gptj-6b": (28, 4096, 16, 256),
    "gpt-neox-20b": (44, 6144, 64, 96),
    "neox-19m": (6, 512, 8, 64),
    "neox-49m": (10, 640, 10, 64),
    "neox-125m": (12, 768, 12, 64),
    "neox-350m": (24, 1024, 16, 64),
    "neox-760m": (24, 1536, 16, 96),
    "neox-800m": (16, 2048, 8, 256),
    "neox-1.3b": (24, 2048, 16, 128),
    "neox-2.7b": (32, 2560, 32, 80),
    "neox-6.7b": (32, 4096, 32, 128),
    "neox-13b": (40, 5120, 40, 128),
    "neox-175b": (96, 12288, 96, 128),
    "pythia-14m": (6, 128, 4, 32),
    "pythia-31m": (6, 256, 8, 32),
    "pythia-70m": (6, 512, 8, 64),
    "pythia-160m": (12, 768, 12, 64),
    "pythia-410m": (24, 1024, 16, 64),
    "pythia-1b": (16, 2048, 8, 256),
    "pythia-1.4b": (24, 2048, 16, 128),
    "pythia-2.8b": (32, 2560, 32, 80),
    "pythia-6.9b": (32, 4096, 32, 128),
    "pythia-12b": (36, 5120, 40, 128),
    "llama-7b": (32, 4096, 32, 128),
    "llama-13b": (40, 5120, 40, 128),
    "llama-33b": (60, 6656, 52, 128),
    "llama-65b": (80, 8192, 64, 128),
    "gemma2-2b": (26, 2304, 8, 256),
    "gemma2-9b": (42, 3584, 16, 256),
    "gemma2-27b": (46, 4608, 32, 128),
    "mixtral-8x7b": (32, 4096, 32, 128),
    "mixtral-8x22b": (56, 6144, 48, 128),
    "falcon-7b": (32, 4544, 71, 64),
    "falcon-11b": (60, 4096, 32, 128),
    "falcon-40b": (60, 8192, 128, 64),
    "falcon-180b": (80, 14848, 232, 64),
    "falcon-rw-1b": (24, 2048, 32, 64),
    "falcon-rw-7b": (36, 4096, 64, 64),
    "opt-125m": (12, 768, 12, 64),
    "opt-350m": (24, 1024, 16, 64),
    "opt-1.3b": (24, 2048, 32, 64),
    "opt-2.7b": (32, 2560, 32, 80),
    "opt-6.7b": (32, 4096, 32, 128),
    "opt-13b": (40, 5120, 40, 128),
    "opt-30b": (48, 7168, 56, 128),
    "opt-66b": (64, 9216, 72, 128),
    "bloom-560m": (24, 1024, 16, 64),
    "bloom-1b1": (24, 1536, 16, 96),
    "bloom-1b7": (24, 2048, 16, 128),
    "bloom-3b": (30, 2560, 32, 80),
    "bloom-7b1": (30, 4096, 32, 128),
    "bloom-176b": (70, 14336, 112, 128),
    "mpt-7b": (32, 4096, 32, 128),
    "mpt-30b": (48, 7168, 64, 112),
    "santacoder": (24, 2048, 16, 128),
    "starcoderbase-1b": (24, 2048, 16, 128),
    "starcoderbase-3b": (36, 2816, 22, 128),
    "starcoderbase-7b": (42, 4096, 32, 128),
    "starcoder": (40, 6144, 48, 128),
    **{f"{name}-small": (8, 512, 6, 64) for name in ("flan-t5", "mt5", "umt5")},
    **{f"{name}-base": (12, 768, 12, 64) for name in ("flan-t5", "mt5", "umt5")},
    **{f"{name}-large": (24, 1024, 16, 64) for name in ("flan-t5", "mt5")},
    **{f"{name}-xl": (24, 2048, 32, 64) for name in ("flan-t5", "mt5", "umt5")},
    **{f"{name}-xxl": (24, 4096, 64, 64) for name in ("flan-t5", "mt5", "umt5")},
    "ul2": (32, 4096, 16, 256),
    "qwen1.5-moe-a2.7b": (24, 2048, 16, 128),
    "qwen2-57b-a14b": (28, 3584, 28, 128),
    "qwen3-30b-a3b": (48, 2048, 32, 128),
    "qwen3-235b-a22b": (94, 4096, 64, 128),
    "deepseek-v2-lite": (27, 2048, 16, 192),
    "deepseek-v2": (60, 5120, 128, 192),
    "deepseek-v3": (61, 7168, 128, 192),
    "gpt-oss-20b": (24, 2880, 64, 64),
    "gpt-oss-120b": (36, 2880, 64, 64),
    "t5-small": (6, 512, 8, 64),
    "t5-base": (12, 768, 12, 64),
    "t5-large": (24, 1024, 16, 64),
    "t5-3b": (24, 1024, 32, 128),
    "t5-11b": (24, 1024, 128, 128),
    "t5-v1.1-small": (8, 512, 6, 64),
    "t5-v1.1-base": (12, 768, 12, 64),
    "t5-v1.1-large": (24, 1024, 16, 64),
    "t5-v1.1-xl": (24, 2048, 32, 64),
    "t5-v1.1-xxl": (24, 4096, 64, 64),
    **dict.fromkeys((f"switch-base-{2**i}" for i in range(3, 9)), (12, 768, 12, 64)),
    "switch-large-128": (24, 1024, 16, 64),
    "switch-xxl": (24, 4096, 64, 64),
    "switch-c": (15, 2080, 30, 64),
    "switch-decoder-base-8": (12, 768, 12, 64),
    "switch-decoder-base-128": (12, 768, 12, 64),
    "switch-decoder-c": (15, 2080, 30, 64),
    "bert-base-uncased": (12, 768, 12, 64),
    "bert-base-cased": (12, 768, 12, 64),
    "bert-large-uncased": (24, 1024, 16, 64),
    "bert-large-cased": (24, 1024, 16, 64),
    "roberta-base": (12, 768, 12, 64),
    "roberta-large": (24, 1024, 16, 64),
    "albert-base-v2": (12, 768, 12, 64),
    "albert-large-v2": (24, 1024, 16, 64),
    "albert-xlarge-v2": (24, 2048, 16, 128),
    "albert-xxlarge-v2": (12, 4096, 64, 64),
    "all-minilm-l6-v2": (6, 384, 12, 32),
}


def make_config(name: str) -> ModelConfig:
    return parse_model(PRESETS[name] | {"preset": name}, where=name)


def closed_formula(name: str, c: ModelConfig) -> int:
    """Parameters by each family's closed formula (weights, then biases and norms, per layer)."""
    v, t, d, layers, f = c.n_vocab, c.seq_len, c.d_model, c.n_layers, c.ff_dim
    if name.startswith(("gpt2", "gpt3")):
        return v * d + t * d + layers * (12 * d * d + 13 * d) + 2 * d
    if name.startswith("gpt-neo-"):
        return v * d + t * d + layers * (12 * d * d + 10 * d) + 2 * d
    if name.startswith("gptj"):
        return 2 * v * d + v + layers * (12 * d * d + 7 * d) + 2 * d
    if name.startswith(("gpt-neox", "neox", "pythia")):
        return 2 * v * d + layers * (12 * d * d + 13 * d) + 2 * d
    if name.startswith("llama"):
        return 2 * v * d + layers * (4 * d * d + 3 * d * f + 2 * d) + d
    if name.startswith("gemma2"):  # four norms per layer
        attention = 2 * d * c.n_heads * c.head_dim + 2 * d * c.kv_heads * c.head_dim
        return v * d + layers * (attention + 3 * d * f + 4 * d) + d
    if name.startswith("mixtral"):
        attention = 2 * d * d + 2 * d * c.kv_heads * c.head_dim
        return 2 * v * d + layers * (attention + 8 * 3 * d * f + 8 * d + 2 * d) + d
    if name.startswith("falcon"):
        attention = 2 * d * d + 2 * d * c.kv_heads * c.head_dim
        n_norms = 1 if c.residual == "parallel" else 2
        biases = 5 * d + f if c.ff_bias else 0
        head = 0 if c.tied_embeddings else v * d
        return v * d + head + layers * (attention + 2 * d * f + 2 * n_norms * d + biases) + 2 * d
    if name == "opt-350m":  # smaller token embeddings, and no final norm
        return v * 512 + 2 * 512 * d + (t + 2) * d + layers * (12 * d * d + 13 * d)
    if name.startswith("opt"):  # two rows of the position table are not used
        return v * d + (t + 2) * d + layers * (12 * d * d + 13 * d) + 2 * d
    if name.startswith("bloom"):  # a norm of the embeddings
        return v * d + 2 * d + layers * (12 * d * d + 13 * d) + 2 * d
    if name.startswith("mpt"):  # no biases
        return v * d + layers * (12 * d * d + 2 * d) + d
    if name.startswith(("santacoder", "starcoder")):  # one key-value head
        kv = 2 * c.head_dim
        return v * d + t * d + layers * (10 * d * d + d * kv + kv + 11 * d) + 2 * d
    if name.startswith(("qwen", "deepseek", "gpt-oss")):
        assert c.experts is not None
        return 2 * v * d + d + sum(experts_layer(c, kind.has_experts) for kind in c.layer_kinds)
    if name.startswith(("switch", "t5", "flan", "mt5", "umt5", "ul2")):
        attention, tables = 4 * d * c.n_heads * c.head_dim, (1 if c.tied_embeddings else 2) * v * d
        dense = (3 if c.gated_ffn else 2) * d * f

        def stack(layers: int, blocks: int) -> int:
            """Each layer has so many attention and feed-forward blocks with a norm before each."""
            sparse = 0 if c.experts is None else layers // c.experts.layer_interval
            ff = (layers - sparse) * dense + (sparse * c.experts.n_experts * (dense + d) if c.experts else 0)
            biases = (1 if c.t5_shared_bias else layers) * 32 * c.n_heads
            return layers * ((blocks - 1) * attention + blocks * d) + ff + biases + d

        encoder = 0 if c.n_encoder_layers is None else stack(c.n_encoder_layers, 2)
        return tables + encoder + stack(layers, 2 if c.n_encoder_layers is None else 3)
    if name.startswith(("bert", "roberta", "albert", "all-minilm")):
        e, own_layers = c.embedding_dim, layers // c.layer_uses
        embeddings = (v + t + c.position_offset + (c.n_token_types or 0) + 2) * e + (0 if e == d else (e + 1) * d)
        head = (d + 1) * e + 2 * e + v if c.head == "masked-lm" else (d + 1) * d
        return embeddings + own_layers * (4 * d * d + 2 * d * f + 9 * d + f) + head
    raise AssertionError(f"{name}: add the family's formula")


def experts_layer(c: ModelConfig, has_experts: bool) -> int:
    """Parameters of one layer of the families with experts and gated feed-forward layers."""
    d, e, latent = c.d_model, c.experts, c.latent_attention
    assert e is not None
    if latent is None:
        q, kv = c.n_heads * c.head_dim, c.kv_heads * c.head_dim
        attention = d * (2 * q + 2 * kv) + c.qkv_bias * (q + 2 * kv) + c.attention_out_bias * d
        attention += c.qk_norm * 2 * c.head_dim + c.attention_sinks * c.n_heads
    else:
        r, heads = latent.kv_rank, c.n_heads
        q = heads * c.head_dim
        attention = d * q if latent.q_rank is None else latent.q_rank * (d + q + 1)
        attention += d * (r + latent.d_rotated) + r + r * heads * (latent.d_unrotated + latent.d_value)
        attention += heads * latent.d_value * d
    if not has_experts:
        return attention + 2 * d + 3 * d * c.ff_dim
    expert = 3 * d * c.expert_ff_dim + e.bias * (2 * c.expert_ff_dim + d)
    router = e.n_experts * (d + e.router_bias + e.selection_bias)
    shared = e.shared_expert * (3 * d * c.shared_ff_dim + e.shared_gate * d)
    return attention + 2 * d + e.n_experts * expert + router + shared


# Parameters that process a token, as published: with all layers but the embedding, or in the card of the model.
ACTIVE = {
    "qwen3-30b-a3b": 3.3e9,
    "qwen3-235b-a22b": 22e9,
    "deepseek-v2-lite": 2.4e9,
    "deepseek-v2": 21e9,
    "deepseek-v3": 37e9,
    "gpt-oss-20b": 3.61e9,
    "gpt-oss-120b": 5.13e9,
}


@pytest.mark.parametrize("name", ACTIVE)
def test_published_number_of_active_parameters(name):
    config = make_config(name)
    assert config.experts is not None
    active = count_active(describe_model(config), config.experts.n_experts_per_token, config)
    if name.startswith("gpt-oss"):  # its card does not count the embedding
        active -= config.n_vocab * config.d_model
    assert active == pytest.approx(ACTIVE[name], rel=0.11 if name == "deepseek-v2-lite" else 0.03)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in DENSE_PRESETS])
def test_row_has_published_size(name):
    config = make_config(name)
    counted = count_params(config)
    assert counted == closed_formula(name, config)
    if name in OURS:
        assert counted == pytest.approx(OURS[name], rel=0.01)
    elif not name.startswith("neox-"):
        assert counted == PUBLISHED[name]
    assert (config.n_layers, config.d_model, config.n_heads, config.head_dim) == PUBLISHED_SHAPES[name]


def test_gpt_j_readme_counts_eight_shards_copies():
    """The original's 6,053,381,344 = the unique count, the embedding's bias, and what seven more shards repeat."""
    c = make_config("gptj-6b")
    copies = 7 * c.d_model * c.n_layers + 7 * 2 * c.d_model * (c.n_layers + 1) + 8 * c.d_model
    assert count_params(c) + copies == 6_053_381_344


# Properties besides sizes that distinguish the families (transformers' configurations; the libraries' yml files).
CHOICES = {
    "gpt2": dict(
        positions="learned", residual="serial", activation="gelu-tanh", n_vocab=50257, seq_len=1024, norm_eps=1e-5
    ),
    "gpt3-175b": dict(attention_pattern=("global", "local"), n_vocab=50257, seq_len=2048),
    "gpt-neo-2.7b": dict(
        attention_pattern=("global", "local"), attention_window=256, attention_scale="none", seq_len=2048
    ),
    "gptj-6b": dict(
        positions="rope-interleaved", rope_dim=64, residual="parallel", n_vocab=50400, activation="gelu-tanh"
    ),
    "gpt-neox-20b": dict(
        positions="rope-half",
        rope_dim=24,
        residual="parallel-two-norms",
        activation="gelu-tanh",
        n_vocab=50432,
    ),
    "neox-1.3b": dict(positions="rope-half", rope_dim=128, residual="serial", n_vocab=50304),
    "pythia-2.8b": dict(rope_dim=20, residual="parallel-two-norms", activation="gelu-erf", n_vocab=50304),
    "pythia-6.9b": dict(rope_dim=32, n_vocab=50432),
    "pythia-12b": dict(rope_dim=32, n_vocab=50688),
    "llama-7b": dict(
        norm="rmsnorm",
        norm_eps=1e-6,
        gated_ffn=True,
        activation="silu",
        positions="rope-half",
        rope_dim=128,
        ff_dim=11008,
    ),
    "llama2-7b": dict(norm_eps=1e-5, seq_len=4096),
    "gemma2-9b": dict(
        norm="gemma-rmsnorm",
        residual="sandwich",
        kv_heads=8,
        ff_dim=14336,
        attention_softcap=50.0,
        logit_softcap=30.0,
        attention_pattern=("local", "global"),
        attention_window=4096,
        embedding_scale="sqrt_d_model",
        seq_len=8192,
    ),
    "gemma2-27b": dict(attention_scale=1 / 12, kv_heads=16, ff_dim=36864),
    "mixtral-8x7b": dict(norm_eps=1e-5, kv_heads=8, ff_dim=14336, rope_theta=1e6, seq_len=32768),
    "falcon-7b": dict(residual="parallel", kv_heads=1, positions="rope-half", activation="gelu-erf", ff_bias=False),
    "falcon-40b": dict(residual="parallel-two-norms", kv_heads=8, n_vocab=65024),
    "falcon-rw-1b": dict(residual="serial", kv_heads=32, positions="falcon-alibi", qkv_bias=True, n_vocab=50304),
    "opt-350m": dict(activation="relu", residual="post-norm", d_token_embedding=512),
    "opt-1.3b": dict(activation="relu", position_offset=2, seq_len=2048, residual="serial"),
    "bloom-176b": dict(positions="alibi", embedding_norm=True, activation="gelu-tanh", n_vocab=250_880),
    "mpt-7b": dict(positions="alibi", norm_bias=False, qkv_bias=False, ff_bias=False, activation="gelu-erf"),
    "starcoder": dict(kv_heads=1, positions="learned", seq_len=8192, activation="gelu-tanh", qkv_bias=True),
    "umt5-xxl": dict(n_vocab=256_384, gated_ffn=True, t5_shared_bias=False, tied_embeddings=False, logit_scale="none"),
    "mt5-xxl": dict(n_vocab=250_112, gated_ffn=True, tied_embeddings=False, logit_scale="none"),
    "ul2": dict(activation="silu", gated_ffn=True, ff_dim=16384, n_encoder_layers=32, tied_embeddings=False),
    "t5-base": dict(
        n_encoder_layers=12,
        ff_dim=3072,
        activation="relu",
        gated_ffn=False,
        tied_embeddings=True,
        logit_scale="rsqrt_d_model",
    ),
    "t5-v1.1-xxl": dict(
        ff_dim=10240, activation="gelu-tanh", gated_ffn=True, tied_embeddings=False, logit_scale="none"
    ),
    "switch-base-8": dict(n_encoder_layers=12, ff_dim=3072, activation="relu", tied_embeddings=True, positions="t5"),
    "switch-xxl": dict(ff_dim=10240, gated_ffn=True, tied_embeddings=False),
    "switch-c": dict(n_encoder_layers=15, ff_dim=6144, gated_ffn=False, tied_embeddings=False, logit_scale="none"),
    "switch-decoder-c": dict(
        n_encoder_layers=None, ff_dim=6144, attention_scale="none", positions="t5", tied_embeddings=False
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_row_makes_published_choices(name):
    config = make_config(name)
    assert {key: getattr(config, key) for key in CHOICES[name]} == CHOICES[name]


def test_pythia_rotates_a_quarter_of_each_head():
    for name in PRESETS:
        config = make_config(name)
        if name.startswith(("pythia", "gpt-neox")):
            assert 4 * config.rope_dim == config.head_dim, name


def test_describing_175_billion_parameters_allocates_nothing():
    infos = [info for arrays in describe_params(make_config("gpt3-175b")).values() for info in arrays.values()]
    assert max(info.shape for info in infos)[0] == 50257
    assert all(isinstance(size, int) for info in infos for size in info.shape)


@pytest.mark.parametrize(("name", "n_labels"), WITH_POOLER)
def test_encoders_with_a_pooler_and_a_classifier_have_the_published_size(name, n_labels):
    table = PRESETS[name] | {"preset": name, "head": "none", "pooler": True, "n_labels": n_labels}
    config = parse_model(table, where=name)
    assert count_params(config) == WITH_POOLER[name, n_labels]
