# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Older decoders and kin of T5 equal transformers in both directions; other functions are refused by key."""

import dataclasses
import json

import numpy as np
import pytest
from transformers_parity import N_VOCAB, check_encoder_decoder, check_family, import_model, run, save_random_model

from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.huggingface.reader import open_huggingface, read_config, read_model
from mesh_transformer.convert.library_logits import run_library
from mesh_transformer.convert.logit_check import run_native
from mesh_transformer.storage.errors import CheckpointError

SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6)
FALCON = SMALL | dict(max_position_embeddings=64)
GROUPED = FALCON | dict(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=80)
BIGCODE = dict(n_embd=48, n_layer=2, n_head=6, n_positions=64)
MPT = dict(d_model=48, n_heads=6, n_layers=2, max_seq_len=64)
# model type, keys of config.json, and choices whose absence changes the function
CASES = {
    "falcon-7b": ("falcon", FALCON, dict(residual="parallel-two-norms")),
    "falcon-7b-bias-untied": ("falcon", FALCON | dict(bias=True, tie_word_embeddings=False), {}),
    "falcon-40b": ("falcon", GROUPED, dict(residual="parallel")),
    "falcon-11b": (
        "falcon",
        GROUPED
        | dict(num_ln_in_parallel_attn=1, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}),
        dict(rope_scaling=None),
    ),
    "falcon-rw": (
        "falcon",
        FALCON | dict(alibi=True, multi_query=False, parallel_attn=False, bias=True),
        dict(positions="alibi"),
    ),
    "opt": (
        "opt",
        SMALL | dict(ffn_dim=80, max_position_embeddings=64, word_embed_proj_dim=48),
        dict(position_offset=0, seq_len=66),
    ),
    "opt-350m": (
        "opt",
        SMALL | dict(ffn_dim=80, max_position_embeddings=64, word_embed_proj_dim=24, do_layer_norm_before=False),
        dict(position_offset=0, seq_len=66),
    ),
    "opt-projected-untied": (
        "opt",
        SMALL | dict(ffn_dim=80, max_position_embeddings=64, word_embed_proj_dim=24, tie_word_embeddings=False),
        {},
    ),
    "opt-without-biases": (
        "opt",
        SMALL | dict(ffn_dim=80, max_position_embeddings=64, enable_bias=False, activation_function="gelu"),
        {},
    ),
    "bloom": ("bloom", dict(hidden_size=48, n_layer=2, n_head=6), dict(embedding_norm=False)),
    "bloom-untied": ("bloom", dict(hidden_size=48, n_layer=2, n_head=4, tie_word_embeddings=False), {}),
    "mpt": ("mpt", MPT, dict(positions="none")),
    "mpt-clipped": (
        "mpt",
        MPT | dict(attn_config=dict(clip_qkv=0.6, softmax_scale=0.2)),
        dict(clip_qkv=None),
    ),
    "starcoder": ("gpt_bigcode", BIGCODE, dict(attention_scale="none")),
    "starcoder-unscaled": ("gpt_bigcode", BIGCODE | dict(scale_attn_weights=False, n_inner=80), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers_in_both_directions(name, tmp_path):
    kind, keys, varied = CASES[name]
    imported = check_family(kind, tmp_path, keys)
    if varied:
        other = imported._replace(config=dataclasses.replace(imported.config, **varied))
        params = {module: dict(arrays) for module, arrays in imported.params.items()}
        first = params["transformer/layers/block_0/norm_1"]
        params.setdefault("transformer/layers/block_0/norm_2", {key: 2 * value for key, value in first.items()})
        tokens = np.arange(40)[None] % N_VOCAB
        assert np.abs(run(imported, tokens) - run(other._replace(params=params), tokens)).max() > 1e-2


@pytest.mark.slow
def test_multi_head_bigcode_is_read(tmp_path):
    """Its function is that of GPT-2, as which it is exported."""
    import torch

    model = save_random_model("gpt_bigcode", tmp_path / "source", BIGCODE | dict(multi_query=False))
    tokens = np.arange(40)[None] % N_VOCAB
    wanted = model(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(run(import_model(tmp_path / "source", tmp_path / "native"), tokens), wanted, atol=5e-5)


@pytest.mark.slow
def test_transformers_computes_the_alibi_of_falcon_for_a_verification(tmp_path):
    """Its attention that computes every score adds the bias twice."""
    kind, keys, _ = CASES["falcon-rw"]
    save_random_model(kind, tmp_path, keys)
    plan = open_huggingface(tmp_path)
    tokens = np.arange(40, dtype=np.int32)[None] % N_VOCAB
    wanted = run_library(tmp_path, FAMILIES[kind].architecture, tokens, None)
    np.testing.assert_allclose(run_native(plan.config, plan.values, tokens), wanted, atol=5e-5)


T5 = dict(d_model=48, d_kv=7, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=4)
ENCODER_DECODERS = {
    "t5": ("t5", T5, False, dict(tied_embeddings=True, logit_scale="rsqrt_d_model")),
    "t5-buckets": ("t5", T5 | dict(relative_attention_num_buckets=8, relative_attention_max_distance=40), False, {}),
    "t5-v1.1": (
        "t5",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        True,
        dict(tied_embeddings=False, logit_scale="none"),
    ),
    # of transformers 5, which ties the head of every new T5 and mT5
    "t5-v1.1-tied": (
        "t5",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        False,
        dict(tied_embeddings=True, logit_scale="none"),
    ),
    "ul2": ("t5", T5 | dict(feed_forward_proj="gated-silu", tie_word_embeddings=False), True, dict(activation="silu")),
    "mt5": ("mt5", T5, True, dict(gated_ffn=True, tied_embeddings=False, logit_scale="none")),
    "mt5-tied": ("mt5", T5, False, dict(gated_ffn=True, tied_embeddings=True, logit_scale="none")),
    "umt5": (
        "umt5",
        T5 | dict(tie_word_embeddings=False),
        True,
        dict(gated_ffn=True, tied_embeddings=False, logit_scale="none", t5_shared_bias=False),
    ),
    "umt5-tied": ("umt5", T5, False, dict(logit_scale="rsqrt_d_model", t5_shared_bias=False)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_equals_transformers_in_both_directions(name, tmp_path):
    kind, keys, own_head, expected = ENCODER_DECODERS[name]
    config = check_encoder_decoder(kind, tmp_path, keys, own_head=own_head).config
    assert {key: getattr(config, key) for key in expected} == expected


REFUSED = [
    ("opt", "layer_norm_elementwise_affine", False, "layer_norm_elementwise_affine = false is not supported"),
    ("bloom", "apply_residual_connection_post_layernorm", True, "apply_residual_connection_post_layernorm = true"),
    ("mpt", "logit_scale", "inv_sqrt_d_model", 'logit_scale = "inv_sqrt_d_model" is not supported'),
    ("mpt", "attn_config", {"qk_ln": True}, "attn_config.qk_ln = true is not supported; supported: false"),
    ("mpt", "attn_config", {"alibi_bias_max": 16}, "attn_config.alibi_bias_max = 16 is not supported; supported: 8"),
    ("falcon", "num_ln_in_parallel_attn", 2, "num_ln_in_parallel_attn = 2 with new_decoder_architecture = false"),
    ("gpt_bigcode", "add_cross_attention", True, "add_cross_attention = true is not supported"),
]


@pytest.mark.parametrize(("kind", "key", "value", "message"), REFUSED)
def test_other_functions_are_refused(kind, key, value, message, tmp_path):
    sizes = {"bloom": dict(hidden_size=48, n_layer=2, n_head=6), "mpt": MPT, "gpt_bigcode": BIGCODE}.get(kind, FALCON)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes, key: value}))
    with pytest.raises(CheckpointError, match=message):
        read_model(*read_config(tmp_path))
