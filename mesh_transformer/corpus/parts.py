# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Files of documents between stages and in the output: JSON lines {"text", "id", "meta"} in .jsonl.zst, written atomically."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash
import zstandard

from mesh_transformer.data.compression import read_chunks, split_lines
from mesh_transformer.data.errors import DataError, DocumentError

COMPRESSION_LEVEL = 3  # of Zstandard, as in The Pile


class PartWriter:
    """Atomic writer of one file: `with PartWriter(path) as part: part.add(text, name, meta)`.

    The file appears under `path`, flushed to disk, when the block succeeds.
    """

    def __init__(self, path: Path):
        self.path = path
        self.documents = 0
        self.bytes = 0  # of text
        self.digest = ""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.tmp")  # a fixed name: the next attempt overwrites it
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed in __exit__)
        self._zstd = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_checksum=True).compressobj()
        self._hash = xxhash.xxh3_128()

    def add(self, text: str, name: str, meta: dict[str, Any]) -> None:
        """Append a document; `name` is its id."""
        line = json.dumps({"text": text, "id": name, "meta": meta}, ensure_ascii=False) + "\n"
        self.documents += 1
        self.bytes += len(text.encode())
        self._write(self._zstd.compress(line.encode()))

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write(self._zstd.flush())
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        if kind is None:
            os.replace(self._temporary, self.path)
            self.digest = self._hash.hexdigest()
        else:
            self._temporary.unlink(missing_ok=True)

    def describe(self) -> dict[str, Any]:
        """Return counts, size and digest of the file, for the record of the stage."""
        size = self.path.stat().st_size
        return {"documents": self.documents, "bytes": self.bytes, "size": size, "digest": self.digest}


def read_documents(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the documents of a file that PartWriter wrote; raise DataError if the file is missing or truncated."""
    try:
        for line in split_lines(read_chunks(path, ".zst")):
            yield json.loads(line)
    except DocumentError as error:
        raise DataError(f"{path}: {error.detail}; remove the file and build again") from None
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: a part of the corpus is missing; build again") from None


def read_dropped(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the documents that the build in `out` dropped; "meta" has "component", "filter" and "reason"."""
    for path in sorted((out / "work").glob("*/dropped/*.jsonl.zst")):
        for record in read_documents(path):
            # Version 1.0 wrote "step" instead of "filter".
            meta = {"filter" if key == "step" else key: value for key, value in record["meta"].items()}
            yield record | {"meta": meta}


def digest_file(path: str | Path) -> str:
    """Return the 128-bit xxh3 digest of a file's bytes as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
