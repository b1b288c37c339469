# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Gemma 1 and Gemma 3 equal transformers, in both directions."""

import json

import numpy as np
import pytest
from transformers_parity import check_family

from mesh_transformer.convert.huggingface.reader import open_huggingface, read_config
from mesh_transformer.convert.logit_check import run_native
from mesh_transformer.storage.errors import CheckpointError

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    max_position_embeddings=64,
)  # fmt: skip
# Eight layers: not a multiple of the six after which the kinds of attention repeat.
GEMMA3 = dict(SIZES, num_hidden_layers=8, sliding_window=6, query_pre_attn_scalar=20)


@pytest.mark.slow
def test_gemma_equals_transformers(tmp_path):
    config = check_family("gemma", tmp_path, dict(SIZES, num_hidden_layers=2)).config
    assert (config.norm, config.activation, config.embedding_scale) == ("gemma-rmsnorm", "gelu-tanh", "sqrt_d_model")


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
def test_gemma3_equals_transformers(tmp_path, scaled):
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 4.0} if scaled else {"rope_type": "default"},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    fields = dict(GEMMA3, rope_parameters=rope, final_logit_softcapping=30.0 if scaled else None)
    config = check_family("gemma3_text", tmp_path, fields).config
    assert config.attention_pattern == ("local",) * 5 + ("global",)
    assert (config.rope_local_theta, config.rope_theta) == (100.0, 1e6)
    assert (config.rope_scaling is not None) == scaled


@pytest.mark.slow
def test_text_model_beside_a_vision_tower(tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    fields = dict(text_config=dict(GEMMA3, model_type="gemma3_text"), vision_config=vision, mm_tokens_per_image=4)
    fields["text_config"]["vocab_size"] = 61
    transformers.set_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**fields)).float().eval()
    model.save_pretrained(tmp_path / "external")
    plan = open_huggingface(tmp_path / "external")
    assert any("vision" in note for note in plan.notes)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 20), dtype=np.int32)
    logits = model(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.detach().numpy()
    found = run_native(plan.config, plan.values, tokens)
    np.testing.assert_allclose(found, logits, atol=2e-5 * np.abs(logits).max(), rtol=0)


def read(tmp_path, **table):
    (tmp_path / "config.json").write_text(json.dumps(table))
    config, family = read_config(tmp_path)
    return family.read_config(config)


def test_keys_of_the_first_gemma3_files(tmp_path):
    """Files of 2025 have rope_theta, rope_local_base_freq, rope_scaling and sliding_window_pattern."""
    table = dict(
        GEMMA3, model_type="gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    model = read(tmp_path, **table)
    assert model["attention_pattern"] == ["local", "local", "local", "global"]
    assert model["rope_scaling"] == {"type": "linear", "factor": 8.0}
    assert (model["rope_theta"], model["rope_local_theta"]) == (1e6, 1e4)


def test_what_is_not_supported_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="use_bidirectional_attention = true"):
        read(tmp_path, **GEMMA3, model_type="gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(CheckpointError, match="attn_logit_softcapping = 50"):  # transformers ignores it
        read(tmp_path, **GEMMA3, model_type="gemma3_text", attn_logit_softcapping=50.0)
    text = dict(GEMMA3, final_logit_softcapping=30.0)
    with pytest.raises(CheckpointError, match="final_logit_softcapping = 30"):  # transformers ignores it here
        read(tmp_path, model_type="gemma3", text_config=text)
    rope = {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    with pytest.raises(CheckpointError, match="sliding_attention layers are not supported"):
        read(tmp_path, **GEMMA3, model_type="gemma3_text", rope_parameters=rope)
