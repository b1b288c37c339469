# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""SmolLM 3 equals transformers, in both directions: some layers do not rotate queries and keys."""

import json

import pytest
from transformers_parity import check_family

from mesh_transformer.convert.huggingface.reader import read_config, read_model

SIZES = dict(
    hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, dict(no_rope_layers=[0, 1, 1, 0], use_sliding_window=True, sliding_window=6)])
def test_smollm3_equals_transformers(tmp_path, fields):
    config = check_family("smollm3", tmp_path, SIZES | fields).config
    if fields:
        assert config.rope_pattern == (False, True, True)  # and again from the start
        assert config.attention_pattern == ("local", "global", "global", "local")
    else:
        assert config.rope_pattern == (True, True, True, False)


def test_a_window_that_is_not_in_use_has_no_effect(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "smollm3", **SIZES, "sliding_window": 6}))
    assert "attention_window" not in read_model(*read_config(tmp_path))
