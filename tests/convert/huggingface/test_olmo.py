# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""OLMo and OLMo 2 equal transformers, in both directions."""

import pytest
from transformers_parity import check_family

SIZES = dict(
    hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, 0.7])
def test_olmo_equals_transformers(tmp_path, clip):
    config = check_family("olmo", tmp_path, dict(SIZES, clip_qkv=clip)).config
    assert (config.norm, config.clip_qkv) == ("nonparametric-layernorm", clip)


@pytest.mark.slow
def test_olmo2_equals_transformers(tmp_path):
    config = check_family("olmo2", tmp_path, SIZES).config
    assert (config.residual, config.qk_norm) == ("reordered-norm", "rmsnorm-all-heads")
