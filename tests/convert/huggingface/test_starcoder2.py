# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""StarCoder 2 equals transformers, in both directions."""

import pytest
from transformers_parity import check_family


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 7])
def test_starcoder2_equals_transformers(tmp_path, window):
    keys = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, sliding_window=window, use_bias=window is None,
    )  # fmt: skip
    config = check_family("starcoder2", tmp_path, keys).config
    assert (config.norm, config.ff_bias, config.kv_heads) == ("layernorm", window is None, 2)
