# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""TFRecords: sequences are read as written, into shards and runs, and damage is reported with file and record."""

import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from mesh_transformer.data.errors import DataError
from mesh_transformer.data.shard_builder import build_shards
from mesh_transformer.data.shards import TokenShard
from mesh_transformer.data.tfrecords import masked_crc32c, read_sequences
from mesh_transformer.data.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]
BYTES = load_tokenizer("bytes")
END = BYTES.end_of_text


def varint(value: int) -> bytes:
    value &= 2**64 - 1  # negative numbers take ten bytes
    low = [value >> shift & 127 for shift in range(0, 70, 7) if shift == 0 or value >> shift]
    return bytes([byte | 128 for byte in low[:-1]] + low[-1:])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(tokens, *, packed: bool = True) -> bytes:
    values = [varint(int(token)) for token in tokens]
    return field(3, field(1, b"".join(values)) if packed else b"".join(b"\x08" + value for value in values))


def example(**features: bytes) -> bytes:
    entries = [field(1, field(1, name.encode()) + field(2, data)) for name, data in features.items()]
    return field(1, b"".join(entries))


def frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def write(path: Path, sequences, **options) -> Path:
    path.write_bytes(b"".join(frame(example(text=feature(s, **options))) for s in sequences))
    return path


@pytest.fixture
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    made = [rng.integers(0, limit, 300).astype(np.uint32) for limit in (128, 50257, 2**32)]
    return [*made, np.array([127, 128, 16383, 16384, 2**32 - 1, 0], np.uint32), np.zeros(0, np.uint32)]


def test_masked_checksum_of_the_standard_value():
    """CRC-32C of "123456789" is 0xE3069283 (RFC 3720)."""
    crc = 0xE3069283
    assert masked_crc32c(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_masked_checksums_are_those_of_an_empty_record():
    """An empty record of any TFRecord writer: 12 header bytes, no data, and the checksum of no bytes."""
    assert frame(b"").hex() == "0000000000000000" + "29039807" + "d8ea82a2"


@pytest.mark.parametrize("packed", [True, False])
def test_sequences_are_read_as_written(tmp_path, sequences, packed):
    read = list(read_sequences(write(tmp_path / "a.tfrecords", sequences, packed=packed)))
    assert [len(s) for s in read] == [len(s) for s in sequences]
    assert all(a.dtype == np.uint32 and np.array_equal(a, b) for a, b in zip(read, sequences, strict=True))


def test_packed_and_unpacked_files_differ(tmp_path, sequences):
    files = [write(tmp_path / f"{p}.tfrecords", sequences, packed=p).read_bytes() for p in (True, False)]
    assert files[0] != files[1]


def test_compression_is_detected_from_the_content(tmp_path):
    sequences = [
        np.full(3 << 20, 7, np.uint32),
        np.arange(500, dtype=np.uint32),
    ]  # one compressed chunk expands to several
    plain = tmp_path / "plain_zstd.tfrecords"  # the name says zlib, the content does not
    long = example(text=field(3, field(1, b"\x07" * (3 << 20))))
    plain.write_bytes(frame(long) + frame(example(text=feature(sequences[1]))))
    packed = tmp_path / "packed.tfrecords"
    packed.write_bytes(zlib.compress(plain.read_bytes()))
    assert packed.stat().st_size < plain.stat().st_size // 10
    for path in (plain, packed):
        assert all(np.array_equal(a, b) for a, b in zip(read_sequences(path), sequences, strict=True))


def test_other_features_are_ignored(tmp_path):
    data = example(label=field(1, field(1, b"x")), text=feature([1, 2, 3]), weight=field(2, field(1, b"abcd")))
    (tmp_path / "a.tfrecords").write_bytes(frame(data))
    assert [s.tolist() for s in read_sequences(tmp_path / "a.tfrecords")] == [[1, 2, 3]]


def flip(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


GOOD = frame(example(text=feature(range(200))))
DAMAGED = {
    "head cut off": (GOOD[:5], "truncated after 5 of the 12"),
    "data cut off": (GOOD[:-10], "truncated after"),
    "last byte cut off": (GOOD[:-1], "truncated after"),
    "length": (flip(GOOD, 0), "checksum of the length"),
    "data": (flip(GOOD, 100), "checksum of the data"),
    "checksum": (flip(GOOD, len(GOOD) - 1), "checksum of the data"),
    "no feature": (
        frame(example(tokens=feature([1]), n=feature([2]))),
        "no feature 'text' with token ids; its features: 'tokens', 'n'",
    ),
    "empty example": (frame(b""), "no feature 'text'.*none"),
    "bytes": (frame(example(text=field(1, field(1, b"a text")))), "holds bytes .* expected a list of int64"),
    "floats": (frame(example(text=field(2, field(1, b"abcd")))), "holds floats"),
    "negative": (frame(example(text=feature([1, -1]))), "negative or does not fit"),
    "too large": (frame(example(text=feature([2**32]))), "negative or does not fit"),
    "fixed64": (frame(example(text=field(3, b"\x09" + bytes(8)))), "field 1 of wire type 1"),
    "no protobuf": (frame(b"\xff" * 40), "not a tf.train.Example"),
    "field too long": (frame(b"\x0a\x7f"), "extends past its end"),
    "cut varint": (frame(example(text=field(3, field(1, b"\x80")))), "the last token id is incomplete"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_names_file_and_record(tmp_path, kind):
    bad, message = DAMAGED[kind]
    (tmp_path / "a.tfrecords").write_bytes(GOOD + bad)
    reader = read_sequences(tmp_path / "a.tfrecords")
    assert len(next(reader)) == 200
    with pytest.raises(DataError, match=rf"a\.tfrecords: record 1: .*{message}"):
        next(reader)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-20], "zlib stream is truncated"),
        (lambda data: data[:30] + bytes(20) + data[50:], "zlib stream is damaged|checksum"),
        (lambda data: data + b"more", "extra bytes after the end"),
    ],
)
def test_damaged_zlib(tmp_path, change, message):
    rng = np.random.default_rng(0)
    data = b"".join(frame(example(text=feature(rng.integers(0, 50257, 400)))) for _ in range(3))
    (tmp_path / "a.tfrecords").write_bytes(change(zlib.compress(data)))
    with pytest.raises(DataError, match=message):
        list(read_sequences(tmp_path / "a.tfrecords"))


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "a.tfrecords").write_text("once upon a time there was a text file")
    with pytest.raises(DataError, match=r"record 0: .*not a TFRecord file"):
        list(read_sequences(tmp_path / "a.tfrecords"))


def write_records(tmp_path: Path) -> tuple[Path, list[list[int]]]:
    """Write three files of records and an index of them; return the index and the documents."""
    rng = np.random.default_rng(1)
    documents = []
    for part in range(3):
        records = [rng.choice([97, 98, 99, END], 40, p=[0.3, 0.3, 0.3, 0.1]) for _ in range(20)]
        write(tmp_path / "records" / f"{part}.tfrecords", records)
        for record in records:
            text = "".join(chr(token) for token in record)
            documents += [
                [ord(c) for c in document] for document in re.findall(f"[^{chr(END)}]*{chr(END)}|[^{chr(END)}]+$", text)
            ]
    index = tmp_path / "a.train.index"
    index.write_text("records/0.tfrecords\nrecords/1.tfrecords\n\nrecords/2.tfrecords\n")
    return index, documents


def test_an_index_becomes_a_shard_split_after_ends_of_text(tmp_path):
    (tmp_path / "records").mkdir()
    index, documents = write_records(tmp_path)
    assert any(d[-1] == END for d in documents)
    assert any(d[-1] != END for d in documents)
    built = build_shards(str(index), BYTES, tmp_path / "cache")["train"]
    shard = TokenShard(built.prefix)
    assert [shard.document(i).tolist() for i in range(shard.n_documents)] == documents
    assert built.n_tokens == 3 * 20 * 40 == shard.n_tokens
    assert built.n_bytes == sum(token != END for document in documents for token in document)
    folder = build_shards(str(tmp_path / "records"), BYTES, tmp_path / "cache")["train"]
    assert np.array_equal(TokenShard(folder.prefix).tokens, shard.tokens)


def test_holdout_selects_complete_records(tmp_path):
    (tmp_path / "records").mkdir()
    index, documents = write_records(tmp_path)
    splits = build_shards(str(index), BYTES, tmp_path / "cache", holdout=4)
    assert splits["train"].n_documents + splits["heldout"].n_documents == len(documents)
    assert 0 < splits["heldout"].n_tokens < splits["train"].n_tokens
    assert all(split.n_tokens % 40 == 0 for split in splits.values())


def test_tokens_outside_the_vocabulary_are_refused(tmp_path):
    path = write(tmp_path / "a.tfrecords", [[1, 2, 3], [1, 50256]])
    with pytest.raises(DataError, match=r"a\.tfrecords: record 1: token id 50256, but the tokenizer has 257"):
        build_shards(str(path), BYTES, tmp_path / "cache")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.tfrecords\n", r"a\.index:1: no such file: missing\.tfrecords \(looked for .*missing"),
        ("\ngs://bucket/a.tfrecords\n", r"a\.index:2: gs://bucket/a\.tfrecords is a URL"),
        ("\n", "lists no files"),
    ],
)
def test_bad_index(tmp_path, text, message):
    (tmp_path / "a.index").write_text(text)
    with pytest.raises(DataError, match=message):
        build_shards(str(tmp_path / "a.index"), BYTES, tmp_path / "cache")


def test_index_paths_may_be_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write(tmp_path / "a.tfrecords", [[1, 2, 3]])
    (tmp_path / "data" / "a.index").write_text("a.tfrecords")
    monkeypatch.chdir(tmp_path)
    assert build_shards("data/a.index", BYTES, tmp_path / "cache")["train"].n_tokens == 3


def test_make_shards_and_a_run_read_them(tmp_path):
    (tmp_path / "records").mkdir()
    index, documents = write_records(tmp_path)
    made = subprocess.run(
        [sys.executable, "scripts/make_shards.py", index, tmp_path / "shard", "--cache-dir", tmp_path / "cache"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert f"{len(documents)} documents, 2,400 tokens" in made.stdout
    assert "MB/s" in made.stdout
    assert TokenShard(tmp_path / "shard").n_documents == len(documents)

    from mesh_transformer.config import parse_config
    from mesh_transformer.data.dataset import open_data

    table = {
        "model": {"n_layers": 1, "d_model": 8, "n_heads": 1, "n_vocab": 257, "seq_len": 16},
        "data": {"train": {"a": {"path": str(index)}}, "cache_dir": str(tmp_path / "cache"), "shuffle": False},
        "train": {"steps": 1, "batch_size": 2},
    }
    data = open_data(parse_config(json.loads(json.dumps(table)), where="here"))
    first = np.concatenate([np.array(d) for d in documents])[:17]
    batch = data.train.batch(0, 2)
    assert np.array_equal(batch.tokens[0], first[:-1])
    assert np.array_equal(batch.targets[0], first[1:])
