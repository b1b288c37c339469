# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""BLOOM, Falcon and MPT as GGUF files equal transformers; the files are changed as llama.cpp's conversion/*.py changes them."""

import json

import numpy as np
import pytest
from gguf import MODEL_ARCH, GGUFReader, GGUFWriter, get_tensor_name_map
from safetensors.numpy import load_file

from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.convert.gguf.architectures import TOKEN_EMBEDDING, read_config
from mesh_transformer.convert.lazy_arrays import InMemory
from mesh_transformer.convert.logit_check import run_native
from mesh_transformer.convert.readers import open_checkpoint
from mesh_transformer.storage.errors import CheckpointError

D, LAYERS, HEADS = 32, 2, 4
IDS = dict(vocab_size=96, bos_token_id=None, eos_token_id=None, pad_token_id=None)
FALCON = dict(IDS, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=64)
GROUPED = FALCON | dict(new_decoder_architecture=True, num_kv_heads=2)
MPT = dict(IDS, d_model=D, n_layers=LAYERS, n_heads=HEADS, max_seq_len=64)
# name: (class of the configuration, its arguments, architecture, key-value heads)
CASES = {
    "bloom": ("BloomConfig", dict(IDS, hidden_size=D, n_layer=LAYERS, n_head=HEADS), "BLOOM", HEADS),
    "mpt": ("MptConfig", MPT, "MPT", HEADS),
    "mpt-clipped": ("MptConfig", MPT | dict(attn_config=dict(clip_qkv=0.4)), "MPT", HEADS),
    "falcon-7b": ("FalconConfig", FALCON, "FALCON", 1),
    "falcon-11b": ("FalconConfig", GROUPED | dict(num_ln_in_parallel_attn=1), "FALCON", 2),
    "falcon-40b": ("FalconConfig", GROUPED, "FALCON", 2),
}


def make_model(folder, name):
    """Save a random model of a case, and return it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind, arguments, _, _ = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    return model


def join_by_kind(values, architecture, kv_heads):
    """Return the rows of a fused projection as all queries, all keys and all values."""
    if architecture == "MPT":
        return values
    groups = values.reshape(kv_heads, HEADS // kv_heads + 2, D // HEADS, *values.shape[1:])
    parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
    return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])


def write_file(folder, path, name):
    """Write a model folder as convert_hf_to_gguf.py does, without a tokenizer."""
    _, _, architecture, kv_heads = CASES[name]
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, architecture.lower())
    writer.add_context_length({"BLOOM": D, "MPT": 64, "FALCON": 2048}[architecture])
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(4 * D)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
    if architecture == "FALCON":
        writer.add_tensor_data_layout("jploski")
    if architecture == "MPT":
        writer.add_max_alibi_bias(8)
        if config["attn_config"]["clip_qkv"] is not None:
            writer.add_clamp_kqv(config["attn_config"]["clip_qkv"])
    else:
        writer.add_head_count_kv(kv_heads)
    names = get_tensor_name_map(MODEL_ARCH[architecture], LAYERS)
    for tensor, values in load_file(folder / "model.safetensors").items():
        tensor = tensor.removeprefix("transformer.") if architecture == "BLOOM" else tensor
        found = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        assert found is not None, tensor
        joined = join_by_kind(values, architecture, kv_heads) if "query_key_value" in tensor else values
        writer.add_tensor(found, np.ascontiguousarray(joined))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_and_files_are_equal(name, tmp_path):
    model = make_model(tmp_path / "model", name)
    import torch

    write_file(tmp_path / "model", tmp_path / "model.gguf", name)
    plan = open_checkpoint(tmp_path / "model.gguf").plan
    tokens = np.random.default_rng(0).integers(0, plan.config.n_vocab, (2, 24), dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(run_native(plan.config, plan.values, tokens), expected, atol=5e-5, rtol=0)

    convert(ConversionOptions(source=tmp_path / "model", destination=tmp_path / "out", format="gguf", verify="own"))
    theirs, ours = GGUFReader(tmp_path / "model.gguf"), GGUFReader(tmp_path / "out" / "out-F32.gguf")
    found = {tensor.name: tensor.data for tensor in ours.tensors}
    assert found.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(found[tensor.name], tensor.data, err_msg=tensor.name)
    for key, field in theirs.fields.items():
        # the converter does not read the context length of BLOOM and Falcon
        if not key.startswith(("GGUF.", "general.")) and not key.endswith("context_length"):
            assert ours.fields[key].contents() == pytest.approx(field.contents()), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bloom", "falcon-7b"])  # it does not read MPT, nor change the layout of other Falcons
def test_transformers_reads_the_export(name, tmp_path):
    model = make_model(tmp_path / "model", name)
    import torch
    import transformers

    convert(ConversionOptions(source=tmp_path / "model", destination=tmp_path / "out", format="gguf", verify="own"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="out-F32.gguf", config=config, attn_implementation="eager"
    )
    tokens = torch.tensor(np.random.default_rng(1).integers(0, 96, (2, 24)))
    with torch.no_grad():
        expected, found = (each.eval()(tokens, use_cache=False).logits.numpy() for each in (model, again))
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0)


@pytest.mark.slow
def test_what_llama_cpp_does_not_compute_is_not_written(tmp_path):
    """It has no ALiBi and no biases for Falcon."""
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(**FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="export the model with --format huggingface"):
        convert(ConversionOptions(source=tmp_path / "model", destination=tmp_path / "out", format="gguf", verify="own"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mpt", {}, r"mpt\.attention\.max_alibi_bias = 0\.0 is not supported; supported: 8\.0"),
        ("bloom", {"feed_forward_length": 7}, r"bloom\.feed_forward_length = 7 is not supported; supported: 128"),
        (
            "falcon",
            {"tensor_data_layout": "other"},
            r'tensor_data_layout = "other" is not supported; supported: "jploski"',
        ),
    ],
)
def test_other_functions_are_refused(name, changes, message):
    values = {"block_count": 2, "context_length": 64, "embedding_length": 32, "attention.head_count": 4} | changes
    metadata = {"general.architecture": name} | {f"{name}.{key}": value for key, value in values.items()}
    with pytest.raises(CheckpointError, match=message):
        read_config(metadata, {TOKEN_EMBEDDING: InMemory(np.zeros((96, 32), np.float32))}, "m.gguf")
