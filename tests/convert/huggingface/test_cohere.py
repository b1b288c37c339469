# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Command R and R+ equal transformers, in both directions."""

import pytest
from transformers_parity import check_family


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm", [False, True])
def test_cohere_equals_transformers(tmp_path, qk_norm):
    keys = dict(
        hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, logit_scale=0.3, use_qk_norm=qk_norm,
    )  # fmt: skip
    config = check_family("cohere", tmp_path, keys).config
    assert (config.positions, config.residual, config.logit_scale) == ("rope-interleaved", "parallel", 0.3)
    assert config.qk_norm == ("layernorm-per-head" if qk_norm else False)
