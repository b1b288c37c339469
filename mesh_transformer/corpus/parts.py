# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Documents between stages and at the end: JSON lines in .jsonl.zst, {"text", "id", "meta"}, a file whole or not at all."""

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

LEVEL = 3  # as The Pile has it


class PartWriter:
    """`with PartWriter(path) as part: part.add(text, id, meta)`; the file appears, durable, when the block ends well."""

    def __init__(self, path: Path):
        self.path, self.documents, self.bytes, self.digest = path, 0, 0, ""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.tmp")  # always the same: the next try writes over it
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed in __exit__)
        self._zstd = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj()
        self._hash = xxhash.xxh3_128()

    def add(self, text: str, name: str, meta: dict[str, Any]) -> None:
        """One document."""
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
        """Counts, size and digest, for the record of the stage."""
        size = self.path.stat().st_size
        return {"documents": self.documents, "bytes": self.bytes, "size": size, "digest": self.digest}


def read_documents(path: Path) -> Iterator[dict[str, Any]]:
    """What PartWriter wrote; DataError if the file is not whole."""
    try:
        for line in split_lines(read_chunks(path, ".zst")):
            yield json.loads(line)
    except DocumentError as flaw:
        raise DataError(f"{path}: {flaw.detail}; remove it and build again") from None
    except FileNotFoundError:
        raise DataError(f"{path}: a part of the corpus is gone; build again") from None


def digest_file(path: str | Path) -> str:
    """xxh3 of a file's bytes, 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
