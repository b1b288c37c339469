# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Token sequences out of TFRecords, as mesh-transformer-jax and GPT-Neo made them, without TensorFlow.

A file is records one after the other, or a zlib stream (RFC 1950) of them; little-endian:

    u64       length of the data
    u32       masked CRC-32C of these eight bytes
    bytes     data: a tf.train.Example in protobuf's encoding, whose feature "text" is a list of int64, packed or not
    u32       masked CRC-32C of the data

Masked is ((crc >> 15 | crc << 17) + 0xA282EAD8) mod 2^32. mesh-transformer-jax took a file for zlib if its path
contained "zstd"; here the first length's checksum decides, so a file may be renamed or moved.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from mesh_transformer.data.errors import DataError

FEATURE = "text"
MAX_RECORD_BYTES = 1 << 30
_CHUNK = 1 << 20
_BLOCK = 1024  # bytes that the tables of the checksum cover
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def read_sequences(path: str | Path) -> Iterator[np.ndarray]:
    """The feature "text" of every record, uint32 [tokens], in the file's order.

    Raises DataError with file and record (from 0) where the file breaks off, a checksum fails, or an example is not one.
    """
    path, number = Path(path), 0
    try:
        with open(path, "rb") as file:
            source = _Source(file)
            while (data := _read_record(source)) is not None:
                yield _parse_example(data)
                number += 1
    except _Damage as damage:
        raise DataError(f"{path}: record {number}: {damage}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def split_documents(sequence: np.ndarray, end_of_text: int) -> list[np.ndarray]:
    """The documents in a packed sequence, cut behind each end of text; the last one may lack it."""
    parts = np.split(sequence, np.flatnonzero(sequence == end_of_text) + 1)
    return [part for part in parts if len(part)]


class _Damage(Exception):
    """What is wrong with a record."""


class _Source:
    """Bytes of a file, decompressed if they are compressed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._buffer = file, b""
        head = file.read(12)
        file.seek(0)
        plain = len(head) == 12 and masked_crc32c(head[:8]) == int.from_bytes(head[8:], "little")
        zlib_header = len(head) >= 2 and head[0] == 0x78 and int.from_bytes(head[:2], "big") % 31 == 0
        self._inflate = zlib.decompressobj() if zlib_header and not plain else None

    def read(self, count: int) -> bytes:
        """The next `count` bytes, or what there is left of them."""
        if self._inflate is None:
            return self._file.read(count)
        parts, size = [self._buffer], len(self._buffer)
        while size < count and (part := self._decompress(self._inflate)):
            parts.append(part)
            size += len(part)
        data = b"".join(parts)
        self._buffer = data[count:]
        return data[:count]

    def _decompress(self, inflate: "zlib._Decompress") -> bytes:
        """Some more bytes; none at the end of a whole stream."""
        while not inflate.eof:
            chunk = inflate.unconsumed_tail or self._file.read(_CHUNK)
            try:
                data = inflate.decompress(chunk, _CHUNK)
            except zlib.error as error:
                raise _Damage(f"the zlib stream is damaged ({error}); copy the file again") from None
            if data:
                return data
            if not chunk and not inflate.eof:
                raise _Damage("the zlib stream breaks off; copy the file again")
        if inflate.unused_data or self._file.read(1):
            raise _Damage("bytes follow the end of the zlib stream")
        return b""


def _read_record(source: _Source) -> bytes | None:
    """Data of the next record, both checksums proved; None at the end."""
    head = source.read(12)
    if not head:
        return None
    if len(head) < 12:
        raise _Damage(f"the file breaks off after {len(head)} of 12 bytes of its head; copy the file again")
    length, expected = struct.unpack("<QI", head)
    if masked_crc32c(head[:8]) != expected:
        raise _Damage("the checksum of its length is wrong: damaged, or not a TFRecord file")
    if length > MAX_RECORD_BYTES:
        raise _Damage(f"{length:,} bytes; records of more than {MAX_RECORD_BYTES:,} are not read")
    data = source.read(length + 4)
    if len(data) < length + 4:
        raise _Damage(f"the file breaks off after {len(data):,} of {length + 4:,} bytes; copy the file again")
    data, expected = data[:length], int.from_bytes(data[length:], "little")
    if masked_crc32c(data) != expected:
        raise _Damage("the checksum of its data is wrong; copy the file again")
    return data


def masked_crc32c(data: bytes) -> int:
    """The checksum of a record: CRC-32C (Castagnoli, RFC 3720 appendix B.4), rotated and shifted as TFRecord has it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """CRC-32C.

    A CRC is linear: the exclusive or of what each byte adds, which a table has for every place in a block. What came
    before a block adds to it as if it had been mixed into the block's first four bytes.
    """
    values = np.frombuffer(data, np.uint8)
    register, head = 0xFFFFFFFF, len(values) % _BLOCK
    if head:
        register = _append(register, int(_mix(values[None, :head])[0]), head)
    for mixed in _mix(values[head:].reshape(-1, _BLOCK)).tolist():
        register = _append(register, mixed, _BLOCK)
    return register ^ 0xFFFFFFFF


def _mix(blocks: np.ndarray) -> np.ndarray:
    """What each row of bytes, at the end of a block, adds to the register; uint32 [rows]."""
    places = _OFFSETS[_BLOCK - blocks.shape[1] :]
    return np.bitwise_xor.reduce(_TABLE.take(blocks + places), axis=1)


def _append(register: int, mixed: int, length: int) -> int:
    """The register after `length` bytes that add `mixed` to it."""
    for place in range(_BLOCK - length, min(_BLOCK - length + 4, _BLOCK)):
        mixed ^= int(_TABLE[256 * place + (register & 255)])
        register >>= 8
    return mixed ^ register


def _make_table() -> np.ndarray:
    """What a byte at a place in a block adds to the register; uint32 [_BLOCK * 256]."""
    last = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = last >> 1 ^ np.where(last & 1, np.uint32(0x82F63B78), np.uint32(0))  # the polynomial, lowest bit first
    rows = [last]
    while len(rows) < _BLOCK:
        rows.append(rows[-1] >> 8 ^ last[rows[-1] & 255])  # one zero byte more behind it
    return np.concatenate(rows[::-1])


_TABLE = _make_table()
_OFFSETS = np.arange(0, 256 * _BLOCK, 256, dtype=np.intp)


def _parse_example(data: bytes) -> np.ndarray:
    """Example { Features features = 1 }, Features { map<string, Feature> feature = 1 }, entries { key = 1, value = 2 }."""
    names, feature = [], None
    for features in _messages(data, "the example"):
        for entry in _messages(features, "the features"):
            parts = {number: value for number, wire, value in _fields(entry, "a feature") if wire == _BYTES}
            name = bytes(parts.get(1, b"")).decode("utf-8", "backslashreplace")
            names.append(name)
            if name == FEATURE:
                feature = parts.get(2, b"")
    if feature is None:
        raise _Damage(f"no feature {FEATURE!r}; features here: {', '.join(map(repr, names)) or 'none'}")
    return _parse_feature(feature)


def _parse_feature(feature: bytes) -> np.ndarray:
    """Feature { oneof BytesList = 1, FloatList = 2, Int64List = 3 }, Int64List { repeated int64 value = 1 }."""
    lists: list[bytes] = []
    for number, wire, value in _fields(feature, f"feature {FEATURE!r}"):
        kind = {1: "bytes (text?)", 2: "floats", 3: "int64"}.get(number, f"field {number}")
        if number != 3 or wire != _BYTES:
            raise _Damage(f"feature {FEATURE!r} holds {kind} of wire type {wire} where a list of int64 is wanted")
        lists.append(value)
    parts = []
    for values in lists:
        for number, wire, value in _fields(values, "the list"):
            if number != 1 or wire not in (_BYTES, _VARINT):
                raise _Damage(f"the list of feature {FEATURE!r} has field {number} of wire type {wire}")
            parts.append(value)
    return _decode_varints(b"".join(parts))


def _messages(data: bytes, place: str) -> Iterator[bytes]:
    """Every field 1 of a message that holds nothing else."""
    for number, wire, value in _fields(data, place):
        if (number, wire) != (1, _BYTES):
            raise _Damage(f"{place} has field {number} of wire type {wire}: not a tf.train.Example")
        yield value


def _fields(data: bytes, place: str) -> Iterator[tuple[int, int, bytes]]:
    """Number, wire type and content of every field of a message; a varint's content is its own bytes."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at, place)
        wire, first = key & 7, at
        if wire == _VARINT:
            _, at = _read_varint(data, at, place)
        elif wire == _BYTES:
            length, first = _read_varint(data, at, place)
            at = first + length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise _Damage(f"{place} has a field of wire type {wire}: not a tf.train.Example")
        if at > len(data):
            raise _Damage(f"{place} has a field that ends behind it: not a tf.train.Example")
        yield key >> 3, wire, data[first:at]


def _read_varint(data: bytes, at: int, place: str) -> tuple[int, int]:
    """A number and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at + shift // 7 >= len(data):
            break
        byte = data[at + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + shift // 7 + 1
    raise _Damage(f"{place} has a number that does not end: not a tf.train.Example")


def _decode_varints(data: bytes) -> np.ndarray:
    """Numbers one after the other, uint32 [numbers]."""
    values = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(values < 128)
    if len(values) and (not len(ends) or ends[-1] != len(values) - 1):
        raise _Damage("its last token does not end")
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    lengths = ends - starts + 1
    if len(lengths) and lengths.max() > 5:
        raise _Damage("a token is negative or does not fit 32 bits")
    tokens = np.zeros(len(ends), np.uint64)
    wide = np.concatenate([values & 127, np.zeros(5, np.uint8)]).astype(np.uint64)
    for place in range(int(lengths.max()) if len(lengths) else 0):
        tokens |= np.where(lengths > place, wide[starts + place], 0) << np.uint64(7 * place)
    if len(tokens) and tokens.max() > 0xFFFFFFFF:
        raise _Damage("a token is negative or does not fit 32 bits")
    return tokens.astype(np.uint32)
