# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The container: everything that gguf writes is read, split files too; damaged files are errors that say where."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quantize

from mesh_transformer.convert.gguf.container import find_files, read_gguf
from mesh_transformer.convert.gguf.tensors import open_tensors
from mesh_transformer.convert.lazy_arrays import full_index
from mesh_transformer.storage.errors import CheckpointError

VALUES = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
MATRIX_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def write(path, **options):
    """Write a file with one tensor of each type and metadata of each kind."""
    writer = GGUFWriter(path, "llama", **options)
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_string("general.name", "two words")
    writer.add_array("tokenizer.ggml.tokens", ["a", "\u0120b", "\U0001f600"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.5])
    for name in MATRIX_TYPES:
        kind = GGMLQuantizationType[name]
        writer.add_tensor(name, quantize(VALUES, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_gguf_writes(tmp_path):
    path = write(tmp_path / "m.gguf")
    file = read_gguf(path)
    reader = GGUFReader(path)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == expected | {"llama.attention.layer_norm_rms_epsilon": 1e-5}
    assert {name: (info.offset, info.nbytes) for name, info in file.tensors.items()} == {
        tensor.name: (tensor.data_offset, tensor.n_bytes) for tensor in reader.tensors
    }


def test_slice_equals_slice_of_the_full_array(tmp_path):
    for name, array in open_tensors(read_gguf(write(tmp_path / "m.gguf")).tensors, "m").items():
        everything = array.read(full_index(array))
        assert 0 < np.abs(everything.astype(np.float32) - VALUES).max() < 0.5 or name == "F32"
        for index in ((slice(2, 5), slice(0, 64)), (slice(0, 6), slice(33, 40)), (slice(1, 2), slice(0, 32))):
            np.testing.assert_array_equal(array.read(index), everything[index], err_msg=name)


def test_split_files(tmp_path):
    write(tmp_path / "m.gguf", split_max_tensors=3)
    assert len(list(tmp_path.iterdir())) == 3
    assert [file.name for file in find_files(tmp_path)] == ["m-00001-of-00003.gguf"]
    for path in (tmp_path, tmp_path / "m-00002-of-00003.gguf"):
        file = read_gguf(path)
        assert set(file.tensors) == set(MATRIX_TYPES)
        assert file.metadata["llama.block_count"] == 3
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"one of 3 split files; missing: m-00003-of-00003\.gguf"):
        read_gguf(tmp_path)


def test_several_models_in_a_folder(tmp_path):
    write(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models \(a\.gguf, b\.gguf\); pass the path of one file"):
        read_gguf(tmp_path)


@pytest.mark.parametrize("keep", [3, 7, 23, 60, 200, 400, 900, 2000])
def test_truncated_file(keep, tmp_path):
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        read_gguf(path)


def test_damaged_files(tmp_path):
    path = write(tmp_path / "m.gguf")
    data = path.read_bytes()
    for changed, message in (
        (b"GGML" + data[4:], "not a GGUF file: it begins with b'GGML'"),
        (data[:4] + b"\1" + data[5:], "GGUF version 1 is not supported"),
        (data[:4] + b"\0\0\0\3" + data[8:], "little endian"),
        (data[:15] + b"\1" + data[16:], "damaged: .* entries"),
        (data.replace(b"Q4_1", b"Q4_0"), "Q4_0 occurs twice"),
    ):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=message):
            read_gguf(path)


def test_types_that_are_not_supported_are_named(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    kind = GGMLQuantizationType.IQ4_NL
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 18), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight is IQ4_NL; supported: F32, F16, BF16, Q8_0"):
        open_tensors(read_gguf(tmp_path / "m.gguf").tensors, "m")
