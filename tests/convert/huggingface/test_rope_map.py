# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Scaled rotary embeddings of every type equal transformers, in both directions and with the keys of both versions."""

import json

import numpy as np
import pytest
from transformers_parity import N_VOCAB, check_family, import_model, run, save_random_model

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.rope import RopeScalingConfig
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.reader import find_family
from mesh_transformer.convert.huggingface.rope_map import read_rope, write_rope
from mesh_transformer.storage.errors import CheckpointError

SIZES = dict(
    hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
TRAINED = dict(original_max_position_embeddings=16)
LONG = dict(short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[1.5, 3.0, 8.0, 9.0])
PARAMETERS = {
    "linear": dict(rope_type="linear", factor=4.0),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **TRAINED),
    "yarn": dict(rope_type="yarn", factor=4.0, beta_fast=8.0, **TRAINED),
    "yarn-mscale": dict(rope_type="yarn", factor=4.0, mscale=0.7, mscale_all_dim=0.3, truncate=False, **TRAINED),
    "longrope": dict(rope_type="longrope", factor=4.0, **LONG, **TRAINED),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "longrope"])
def test_scaled_model_equals_transformers(tmp_path, name):
    rope = PARAMETERS[name] | {"rope_theta": 300.0}
    config = check_family("llama", tmp_path, dict(SIZES, rope_parameters=rope)).config
    assert config.rope_scaling is not None
    assert config.rope_scaling.type == PARAMETERS[name]["rope_type"]


@pytest.mark.slow
def test_longrope_of_llama_equals_transformers(tmp_path):
    """Not its generation: there, a Llama keeps the keys of the shorter sequence, unlike Phi 3 (test_phi3.py)."""
    import torch

    rope = PARAMETERS["longrope"] | {"rope_theta": 300.0}
    model = save_random_model("llama", tmp_path / "source", dict(SIZES, rope_parameters=rope))
    imported = import_model(tmp_path / "source", tmp_path / "native")
    for length in (16, 17):
        tokens = np.arange(length)[None] % N_VOCAB
        wanted = model(torch.tensor(tokens)).logits.detach().numpy()
        np.testing.assert_allclose(run(imported, tokens), wanted, atol=5e-5)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_fields_come_back(name, key):
    """From config.json to [model] and back, with the key before and since transformers 5."""
    table = {"model_type": "llama", "max_position_embeddings": 64, "rope_theta": 300.0, key: dict(PARAMETERS[name])}
    _, fields = read_rope(HFConfig(table, "config.json"))
    scaling = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["rope_scaling"].items()}
    config = ModelConfig(
        n_layers=1, d_model=16, n_heads=2, n_vocab=9, seq_len=64, positions="rope-half", rope_theta=fields["rope_theta"],
        rope_scaling=RopeScalingConfig(**scaling),
    )  # fmt: skip
    written = json.loads(json.dumps({"model_type": "llama", "max_position_embeddings": 64} | write_rope(config)))
    assert read_rope(HFConfig(written, "again"))[1] == fields


def test_yarn_factor_may_follow_from_the_lengths():
    rope = dict(rope_type="yarn", factor=None, **TRAINED)
    table = {"model_type": "llama", "max_position_embeddings": 64, "rope_parameters": rope}
    _, fields = read_rope(HFConfig(table, "x"))
    assert fields["rope_scaling"]["factor"] == 4.0


def test_incomplete_or_unknown_parameters_are_refused():
    table = {"model_type": "llama", "max_position_embeddings": 64}
    with pytest.raises(CheckpointError, match='"longrope" need short_factor, long_factor'):
        read_rope(HFConfig(table | {"rope_parameters": dict(rope_type="longrope", factor=2.0)}, "x"))
    with pytest.raises(CheckpointError, match='type "proportional" are not supported; supported: "default", "linear"'):
        read_rope(HFConfig(table | {"rope_parameters": dict(rope_type="proportional")}, "x"))


def test_dynamic_scaling_for_longer_sequences_has_no_external_form():
    """transformers extends from max_position_embeddings, which is also the context length."""
    scaling = RopeScalingConfig(type="dynamic", factor=2.0, original_seq_len=32)
    llama = dict(norm="rmsnorm", positions="rope-half", activation="silu", gated_ffn=True, qkv_bias=False)
    config = ModelConfig(
        n_layers=1, d_model=16, n_heads=2, n_vocab=9, seq_len=64, attention_out_bias=False, ff_bias=False,
        rope_scaling=scaling, **llama,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="does not support: rope_scaling"):
        find_family(config)
