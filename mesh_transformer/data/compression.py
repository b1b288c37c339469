# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Bytes of plain, .gz and .zst files in bounded memory, where every archive must come to its own end."""

import io
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import zstandard

from mesh_transformer.data.errors import DocumentError

COMPRESSED = {".gz", ".zst"}
_PIECE = 1 << 10  # compressed bytes per step: zstd expands one step to at most about 32,000 times as much
_CHUNK = 1 << 20
_LONGEST = 1 << 30  # bytes of one document; more is damage or an attack on memory


def read_chunks(file: Path, compressed: str | None) -> Iterator[bytes]:
    """Contents of a file; `compressed` is its suffix in COMPRESSED, or None. Raises DocumentError at damage."""
    with open(file, "rb", buffering=_CHUNK) as stream:
        if compressed is None:
            yield from iter(partial(stream.read, _CHUNK), b"")
        else:
            yield from _decompress(iter(partial(stream.read, _PIECE), b""), compressed)


def split_lines(chunks: Iterator[bytes], longest: int | None = None) -> Iterator[bytes]:
    """Lines without their ends; the piece behind the last line end only if the chunks come to a good end.

    Of a line with more than `longest` bytes the first longest + 1 come, and no more of it is ever held; without a
    `longest` it raises DocumentError if a line is longer than any real document.
    """
    pending: list[bytes] = []
    length = 0
    for chunk in chunks:
        head, end, rest = chunk.partition(b"\n")
        if longest is not None:
            head = head[: longest + 1 - length]
        pending.append(head)
        length += len(head)
        check_length(length)
        if end:
            yield b"".join(pending)
            *whole, tail = rest.split(b"\n")
            yield from whole if longest is None else (line[: longest + 1] for line in whole)
            tail = tail if longest is None else tail[: longest + 1]
            pending, length = [tail], len(tail)
    check_length(length)
    if length:
        yield b"".join(pending)


def check_length(length: int) -> None:
    """Raises DocumentError if a document of `length` bytes is longer than any real one."""
    if length > _LONGEST:
        raise DocumentError("too long", f"more than {_LONGEST:,} bytes in one document; are its lines documents (.jsonl)?")


def _decompress(pieces: Iterator[bytes], suffix: str) -> Iterator[bytes]:
    """The contents of all frames (zstd) or members (gzip), each of which must come to its own end.

    zstandard's stream readers take the end of the file for the end of the data: so each frame is decoded by itself.
    """
    zstd = zstandard.ZstdDecompressor()
    decoder, start, offset = None, 0, 0
    for piece in pieces:
        rest = piece
        while rest:
            if decoder is None:
                start = offset + len(piece) - len(rest)
                if suffix == ".gz" and start and not rest.strip(b"\0"):
                    break  # padding to a block size, as tapes have it
                decoder = zstd.decompressobj() if suffix == ".zst" else zlib.decompressobj(wbits=31)
            try:
                yield decoder.decompress(rest)
            except (zstandard.ZstdError, zlib.error) as error:
                where = f"near byte {offset:,} (frame from byte {start:,})"
                remedy = "; compress with a window of at most 128 MiB (--long=27)" if "memory" in str(error) else ""
                raise DocumentError("damaged archive", f"damaged archive {where}: {error}{remedy}") from None
            rest = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
        offset += len(piece)
    if decoder is not None:
        detail = f"truncated archive: breaks off at byte {offset:,}, inside the frame that starts at byte {start:,}"
        raise DocumentError("truncated archive", detail)
    if not offset:
        raise DocumentError("empty file", "an empty archive; was it written to its end?")


class ChunkStream(io.RawIOBase):
    """A file to read from, of chunks."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes read; 0 at the end."""
        if not self._rest:
            self._rest = next((chunk for chunk in self._chunks if chunk), b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
