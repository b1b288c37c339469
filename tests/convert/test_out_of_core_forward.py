# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The out-of-core forward pass equals that of the model, for every architecture option."""

import dataclasses

import numpy as np
import pytest
from reference_models import CASES, LIVE_CASES

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.config.rope import RopeScalingConfig
from mesh_transformer.convert import out_of_core_forward
from mesh_transformer.convert.huggingface import reference
from mesh_transformer.convert.import_plan import describe_weights
from mesh_transformer.convert.lazy_arrays import InMemory
from mesh_transformer.convert.logit_check import run_native

SMALL = dict(n_layers=2, d_model=12, n_heads=4, n_vocab=19, seq_len=16)
ROPE = dict(positions="rope-half", d_head=8, n_kv_heads=2)
YARN = RopeScalingConfig(type="yarn", factor=4.0, original_seq_len=8)
MODELS = {
    "reordered": ModelConfig(
        **SMALL, **ROPE, norm="rmsnorm", residual="reordered-norm", qk_norm="rmsnorm-all-heads", rope_pattern=(True, False),
        clip_qkv=0.8, rope_scaling=YARN,
    ),
    "per-head": ModelConfig(
        **SMALL, **ROPE, norm="nonparametric-layernorm", residual="parallel", qk_norm="layernorm-per-head", logit_scale=0.3
    ),
    "gemma3": ModelConfig(
        **SMALL | dict(n_layers=3), **ROPE, norm="gemma-rmsnorm", residual="sandwich", qk_norm="gemma-rmsnorm",
        rope_local_theta=10.0, rope_scaling=YARN, attention_pattern=("local", "global"), attention_window=4,
    ),
    "gpt-neo": CASES["gpt-neo"].config,
    "llama-gqa": CASES["llama-gqa"].config,
    "qwen3": dataclasses.replace(LIVE_CASES["qwen3"].config, n_layers=3),
    "mixtral": CASES["mixtral"].config,
    "alternating-experts": ModelConfig(**SMALL, ff_bias=False, experts=ExpertsConfig(n_experts=3, layer_interval=2)),
    "neox": CASES["gpt-neox"].config,
    "t5-own-bias": ModelConfig(**SMALL, positions="t5", t5_shared_bias=False),
    "t5-parallel": ModelConfig(**SMALL, positions="t5", residual="parallel", norm="gptj-scalenorm", head_bias=True),
    "alibi": ModelConfig(**SMALL, positions="alibi", norm="scalenorm", activation="relu"),
    "falcon-alibi": ModelConfig(**SMALL, positions="falcon-alibi", embedding_norm=True, clip_qkv=0.7),
    "position-offset": ModelConfig(**SMALL, position_offset=3),
    "post-norm": ModelConfig(**SMALL, residual="post-norm", d_token_embedding=12),
    "rope-interleaved": ModelConfig(
        **SMALL, positions="rope-interleaved", d_head=8, rope_dims=4, gated_ffn=True, tied_embeddings=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_forward_pass(name, monkeypatch):
    monkeypatch.setattr(out_of_core_forward, "BLOCK_BYTES", 300)  # several blocks of every weight
    monkeypatch.setattr(reference, "BLOCK_BYTES", 300)
    config, rng = MODELS[name], np.random.default_rng(0)
    arrays = {}
    for array_name, specs in describe_weights(config).items():
        shape = specs[0].shape if specs[0].layer is None else (len(specs), *specs[0].shape)
        arrays[array_name] = InMemory(rng.normal(size=shape).astype(np.float32) / (2.0 if specs[0].shape else 1.0))
    tokens = rng.integers(0, config.n_vocab, (2, 15), dtype=np.int32)
    expected = run_native(config, arrays, tokens)
    found = run_native(config, arrays, tokens, max_memory=1)
    assert np.std(expected) > 0.1
    assert not np.array_equal(found, expected), "the same implementation ran twice"
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
