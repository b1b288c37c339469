# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""config.json is read with the defaults, aliases and types of its class in transformers."""

import dataclasses
import json

import pytest

from mesh_transformer.convert.huggingface.config_map import read_gpt2, read_gpt_j, read_llama, read_rope
from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.huggingface.hf_config import DEFAULTS, HFConfig, recorded_classes
from mesh_transformer.convert.huggingface.reader import read_model
from mesh_transformer.storage.errors import CheckpointError


def make(kind: str, **table) -> HFConfig:
    return HFConfig({"model_type": kind} | table, "config.json")


def test_absent_keys_have_the_defaults_of_the_class():
    assert read_gpt_j(make("gptj"))["rope_dims"] == 64
    assert read_gpt_j(make("gptj", rotary_dim=32))["rope_dims"] == 32
    qwen3 = read_llama(make("qwen3", hidden_size=64, num_attention_heads=4))
    assert (qwen3["d_head"], qwen3["n_kv_heads"]) == (128, 32)
    for kind, expected in (("mistral", 8), ("mixtral", 8), ("qwen2", 32), ("llama", 4)):
        assert read_llama(make(kind, num_attention_heads=4))["n_kv_heads"] == expected, kind
        assert read_llama(make(kind, num_attention_heads=4, num_key_value_heads=None if kind == "qwen2" else 2))
    assert read_llama(make("qwen2", num_attention_heads=4, num_key_value_heads=None))["n_kv_heads"] == 4
    t5 = FAMILIES["t5"].read_config(make("t5", feed_forward_proj="gated-gelu", dense_act_fn="silu", num_layers=5))
    assert (t5["activation"], t5["gated_ffn"]) == ("silu", True)
    assert (t5["n_encoder_layers"], t5["n_layers"]) == (5, 5)


def test_a_key_that_the_class_lacks_is_ignored():
    for kind in ("qwen2", "mistral"):
        model = read_model(make(kind, attention_bias=True, mlp_bias=True), FAMILIES[kind])
        assert not model["attention_out_bias"]
        assert not model["ff_bias"]
    assert read_llama(make("llama", attention_bias=True, mlp_bias=True))["ff_bias"]


def test_an_alias_beside_its_field_wins():
    assert read_gpt2(make("gpt2", n_embd=8, n_head=2))["d_model"] == 8
    assert read_gpt2(make("gpt2", hidden_size=16, n_embd=8, n_head=2))["d_model"] == 16


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
def test_rope_scaling_beside_rope_parameters_wins(kind):
    scaling = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    new = {"rope_type": "default", "rope_theta": 5e5}
    rope = make("llama", rope_parameters=new, rope_scaling=scaling, rope_theta=3e4).rope_parameters()
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == (kind, 4.0, 3e4)
    if kind == "llama3":
        assert rope["original_max_position_embeddings"] == 2048, "the length of the model"
    assert make("llama", rope_parameters=new).rope_parameters() == new


def test_rope_parameters_of_gpt_neox_have_their_own_keys():
    rope, fields = read_rope(make("gpt_neox", rotary_pct=0.5, rotary_emb_base=2e4, rope_theta=3e4))
    assert (rope["partial_rotary_factor"], fields["rope_theta"]) == (0.5, 2e4)
    assert make("gpt_neox").rope_parameters()["partial_rotary_factor"] == 0.25
    assert make("mixtral").rope_parameters()["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "llama",
            dict(hidden_size="32"),
            'config.json: hidden_size = "32" has the type str, but must have the type int',
        ),
        ("llama", dict(tie_word_embeddings=1), "tie_word_embeddings = 1 has the type int, but must have the type bool"),
        ("gpt2", dict(n_layer=2.0), "n_layer = 2.0 has the type float, but must have the type int"),
        ("gpt2", dict(add_cross_attention=True), "add_cross_attention = true is not supported"),
        ("llama", dict(per_layer_config={"0": {"sliding_window": 4}}), "per_layer_config = .* is not supported"),
        ("llama", dict(is_encoder_decoder=True), "is_encoder_decoder = true is not supported; supported: false"),
        ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention = true is not supported"),
        ("llama", dict(rope_theta="big"), 'rope_theta = "big" of the rotary embeddings is not a number'),
        (
            "llama",
            dict(partial_rotary_factor=0.5),
            r"partial_rotary_factor = 0.5 \(.*\) is not supported; supported: 1",
        ),
        (
            "t5",
            dict(dense_act_fn="mish"),
            r'the activation "mish" of dense_act_fn or feed_forward_proj is not supported',
        ),
        ("llama", dict(head_dim=5), "head_dim, hidden_size, num_attention_heads give 5 rotated dimensions"),
        ("gemma2", dict(head_dim=1), "head_dim give 1 rotated dimensions"),
        (
            "gpt_bigcode",
            dict(num_key_value_heads=4),
            "num_key_value_heads = 4 contradicts multi_query = true and n_head = 12",
        ),
        # transformers would mask everything, with a window of 0 tokens
        (
            "qwen2_moe",
            dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]),
            "layer_types has sliding_attention, but sliding_window is not in use",
        ),
        ("gpt_neo", dict(attention_types=[5]), "config.json: not a valid configuration of gpt_neo: TypeError"),
    ],
)
def test_what_is_not_read_or_has_a_wrong_type_is_refused_by_name(kind, changes, message):
    read_model(make(kind), FAMILIES[kind])
    with pytest.raises(CheckpointError, match=message):
        read_model(make(kind, **changes), FAMILIES[kind])


def test_gemma3_ties_if_either_configuration_says_so():
    """`scripts/stress/differential.py` compares both with transformers."""
    for whole, part, expected in ((True, False, True), (False, True, True), (False, False, False)):
        config = make("gemma3", tie_word_embeddings=whole, text_config={"tie_word_embeddings": part})
        assert read_model(config, FAMILIES["gemma3"])["tied_embeddings"] == expected


def test_keys_without_effect_are_accepted():
    changes = dict(use_cache=False, attention_dropout=0.5, eos_token_id=7, initializer_range=0.5, unknown_key=3)
    assert read_model(make("llama", **changes), FAMILIES["llama"]) == read_model(make("llama"), FAMILIES["llama"])


@pytest.mark.slow
def test_recorded_classes_equal_those_of_transformers(load_script):
    """Where this fails with a newer transformers, run scripts/record_config_defaults.py and read the differences."""
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers")
    program = load_script("record_config_defaults")
    recorded = json.loads(DEFAULTS.read_bytes())
    assert FAMILIES.keys() - {"gemma3"} <= recorded_classes().keys() == set(program.MODEL_TYPES)
    if recorded["transformers"] == transformers.__version__:
        assert json.loads(json.dumps(program.make_table())) == recorded
    for kind in FAMILIES.keys() & recorded_classes().keys():
        fields = {field.name for field in dataclasses.fields(transformers.CONFIG_MAPPING[kind])}
        assert recorded_classes()[kind]["fields"].keys() <= fields | {"is_encoder_decoder"}
