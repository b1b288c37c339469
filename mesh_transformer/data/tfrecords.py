# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Reads token sequences from the TFRecords of mesh-transformer-jax and GPT-Neo, without TensorFlow.

A file is a sequence of records, or a zlib stream (RFC 1950) of them; little-endian:

    u64       length of the data
    u32       masked CRC-32C of these eight bytes
    bytes     data: an encoded protobuf tf.train.Example, whose feature "text" is a list of int64, packed or not
    u32       masked CRC-32C of the data

A masked checksum is ((crc >> 15 | crc << 17) + 0xA282EAD8) mod 2^32. mesh-transformer-jax treated a file as zlib if its
path contained "zstd". This module tests the checksum of the first record's length instead, so a file may be renamed or moved.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from crc32c import crc32c

from mesh_transformer.data.errors import DataError

FEATURE_NAME = "text"
MAX_RECORD_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20
_NOT_AN_EXAMPLE = f": not a tf.train.Example; give TFRecords of examples with an int64 feature {FEATURE_NAME!r}"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf


def read_sequences(path: str | Path) -> Iterator[np.ndarray]:
    """Yield the feature "text" of every record, uint32 [tokens], in the order of the file.

    Raises DataError with file and record (from 0) if the file is truncated, a checksum fails, or a record is not a valid
    example.
    """
    path, number = Path(path), 0
    try:
        with open(path, "rb") as file:
            records = _RecordFile(file)
            while (data := _read_record(records)) is not None:
                yield _parse_example(data)
                number += 1
    except _RecordError as error:
        raise DataError(f"{path}: record {number}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def split_documents(sequence: np.ndarray, end_of_text: int) -> list[np.ndarray]:
    """Split a packed sequence after each end of text; the last document may lack an end of text."""
    parts = np.split(sequence, np.flatnonzero(sequence == end_of_text) + 1)
    return [part for part in parts if len(part)]


class _RecordError(Exception):
    """A damaged or invalid record."""


class _RecordFile:
    """The bytes of a file, decompressed if necessary."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._buffer = b""
        head = file.read(12)
        file.seek(0)
        plain = len(head) == 12 and masked_crc32c(head[:8]) == int.from_bytes(head[8:], "little")
        zlib_header = len(head) >= 2 and head[0] == 0x78 and int.from_bytes(head[:2], "big") % 31 == 0
        self._inflate = zlib.decompressobj() if zlib_header and not plain else None

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes, or all that remain."""
        if self._inflate is None:
            return self._file.read(count)
        parts, n_bytes = [self._buffer], len(self._buffer)
        while n_bytes < count and (part := self._decompress(self._inflate)):
            parts.append(part)
            n_bytes += len(part)
        data = b"".join(parts)
        self._buffer = data[count:]
        return data[:count]

    def _decompress(self, inflate: "zlib._Decompress") -> bytes:
        """Return the next decompressed bytes, or b"" at the end of a complete stream."""
        while not inflate.eof:
            chunk = inflate.unconsumed_tail or self._file.read(_CHUNK_BYTES)
            try:
                data = inflate.decompress(chunk, _CHUNK_BYTES)
            except zlib.error as error:
                raise _RecordError(f"the zlib stream is damaged: {error}; copy the file again") from None
            if data:
                return data
            if not chunk and not inflate.eof:
                raise _RecordError("the zlib stream is truncated; copy the file again")
        if inflate.unused_data or self._file.read(1):
            raise _RecordError("extra bytes after the end of the zlib stream; copy the file again")
        return b""


def _read_record(records: _RecordFile) -> bytes | None:
    """Return the data of the next record after a check of both checksums; None at the end of the file."""
    head = records.read(12)
    if not head:
        return None
    if len(head) < 12:
        raise _RecordError(f"the file is truncated after {len(head)} of the 12 header bytes; copy the file again")
    length, expected = struct.unpack("<QI", head)
    if masked_crc32c(head[:8]) != expected:
        raise _RecordError(
            "the checksum of the length is wrong: the file is damaged, or not a TFRecord file; copy it again"
        )
    if length > MAX_RECORD_BYTES:
        raise _RecordError(f"the record has {length:,} bytes, more than the maximum of {MAX_RECORD_BYTES:,}; split it")
    data = records.read(length + 4)
    if len(data) < length + 4:
        raise _RecordError(
            f"the file is truncated after {len(data):,} of the {length + 4:,} bytes that follow the record's header; copy it again"
        )
    data, expected = data[:length], int.from_bytes(data[length:], "little")
    if masked_crc32c(data) != expected:
        raise _RecordError("the checksum of the data is wrong; copy the file again")
    return data


def masked_crc32c(data: bytes) -> int:
    """Return the TFRecord checksum: CRC-32C (Castagnoli, RFC 3720 appendix B.4), rotated and shifted."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _parse_example(data: bytes) -> np.ndarray:
    """Parse Example { Features features = 1 }, Features { map<string, Feature> feature = 1 }, entries { key = 1, value = 2 }."""
    names, feature = [], None
    for features in _messages(data, "the example"):
        for entry in _messages(features, "the features"):
            parts = {number: value for number, wire, value in _fields(entry, "a feature") if wire == _BYTES}
            name = bytes(parts.get(1, b"")).decode("utf-8", "backslashreplace")
            names.append(name)
            if name == FEATURE_NAME:
                feature = parts.get(2, b"")
    if feature is None:
        raise _RecordError(
            f"the example has no feature {FEATURE_NAME!r} with token ids; its features: {', '.join(map(repr, names)) or 'none'}"
        )
    return _parse_feature(feature)


def _parse_feature(feature: bytes) -> np.ndarray:
    """Parse Feature { oneof BytesList = 1, FloatList = 2, Int64List = 3 }, Int64List { repeated int64 value = 1 }."""
    lists: list[bytes] = []
    for number, wire, value in _fields(feature, f"feature {FEATURE_NAME!r}"):
        kind = {1: "bytes (text?)", 2: "floats", 3: "int64"}.get(number, f"field {number}")
        if number != 3 or wire != _BYTES:
            raise _RecordError(f"feature {FEATURE_NAME!r} holds {kind} of wire type {wire}, expected a list of int64")
        lists.append(value)
    parts = []
    for values in lists:
        for number, wire, value in _fields(values, "the list"):
            if number != 1 or wire not in (_BYTES, _VARINT):
                raise _RecordError(
                    f"the list of feature {FEATURE_NAME!r} has field {number} of wire type {wire}, expected field 1 with int64"
                )
            parts.append(value)
    return _decode_varints(b"".join(parts))


def _messages(data: bytes, context: str) -> Iterator[bytes]:
    """Yield the fields of a message in which every field has the number 1."""
    for number, wire, value in _fields(data, context):
        if (number, wire) != (1, _BYTES):
            raise _RecordError(f"{context} has field {number} of wire type {wire}{_NOT_AN_EXAMPLE}")
        yield value


def _fields(data: bytes, context: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, wire type and content of every field of a message; the content of a varint is its encoded bytes."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at, context)
        wire, first = key & 7, at
        if wire == _VARINT:
            _, at = _read_varint(data, at, context)
        elif wire == _BYTES:
            length, first = _read_varint(data, at, context)
            at = first + length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise _RecordError(f"{context} has a field of wire type {wire}{_NOT_AN_EXAMPLE}")
        if at > len(data):
            raise _RecordError(f"{context} has a field that extends past its end{_NOT_AN_EXAMPLE}")
        yield key >> 3, wire, data[first:at]


def _read_varint(data: bytes, at: int, context: str) -> tuple[int, int]:
    """Return the varint at offset `at` and the offset after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at + shift // 7 >= len(data):
            break
        byte = data[at + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + shift // 7 + 1
    raise _RecordError(f"{context} has a truncated varint{_NOT_AN_EXAMPLE}")


def _decode_varints(data: bytes) -> np.ndarray:
    """Decode consecutive varints to uint32 [numbers]."""
    values = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(values < 128)
    if len(values) and (not len(ends) or ends[-1] != len(values) - 1):
        raise _RecordError("the last token id is incomplete; copy the file again")
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    lengths = ends - starts + 1
    if len(lengths) and lengths.max() > 5:
        raise _RecordError("a token id is negative or does not fit in 32 bits; write ids from 0 to 2^32 - 1")
    tokens = np.zeros(len(ends), np.uint64)
    bits = np.concatenate([values & 127, np.zeros(5, np.uint8)]).astype(np.uint64)
    for i in range(int(lengths.max()) if len(lengths) else 0):  # byte i of each number
        tokens |= np.where(lengths > i, bits[starts + i], 0) << np.uint64(7 * i)
    if len(tokens) and tokens.max() > 0xFFFFFFFF:
        raise _RecordError("a token id is negative or does not fit in 32 bits; write ids from 0 to 2^32 - 1")
    return tokens.astype(np.uint32)
