# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""GGUF files of every architecture: written, read back bit by bit, and read by transformers."""

import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from reference_models import make_model_folder

from mesh_transformer.config import ConfigError
from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.convert.gguf import writer
from mesh_transformer.convert.gguf.quantize import encode_rows
from mesh_transformer.convert.gguf.writer import fitting_type, list_blocks, plan_gguf
from mesh_transformer.convert.lazy_arrays import full_index
from mesh_transformer.convert.logit_check import run_native
from mesh_transformer.convert.readers import open_checkpoint
from mesh_transformer.storage.errors import CheckpointError

CASES = ("gpt2", "gpt-neox", "gpt-neox-serial", "llama-gqa", "mixtral", "gemma2")


def export(folder, destination, **options):
    """Convert a model folder to a GGUF file and return the report and the opened file."""
    report = convert(ConversionOptions(source=folder, destination=destination, format="gguf", **options))
    return report, open_checkpoint(destination)


def read_all(plan):
    return {name: array.read(full_index(array)) for name, array in plan.values.items()}


# what the architecture of llama.cpp implies, so that other values are refused
IMPLIED = {
    "gpt-neox": {"hidden_act": "gelu"},
    "gpt-neox-serial": {"hidden_act": "gelu"},
    "gemma2": {"query_pre_attn_scalar": 8},
}


def make_folder(path, name):
    """Write the model folder of a case, with a function that llama.cpp has."""
    make_model_folder(path, name)
    table = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(table | IMPLIED.get(name, {})))
    return path


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bit_exact(name, tmp_path):
    source = open_checkpoint(make_folder(tmp_path / "model", name)).plan
    report, written = export(tmp_path / "model", tmp_path / "out")
    assert written.plan.config.effective_fields() == source.config.effective_fields()
    assert report["max_logit_difference"] <= 1e-4
    expected, found = read_all(source), read_all(written.plan)
    assert expected.keys() == found.keys()
    for array, values in expected.items():
        if "norm" in array and name == "gemma2":  # the file stores 1 + scale, float32
            values = (values + np.float32(1)) - np.float32(1)
        np.testing.assert_array_equal(found[array], values, err_msg=array)


@pytest.mark.parametrize("name", ["gpt-neox", "gemma2"])
def test_other_functions_are_refused(name, tmp_path):
    make_model_folder(tmp_path / "model", name)
    with pytest.raises(CheckpointError, match=r'cannot represent (activation = "gelu-tanh"|attention_scale = 0.25)'):
        export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_types_of_tensors(tmp_path):
    make_model_folder(tmp_path / "model", "mixtral")
    export(tmp_path / "model", tmp_path / "out", gguf_type="F16")
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert file.name == "out-F16.gguf"
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert types["blk.0.attn_q.weight"] == types["blk.0.ffn_gate_exps.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == types["blk.0.ffn_gate_inp.weight"] == "F32"


def test_quantized_rows_that_do_not_fit_are_float16():
    q4_k, q8_0 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q8_0
    assert fitting_type(q4_k, "blk.0.attn_q.weight", 512) == q4_k
    assert fitting_type(q4_k, "token_embd.weight", 512) == q8_0
    assert fitting_type(q4_k, "blk.0.attn_q.weight", 576) == q8_0
    assert fitting_type(q4_k, "blk.0.attn_q.weight", 100) == GGMLQuantizationType.F16


def test_blocks_cover_a_tensor_in_order(tmp_path):
    make_model_folder(tmp_path / "model", "mixtral")
    model = plan_gguf(open_checkpoint(tmp_path / "model").plan, None)
    for tensor in model.tensors.values():
        blocks = list(list_blocks(tensor, 2000))
        assert sum(block.rows for block in blocks) == max(np.prod(tensor.shape[:-1], dtype=int), 1)
        assert [block.first for block in blocks] == list(np.cumsum([0, *(block.rows for block in blocks)])[:-1])
    assert len(list(list_blocks(model.tensors["blk.0.ffn_gate_exps.weight"], 2000))) > 4


def test_interrupted_write_continues(tmp_path, monkeypatch):
    make_model_folder(tmp_path / "model", "llama-gqa")
    encode, calls = writer.encode_block, []

    def fail_later(name, tensor, block):
        calls.append(name)
        if len(calls) == 5:
            raise OSError("no space")
        return encode(name, tensor, block)

    monkeypatch.setattr(writer, "encode_block", fail_later)
    with pytest.raises(OSError, match="no space"):
        export(tmp_path / "model", tmp_path / "out")
    monkeypatch.setattr(writer, "encode_block", encode)
    export(tmp_path / "model", tmp_path / "out")
    export(tmp_path / "model", tmp_path / "again" / "out")
    found, expected = (folder / "out" / "out-F32.gguf" for folder in (tmp_path, tmp_path / "again"))
    assert found.read_bytes() == expected.read_bytes()


def test_dtype_is_not_an_option(tmp_path):
    make_model_folder(tmp_path / "model", "llama-gqa")
    with pytest.raises(ConfigError, match="use --gguf-type"):
        export(tmp_path / "model", tmp_path / "out", dtype="float16")


def test_values_beyond_float16_are_refused():
    with pytest.raises(CheckpointError, match=r"w has values beyond the range of float16; .*BF16"):
        encode_rows(np.full((1, 32), 1e6, np.float32), GGMLQuantizationType.F16, "w")


@pytest.mark.slow
@pytest.mark.parametrize("name", [case for case in CASES if case not in ("mixtral", "gpt-neox", "gpt-neox-serial")])
def test_transformers_reads_the_file(name, tmp_path):
    """Of these architectures, transformers reads no GGUF of GPT-NeoX, and of Mixtral none with its own expert names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = open_checkpoint(make_folder(tmp_path / "model", name)).plan
    export(tmp_path / "model", tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="out-F32.gguf", config=config)
    tokens = np.random.default_rng(0).integers(0, source.config.n_vocab, (2, 16), dtype=np.int32)
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()
    assert np.std(logits) > 0.1
    np.testing.assert_allclose(run_native(source.config, source.values, tokens), logits, atol=5e-5, rtol=0)
