# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""StableLM equals transformers, in both directions."""

import pytest
from transformers_parity import check_family

SIZES = dict(
    hidden_size=64, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stablelm2-1.6b", "stablelm2-12b"])
def test_stablelm_equals_transformers(tmp_path, form):
    large = form == "stablelm2-12b"
    fields = dict(use_qkv_bias=not large, qk_layernorm=large, use_parallel_residual=large)
    config = check_family("stablelm", tmp_path, SIZES | fields).config
    assert config.rope_dim == 4
    assert config.qk_norm == ("layernorm-per-head" if large else False)
    assert config.residual == ("parallel" if large else "serial")
