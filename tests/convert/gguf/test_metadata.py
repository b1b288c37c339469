# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Scaled rotary embeddings in the metadata and tensors of GGUF files, as transformers computes them."""

import math

import numpy as np
import pytest

from mesh_transformer.convert.gguf.architectures import TOKEN_EMBEDDING, read_config
from mesh_transformer.convert.gguf.metadata import ROPE_FACTORS, constant_tensors, llama3_factors
from mesh_transformer.convert.lazy_arrays import InMemory
from mesh_transformer.storage.errors import CheckpointError

TENSORS = {TOKEN_EMBEDDING: InMemory(np.zeros((100, 64), np.float32))}
SIZES = {
    "block_count": 2, "context_length": 512, "embedding_length": 64, "feed_forward_length": 128, "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
LLAMA = {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in SIZES.items()}
PHI3 = {"general.architecture": "phi3"} | {f"phi3.{key}": value for key, value in SIZES.items()}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500_000.0,
}  # fmt: skip


def test_factors_of_llama3():
    factors = llama3_factors(LLAMA3, 128)
    assert factors[0] == 1
    assert factors[-1] == 8
    assert 1 < factors[30] < 8
    metadata = LLAMA | {"llama.rope.freq_base": 500_000.0, "llama.attention.key_length": 128}
    tensors = TENSORS | {ROPE_FACTORS: InMemory(factors)}
    assert read_config(metadata, tensors, "m")["rope_parameters"] == LLAMA3
    with pytest.raises(CheckpointError, match=r"are not the factors of Llama 3\.1"):
        read_config(metadata, TENSORS | {ROPE_FACTORS: InMemory(factors[::-1].copy())}, "m")


def test_factors_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=LLAMA3, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500_000.0 ** (-torch.arange(0, 128, 2).float() / 128)
    np.testing.assert_allclose((plain / scaled).numpy(), llama3_factors(LLAMA3, 128), rtol=2e-6)


def test_factors_of_phi3():
    rope = {"rope_type": "longrope", "short_factor": [1.0, 1.08], "long_factor": [1.25, 3.7]}
    tensors = TENSORS | {
        name: InMemory(values) for name, values in constant_tensors({"rope_parameters": rope}, 4).items()
    }
    assert len(tensors) == 3
    metadata = PHI3 | {"phi3.rope.scaling.original_context_length": 128, "phi3.rope.dimension_count": 4}
    default = math.sqrt(1 + math.log(4) / math.log(128))
    found = read_config(metadata | {"phi3.rope.scaling.attn_factor": float(np.float32(default))}, tensors, "m")
    expected = rope | {"original_max_position_embeddings": 128, "partial_rotary_factor": 0.25, "rope_theta": 10_000.0}
    assert found["rope_parameters"] == expected
    found = read_config(metadata | {"phi3.rope.scaling.attn_factor": 1.5}, tensors, "m")
    assert found["rope_parameters"] == expected | {"attention_factor": 1.5}
    assert read_config(metadata, TENSORS, "m")["rope_parameters"]["rope_type"] == "default"
