# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Import of GGUF files: found by name or folder, converted to the other formats, and refused where they do not match."""

import json
import shutil

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from reference_models import make_model_folder
from safetensors.numpy import load_file
from small_tokenizers import unigram_table

from mesh_transformer.convert import readers
from mesh_transformer.convert.conversion import ConversionOptions, convert, plan_conversion
from mesh_transformer.convert.readers import open_checkpoint
from mesh_transformer.convert.sources import find_source
from mesh_transformer.storage.errors import CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a GGUF file, and beside it the model folder from which it was made."""
    root = tmp_path_factory.mktemp("gguf")
    make_model_folder(root / "model", "llama-gqa")
    convert(ConversionOptions(source=root / "model", destination=root / "gguf", format="gguf"))
    return root


def test_found_by_file_and_by_folder(folder):
    (file,) = (folder / "gguf").glob("*.gguf")
    for path in (file, folder / "gguf"):
        opened = open_checkpoint(path)
        assert opened.kind == "gguf"
        assert opened.path == file


def test_the_header_alone_gives_the_model(folder, monkeypatch):
    expected = open_checkpoint(folder / "gguf").plan.model
    assert expected["n_kv_heads"] == 2
    assert readers.read_model_section(folder / "gguf") == expected
    assert find_source(folder / "gguf", config_only=True) == folder / "gguf"


def test_converted_to_hugging_face(folder, tmp_path):
    report = convert(ConversionOptions(source=folder / "gguf", destination=tmp_path / "out", format="huggingface"))
    assert report["kind"] == "gguf"
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder / "model"))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder / "model", tmp_path / "out"))
    assert after["rms_norm_eps"] == before["rms_norm_eps"]


def test_its_tokenizer_is_described(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(unigram_table()))
    convert(ConversionOptions(source=tmp_path / "model", destination=tmp_path / "gguf", format="gguf", verify="own"))
    found = [
        plan_conversion(ConversionOptions(source=tmp_path / name, destination=tmp_path / "out"))["notes"]
        for name in ("model", "gguf")
    ]
    assert any(note.startswith("tokenizer: ") for note in found[0])
    assert found[1] == found[0]


def test_a_model_folder_with_a_gguf_file_is_a_model_folder(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "both")
    shutil.copy(next((folder / "gguf").glob("*.gguf")), tmp_path / "both")
    assert open_checkpoint(tmp_path / "both").kind == "huggingface"


def test_missing_and_unknown_tensors_are_listed(folder, tmp_path):
    (file,) = (folder / "gguf").glob("*.gguf")
    reader = GGUFReader(file)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name != "blk.1.ffn_up.weight":
            writer.add_tensor(tensor.name.replace("blk.0.attn_k.", "blk.0.attn_z."), tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert "missing: blk.0.attn_k.weight" in str(caught.value)
    assert "missing: blk.1.ffn_up.weight" in str(caught.value)


def test_without_the_package(folder, monkeypatch):
    monkeypatch.setattr(readers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        CheckpointError, match=r"GGUF files need the package gguf: pip install 'mesh-transformer\[gguf\]'"
    ):
        open_checkpoint(folder / "gguf")
