# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Metadata of llama.cpp's architectures as config.json and back; what is not understood is refused by name."""

import numpy as np
import pytest

from mesh_transformer.convert.gguf.architectures import (
    ARCHITECTURES,
    TOKEN_EMBEDDING,
    make_family,
    read_config,
    write_config,
)
from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.lazy_arrays import InMemory
from mesh_transformer.storage.errors import CheckpointError

TENSORS = {TOKEN_EMBEDDING: InMemory(np.zeros((100, 64), np.float32))}
# Weights without a tensor in llama.cpp: a head beside the embedding, the heads of BERT, dense layers among layers with experts,
# the bias of a gate, which Phi 3 does not have, and the second norm of Falcon, which only some of its models have.
ABSENT = {
    "gemma": {"w_head"},
    "gemma2": {"w_head"},
    "command-r": {"w_head", "norm_2"},
    "bert": {"masked_lm_head", "b_head", "pooler"},
    "qwen3moe": {"feed_forward"},
    "phi3": {"feed_forward"},
    "falcon": {"norm_2"},
}
LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def test_absent_keys_have_the_defaults_of_llama_cpp():
    table = read_config(LLAMA, TENSORS, "m.gguf")
    assert table["num_key_value_heads"] == 4
    assert table["head_dim"] == 16
    assert table["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}
    assert table["tie_word_embeddings"] is True
    assert table["vocab_size"] == 100


def test_written_metadata_is_read_back():
    for rope in ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}):
        scaled = rope | {"rope_theta": 1e6}
        if rope["rope_type"] == "yarn":
            scaled["original_max_position_embeddings"] = 128
        table = read_config(LLAMA, TENSORS, "m") | {"rope_parameters": scaled}
        assert read_config(write_config(table), TENSORS, "m")["rope_parameters"] == scaled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, r"general\.architecture = 'mamba' is not supported; supported: llama, "),
        ({"llama.logit_scale": 2.0}, r"m: metadata keys that are not supported and .*: llama\.logit_scale = 2\.0"),
        ({"llama.rope.dimension_count": 8}, r"llama\.rope\.dimension_count = 8 is not supported; supported: 16"),
        ({"llama.attention.value_length": 8}, "attention.value_length = 8 is not supported; supported: 16"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type = 'longrope' is not supported"),
        (
            {"llama.attention.head_count_kv": [4, 2]},
            r"head_count_kv = \[4, 2\] is not supported; supported: one number",
        ),
        ({"llama.vocab_size": 90}, "vocab_size = 90 is not supported; supported: 100"),
    ],
)
def test_what_is_not_understood_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        read_config(LLAMA | changes, TENSORS, "m")


def test_every_weight_of_every_family_has_a_tensor():
    for name, architecture in ARCHITECTURES.items():
        for kind in architecture.families:
            mappings = make_family(kind, name).mappings
            missing = FAMILIES[kind].mappings.keys() - mappings.keys()
            assert {weight.partition("/")[0] for weight in missing} == ABSENT.get(name, set())
            assert len({(mapping.name, mapping.component) for mapping in mappings.values()}) == len(mappings)


def test_fused_projections_are_not_interleaved():
    assert make_family("gpt_neox", "gptneox").mappings["attention/w_k"].pattern == "(3 kv_heads head_dim) embed"
    assert make_family("gpt2", "gpt2").mappings["attention/w_k"].pattern == "(3 kv_heads head_dim) embed"
    assert make_family("gpt2", "gpt2").mappings["feed_forward/w_in"].pattern == "ff embed"
    assert make_family("mixtral", "llama").mappings["experts/w_in"].pattern == "expert ff embed"
