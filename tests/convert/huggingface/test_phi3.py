# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Phi 3, 3.5 and 4 equal transformers, in both directions, on both sides of the trained length."""

import numpy as np
import pytest
from transformers_parity import check_family

from mesh_transformer.convert.huggingface.reader import find_family

SIZES = dict(
    hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope", short_factor=[1.0, 1.1, 1.3], long_factor=[1.5, 3.0, 8.0], rope_theta=1000.0,
    partial_rotary_factor=0.75,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 7])
def test_phi3_equals_transformers(tmp_path, window):
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5}
    config = check_family("phi3", tmp_path, dict(SIZES, sliding_window=window, rope_parameters=rope)).config
    assert config.attention_pattern == ("global" if window is None else "local",)
    assert config.rope_dim == 4


@pytest.mark.slow
def test_full_rotation_is_the_function_of_llama(tmp_path):
    """It comes back as phi3, with fused tensors; weights of no family are exported as llama."""
    config = check_family("phi3", tmp_path, SIZES).config
    assert find_family(config)[0] == "llama"
    assert find_family(config, "phi3")[0] == "phi3"


@pytest.mark.slow
@pytest.mark.parametrize("trained", [8, 16, 32])
def test_longrope_equals_transformers(tmp_path, trained):
    """Sequences of 30 tokens, and a prompt of 9 with a continuation to 25: longer than, across, or within the trained length."""
    fields = dict(SIZES, original_max_position_embeddings=trained, rope_parameters=LONGROPE, tie_word_embeddings=True)
    config = check_family("phi3", tmp_path, fields).config
    assert config.rope_dim == 6
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx(np.sqrt(1 + np.log(64 / trained) / np.log(trained)))
