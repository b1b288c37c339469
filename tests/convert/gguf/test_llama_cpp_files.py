# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Models of transformers as GGUF files: imported, exported, and read by transformers, with equal logits.

`write_file` changes and names tensors as llama.cpp's convert_hf_to_gguf.py does, with the tables of the package gguf.
"""

import json
import math

import numpy as np
import pytest
from gguf import MODEL_ARCH, GGUFReader, GGUFWriter, PoolingType, RopeScalingType, get_tensor_name_map
from safetensors.numpy import load_file

from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.convert.logit_check import run_native
from mesh_transformer.convert.readers import open_checkpoint
from mesh_transformer.storage.errors import CheckpointError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, output_router_logits=False)
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.08], "long_factor": [1.25, 3.7],
}  # fmt: skip
GEMMA3 = dict(head_dim=16, num_hidden_layers=7, sliding_window=8, query_pre_attn_scalar=16)
GPT_OSS = dict(
    num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 150_000.0,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    },
)  # fmt: skip
# name: (class of the configuration, its arguments besides SIZES, architecture of llama.cpp)
CASES = {
    "gemma": ("GemmaConfig", dict(head_dim=16), "GEMMA"),
    "gemma3": ("Gemma3TextConfig", GEMMA3, "GEMMA3"),
    "gemma3-linear": (
        "Gemma3TextConfig",
        GEMMA3
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "final_logit_softcapping": 20.0,
        },
        "GEMMA3",
    ),
    "phi3": ("Phi3Config", dict(sliding_window=12, original_max_position_embeddings=64), "PHI3"),
    "phi3-longrope": ("Phi3Config", dict(rope_parameters=LONGROPE, original_max_position_embeddings=16), "PHI3"),
    "starcoder2": ("Starcoder2Config", dict(sliding_window=None, rope_theta=50_000.0), "STARCODER2"),
    "qwen2-moe": ("Qwen2MoeConfig", MOE | dict(shared_expert_intermediate_size=40, norm_topk_prob=False), "QWEN2MOE"),
    "qwen3-moe": ("Qwen3MoeConfig", MOE | dict(head_dim=16, norm_topk_prob=True), "QWEN3MOE"),
    "gpt-oss": ("GptOssConfig", GPT_OSS, "GPT_OSS"),
    "stablelm": ("StableLmConfig", dict(use_qkv_bias=True, partial_rotary_factor=0.25), "STABLELM"),
    "stablelm-12b": ("StableLmConfig", dict(use_parallel_residual=True, qk_layernorm=True), "STABLELM"),
    "olmo": ("OlmoConfig", dict(clip_qkv=0.5), "OLMO"),
    "olmo2": ("Olmo2Config", {}, "OLMO2"),
    "command-r": ("CohereConfig", dict(logit_scale=0.25), "COMMAND_R"),
    "command-r-plus": ("CohereConfig", dict(use_qk_norm=True), "COMMAND_R"),
}
NORM_OFFSET = ("GEMMA", "GEMMA3")
# of them, what transformers' own reader of GGUF files supports
READ_BY_TRANSFORMERS = ("gemma3", "phi3", "starcoder2", "qwen2-moe", "qwen3-moe", "stablelm")


def make_model(folder, name):
    """Save a random model of a case, and return it."""
    kind, changes, _ = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    return model


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()


def write_file(folder, path, architecture):
    """Write a model folder as convert_hf_to_gguf.py does, without a tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    arch = MODEL_ARCH[architecture]
    writer = GGUFWriter(path, arch.name.lower().replace("_", "-"))
    WRITERS[architecture](writer, config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    if "num_key_value_heads" in config:
        writer.add_head_count_kv(config["num_key_value_heads"])
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    tensors = load_file(folder / "model.safetensors")
    if config.get("tie_word_embeddings", architecture in NORM_OFFSET or architecture == "COMMAND_R"):
        tensors.pop("lm_head.weight", None)
    for name, values in list_changed(tensors, config, architecture):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        writer.add_tensor(found, np.ascontiguousarray(values))
    if architecture == "PHI3":
        for name, values in longrope_of(writer, config).items():
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def list_changed(tensors, config, architecture):
    """Return names and values of tensors as the converter's modify_tensors changes them."""
    stacked: dict[str, dict[int, np.ndarray]] = {}
    changed = {}
    for name, values in tensors.items():
        words = name.split(".")
        if architecture == "GPT_OSS" and ("experts" in words or "sinks" in words):
            changed |= split_gpt_oss(name, values)
            continue
        if "experts" in words or "norms" in words:
            at = next(i for i, word in enumerate(words) if i > 2 and word.isdigit())
            left = [word for word in words[:at] if word != "norms"]
            stacked.setdefault(".".join([*left, *words[at + 1 :]]), {})[int(words[at])] = values
            continue
        if architecture in NORM_OFFSET and name.endswith("norm.weight"):
            values = values + 1
        if architecture == "OLMO" and "q_proj" in name:
            values = permute(values, config["num_attention_heads"])
        if architecture == "OLMO" and "k_proj" in name:
            values = permute(values, config["num_key_value_heads"])
        changed[name] = values.squeeze()
    changed |= {name: np.stack([found[i] for i in range(len(found))]) for name, found in stacked.items()}
    return changed.items()


def split_gpt_oss(name, values):
    """Return what GptOssModel.modify_tensors of the converter makes of one tensor."""
    if name.endswith("sinks"):
        return {f"{name}.weight": values}
    module = name.removesuffix("_bias")
    kind = "bias" if name.endswith("_bias") else "weight"
    if kind == "weight":
        values = values.swapaxes(1, 2)  # [E, out, in]
    if module.endswith("down_proj"):
        return {f"{module}.{kind}": values}
    base = module.removesuffix("gate_up_proj")
    return {f"{base}gate_proj.{kind}": values[:, ::2], f"{base}up_proj.{kind}": values[:, 1::2]}


def permute(weights, n_heads):
    """Return the rows in the order of LlamaModel.permute of the converter."""
    return (
        weights.reshape(n_heads, 2, weights.shape[0] // n_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def rope_of(config):
    return config.get("rope_parameters") or {"rope_theta": config["rope_theta"], "rope_type": "default"}


def write_rms(writer, config):
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "full_attention" not in rope_of(config):
        writer.add_rope_freq_base(rope_of(config)["rope_theta"])


def write_gemma(writer, config):
    write_rms(writer, config)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])


def write_gemma3(writer, config):
    write_gemma(writer, config)
    rope = config["rope_parameters"]["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_sliding_window(config["sliding_window"])
    if config["final_logit_softcapping"]:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def write_phi3(writer, config):
    write_rms(writer, config)
    share = rope_of(config).get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(share * config["hidden_size"]) // config["num_attention_heads"])
    writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    writer.add_sliding_window(config["sliding_window"] or 0)


def longrope_of(writer, config):
    """Return the tensors with the factors of LongRoPE, and write its scale."""
    rope = rope_of(config)
    if rope.get("rope_type") != "longrope":
        return {}
    scale = config["max_position_embeddings"] / config["original_max_position_embeddings"]
    writer.add_rope_scaling_attn_factors(
        math.sqrt(1 + math.log(scale) / math.log(config["original_max_position_embeddings"]))
    )
    return {f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")}


def write_starcoder2(writer, config):
    writer.add_rope_freq_base(rope_of(config)["rope_theta"])
    writer.add_layer_norm_eps(config["norm_epsilon"])


def write_qwen_moe(writer, config):
    write_rms(writer, config)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def write_gpt_oss(writer, config):
    write_rms(writer, config)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    rope = rope_of(config)
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def write_stablelm(writer, config):
    rotary = rope_of(config).get("partial_rotary_factor", 0.25)
    writer.add_rope_dimension_count(int(rotary * (config["hidden_size"] // config["num_attention_heads"])))
    writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])


def write_olmo(writer, config):
    writer.add_layer_norm_eps(1e-5)
    writer.add_clamp_kqv(config["clip_qkv"])
    writer.add_rope_freq_base(rope_of(config)["rope_theta"])


def write_cohere(writer, config):
    writer.add_rope_freq_base(rope_of(config)["rope_theta"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_logit_scale(config["logit_scale"])
    writer.add_rope_scaling_type(RopeScalingType.NONE)


def write_bert(writer, config):
    writer.add_causal_attention(False)
    writer.add_pooling_type(PoolingType.MEAN)
    writer.add_layer_norm_eps(config["layer_norm_eps"])


WRITERS = {
    "GEMMA": write_gemma, "GEMMA3": write_gemma3, "PHI3": write_phi3, "STARCODER2": write_starcoder2,
    "QWEN2MOE": write_qwen_moe, "QWEN3MOE": write_qwen_moe, "STABLELM": write_stablelm, "OLMO": write_olmo,
    "OLMO2": write_rms, "COMMAND_R": write_cohere,
    "BERT": write_bert, "GPT_OSS": write_gpt_oss,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_and_files_are_equal(name, tmp_path):
    model = make_model(tmp_path / "model", name)
    write_file(tmp_path / "model", tmp_path / "model.gguf", CASES[name][2])
    plan = open_checkpoint(tmp_path / "model.gguf").plan
    tokens = np.random.default_rng(0).integers(0, plan.config.n_vocab, (2, 24), dtype=np.int32)
    expected = logits_of(model, tokens)
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(run_native(plan.config, plan.values, tokens), expected, atol=5e-5, rtol=0)

    compare_export(tmp_path)


def compare_export(tmp_path):
    """Compare every tensor and key of an export with those of the converter's file."""
    convert(ConversionOptions(source=tmp_path / "model", destination=tmp_path / "out", format="gguf", verify="own"))
    theirs, ours = GGUFReader(tmp_path / "model.gguf"), GGUFReader(tmp_path / "out" / "out-F32.gguf")
    found = {tensor.name: tensor.data for tensor in ours.tensors}
    assert found.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        np.testing.assert_allclose(found[tensor.name], tensor.data, rtol=1e-6, err_msg=tensor.name)
    for key, field in theirs.fields.items():
        if not key.startswith(("GGUF.", "general.")) and not key.endswith(("rope.scaling.type", "pooling_type")):
            assert ours.fields[key].contents() == pytest.approx(field.contents()), key


def test_an_encoder_without_heads(tmp_path):
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if "key_value" not in key and not key.endswith("_id")}
    model = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(tmp_path / "model")
    write_file(tmp_path / "model", tmp_path / "model.gguf", "BERT")
    plan = open_checkpoint(tmp_path / "model.gguf").plan
    tokens = np.random.default_rng(0).integers(0, plan.config.n_vocab, (2, 24), dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).last_hidden_state.numpy()
    np.testing.assert_allclose(run_native(plan.config, plan.values, tokens), expected, atol=5e-5, rtol=0)
    compare_export(tmp_path)


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_export(name, tmp_path):
    model = make_model(tmp_path / "model", name)
    convert(ConversionOptions(source=tmp_path / "model", destination=tmp_path / "out", format="gguf", verify="own"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="out-F32.gguf", config=config, attn_implementation="eager"
    )
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 24), dtype=np.int32)
    expected = logits_of(model, tokens)
    np.testing.assert_allclose(logits_of(again.eval(), tokens), expected, atol=5e-5, rtol=0)


def test_windows_that_llama_cpp_has_not_are_refused(tmp_path):
    kind, changes, _ = CASES["starcoder2"]
    config = getattr(transformers, kind)(**SIZES | changes | dict(sliding_window=8))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"'starcoder2' does not compute the function .* attention_pattern"):
        convert(ConversionOptions(source=tmp_path / "model", destination=tmp_path / "out", format="gguf", verify="own"))
