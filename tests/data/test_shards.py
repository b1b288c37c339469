# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Token shards: the format byte for byte, and rejection of damaged files."""

import struct

import numpy as np
import pytest

from mesh_transformer.data.errors import DataError
from mesh_transformer.data.shards import ShardWriter, TokenShard, is_shard, token_dtype

DOCUMENTS = ([5, 6, 7], [1], [9, 9])


def write(prefix, documents=DOCUMENTS, dtype=np.uint16):
    with ShardWriter(prefix, np.dtype(dtype)) as shard:
        for document in documents:
            shard.add(np.asarray(document))
    return prefix


def test_bytes_are_those_of_the_format(tmp_path):
    prefix = write(tmp_path / "a")
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    index += struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "a.idx").read_bytes() == index
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<6H", 5, 6, 7, 1, 9, 9)
    shard = TokenShard(prefix)
    assert (shard.n_documents, shard.n_tokens) == (3, 6)
    assert [shard.document(i).tolist() for i in range(3)] == [list(document) for document in DOCUMENTS]
    assert shard.documents_at(np.arange(6)).tolist() == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_every_type_of_megatron_is_read_and_documents_may_be_several_sequences(tmp_path, code, dtype):
    tokens = np.array([1, 2, 3, 4, 5], dtype)
    (tmp_path / "b.bin").write_bytes(tokens.tobytes())
    size = tokens.dtype.itemsize
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 3)
    index += struct.pack("<3i", 2, 1, 2) + struct.pack("<3q", 0, 2 * size, 3 * size) + struct.pack("<3q", 0, 2, 3)
    (tmp_path / "b.idx").write_bytes(index)
    shard = TokenShard(tmp_path / "b")
    assert [shard.document(i).tolist() for i in range(shard.n_documents)] == [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize("suffix", ["idx", "bin"])
@pytest.mark.parametrize("damage", ["empty", "short", "long", "missing"])
def test_damage_is_refused_and_names_the_file(tmp_path, suffix, damage):
    prefix = write(tmp_path / "c")
    path = tmp_path / f"c.{suffix}"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "short": data[:-2], "long": data + b"ab"}[damage])
    with pytest.raises(DataError, match=rf"c\.{suffix}"):
        TokenShard(prefix)


@pytest.mark.parametrize(
    ("at", "what"), [(0, "magic"), (9, "version"), (17, "type"), (34, "size"), (50, "offset"), (78, "end")]
)
def test_a_damaged_index_is_refused(tmp_path, at, what):
    prefix = write(tmp_path / "d")
    path = tmp_path / "d.idx"
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"d\.(idx|bin)"):
        TokenShard(prefix)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="70000 does not fit"):
        write(tmp_path / "e", [[1], [70_000]])
    assert not is_shard(tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_type_that_holds_the_vocabulary():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.int32
