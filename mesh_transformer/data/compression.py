# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Streaming reads of plain, .gz and .zst files in bounded memory, with detection of truncated archives."""

import io
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import zstandard

from mesh_transformer.data.errors import DocumentError

COMPRESSED = {".gz", ".zst"}  # suffixes
_INPUT_BYTES = 1 << 10  # compressed bytes per step: zstd expands one step to at most about 32,000 times as much
_CHUNK_BYTES = 1 << 20
_MAX_DOCUMENT_BYTES = 1 << 30  # a longer document indicates damage, or data that is meant to exhaust memory


def read_chunks(file: Path, compressed: str | None) -> Iterator[bytes]:
    """Yield the contents of a file; `compressed` is its suffix in COMPRESSED, or None.

    Raises DocumentError if the archive is damaged or truncated.
    """
    with open(file, "rb", buffering=_CHUNK_BYTES) as stream:
        if compressed is None:
            yield from iter(partial(stream.read, _CHUNK_BYTES), b"")
        else:
            yield from _decompress(iter(partial(stream.read, _INPUT_BYTES), b""), compressed)


def split_lines(chunks: Iterator[bytes], max_bytes: int | None = None) -> Iterator[bytes]:
    """Yield the lines of chunked bytes without line ends, including an unterminated last line.

    A line longer than `max_bytes` is truncated to max_bytes + 1 bytes, and the rest of it is never held in memory.
    Without `max_bytes`, a line longer than the maximum size of a document raises DocumentError.
    """
    pending: list[bytes] = []
    length = 0
    for chunk in chunks:
        head, end, rest = chunk.partition(b"\n")
        if max_bytes is not None:
            head = head[: max_bytes + 1 - length]
        pending.append(head)
        length += len(head)
        check_length(length)
        if end:
            yield b"".join(pending)
            *lines, tail = rest.split(b"\n")
            yield from lines if max_bytes is None else (line[: max_bytes + 1] for line in lines)
            tail = tail if max_bytes is None else tail[: max_bytes + 1]
            pending, length = [tail], len(tail)
    check_length(length)
    if length:
        yield b"".join(pending)


def check_length(length: int) -> None:
    """Raise DocumentError if `length` exceeds the maximum size of a document in bytes."""
    if length > _MAX_DOCUMENT_BYTES:
        raise DocumentError(
            "too long",
            f"the document has more than {_MAX_DOCUMENT_BYTES:,} bytes; split it, or use .jsonl with one document per line",
        )


def _decompress(inputs: Iterator[bytes], suffix: str) -> Iterator[bytes]:
    """Yield the contents of all frames (zstd) or members (gzip), and raise DocumentError if a frame is incomplete.

    Each frame has a separate decoder, because zstandard's stream readers treat the end of the file as the end
    of the data and so do not notice a truncated frame.
    """
    zstd = zstandard.ZstdDecompressor()
    decoder, start, offset = None, 0, 0
    for data in inputs:
        rest = data
        while rest:
            if decoder is None:
                start = offset + len(data) - len(rest)
                if suffix == ".gz" and start and not rest.strip(b"\0"):
                    break  # zero padding to a multiple of the block size, as on tapes
                decoder = zstd.decompressobj() if suffix == ".zst" else zlib.decompressobj(wbits=31)
            try:
                yield decoder.decompress(rest)
            except (zstandard.ZstdError, zlib.error) as error:
                where = f"near byte {offset:,} (frame from byte {start:,})"
                hint = (
                    "compress with a window of at most 128 MiB (--long=27)"
                    if "memory" in str(error)
                    else "copy it again"
                )
                raise DocumentError("damaged archive", f"damaged archive {where}: {error}; {hint}") from None
            rest = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
        offset += len(data)
    if decoder is not None:
        detail = (
            f"truncated archive: ends at byte {offset:,}, inside the frame that starts at byte {start:,}; copy it again"
        )
        raise DocumentError("truncated archive", detail)
    if not offset:
        raise DocumentError("empty file", "the archive is empty; check that the program that wrote it finished")


class ChunkStream(io.RawIOBase):
    """A readable binary file over an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next((chunk for chunk in self._chunks if chunk), b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
