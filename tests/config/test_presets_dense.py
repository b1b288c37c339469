# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every row of the dense presets makes a model of exactly the published size."""

import pytest

from mesh_transformer.config import ModelConfig, parse_config, parse_model
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.config.presets_dense import DENSE_PRESETS
from mesh_transformer.model.shapes import count_params
from mesh_transformer.plan.estimate import estimate_training

# Counts of the released files; an embedding matrix that is also the head is counted once. Of Gemma 3: the text model.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "phi3-mini": 3_821_079_552,
    "phi3-medium": 13_960_238_080,
    "phi3.5-mini": 3_821_079_552,
    "phi4-mini": 3_836_021_760,
    "phi4": 14_659_507_200,
    "olmo-1b": 1_176_764_416,
    "olmo-7b": 6_888_095_744,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "stablelm2-1.6b": 1_644_515_328,
    "stablelm2-12b": 12_143_185_920,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "starcoder2-15b": 15_957_889_024,
    "command-r": 34_980_831_232,
    "command-r-plus": 103_810_674_688,
}


def make_config(name: str) -> ModelConfig:
    return parse_model(PRESETS[name] | {"preset": name}, where=name)


def closed_formula(c: ModelConfig) -> int:
    """Embeddings and head; per layer attention, feed-forward layer, norms and biases; the final norm."""
    d, heads, kv_heads = c.d_model, c.n_heads * c.head_dim, c.kv_heads * c.head_dim
    attention = 2 * d * (heads + kv_heads) + c.qkv_bias * (heads + 2 * kv_heads) + c.attention_out_bias * d
    attention += {
        False: 0,
        True: 2 * c.head_dim,
        "gemma-rmsnorm": 2 * c.head_dim,
        "rmsnorm-all-heads": heads + kv_heads,
        "layernorm-per-head": heads + kv_heads,
    }[c.qk_norm]
    feed_forward = (3 if c.gated_ffn else 2) * d * c.ff_dim + c.ff_bias * (c.ff_dim + d)
    norm = {"nonparametric-layernorm": 0, "layernorm": d * (1 + c.norm_bias)}.get(c.norm, d)
    norms = {"sandwich": 4, "parallel": 1}.get(c.residual, 2) * norm
    return (1 if c.tied_embeddings else 2) * c.n_vocab * d + c.n_layers * (attention + feed_forward + norms) + norm


@pytest.mark.parametrize("name", DENSE_PRESETS)
def test_row_has_published_size(name):
    config = make_config(name)
    assert count_params(config) == closed_formula(config) == PUBLISHED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE_PRESETS)
def test_transformers_counts_the_same(name):
    """The class of transformers, made from the exported config.json, has as many parameters."""
    transformers = pytest.importorskip("transformers")
    import torch

    from mesh_transformer.convert.huggingface.families import FAMILIES
    from mesh_transformer.convert.huggingface.reader import find_family

    kind, table = find_family(make_config(name))
    architecture = getattr(transformers, FAMILIES[kind].architecture)
    with torch.device("meta"):
        model = architecture(architecture.config_class(**{k: v for k, v in table.items() if k != "architectures"}))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


# Properties besides sizes that distinguish the families.
CHOICES = {
    "llama3.2-1b": dict(tied_embeddings=True, rope_theta=500_000.0, seq_len=131_072),
    "mistral-7b-v0.1": dict(attention_window=4096, attention_pattern=("local",)),
    "mistral-nemo-12b": dict(head_dim=128, rope_theta=1e6, seq_len=131_072),
    "qwen2.5-7b": dict(qkv_bias=True, attention_out_bias=False),
    "qwen3-8b": dict(qk_norm=True, head_dim=128, qkv_bias=False),
    "gemma-7b": dict(norm="gemma-rmsnorm", residual="serial", head_dim=256),
    "gemma3-1b": dict(
        qk_norm="gemma-rmsnorm", rope_local_theta=1e4, rope_theta=1e6, attention_window=512, rope_scaling=None
    ),
    "phi3.5-mini": dict(rope_dim=96, kv_heads=32, tied_embeddings=False, seq_len=131_072),
    "phi4-mini": dict(rope_dim=96, head_dim=128, kv_heads=8, tied_embeddings=True, n_vocab=200_064),
    "phi4": dict(attention_pattern=("global",), rope_theta=250_000.0),
    "olmo-7b": dict(norm="nonparametric-layernorm"),
    "olmo2-7b": dict(residual="reordered-norm", qk_norm="rmsnorm-all-heads"),
    "stablelm2-1.6b": dict(rope_dim=16, head_dim=64, qkv_bias=True, residual="serial"),
    "stablelm2-12b": dict(rope_dim=40, head_dim=160, qk_norm="layernorm-per-head", residual="parallel"),
    "smollm3-3b": dict(rope_pattern=(True, True, True, False)),
    "starcoder2-7b": dict(norm="layernorm", attention_window=4096, ff_bias=True, gated_ffn=False),
    "command-r-plus": dict(positions="rope-interleaved", norm_bias=False, qk_norm="layernorm-per-head"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_row_makes_published_choices(name):
    config = make_config(name)
    assert {key: getattr(config, key) for key in CHOICES[name]} == CHOICES[name]


@pytest.mark.parametrize("name", CHOICES)
def test_row_can_be_planned(name):
    """Training costs 6 FLOPs per token and parameter, attention besides; memory and traffic are estimated as well."""
    model = {"preset": name, "seq_len": 2048}
    tables = {"data": {"train": {"text": {"path": "x"}}}, "train": {"steps": 1, "batch_size": 64}}
    stats = estimate_training(parse_config({"model": model, "mesh": {"fsdp": 8}} | tables, where=name), "v5p-16")
    tied = make_config(name).tied_embeddings
    in_matmuls = PUBLISHED[name] - (0 if tied else make_config(name).n_vocab * make_config(name).d_model)
    assert 1.0 < stats.flops / (6 * in_matmuls * 64 * 2048) < 1.4
    assert make_config(name).effective_fields()["n_layers"] == make_config(name).n_layers
