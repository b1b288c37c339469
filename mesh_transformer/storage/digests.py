# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Size and xxh3-128 digest of files and objects."""

from typing import NamedTuple

import xxhash

from mesh_transformer.storage.paths import AnyPath, read_blocks


class FileRecord(NamedTuple):
    """Size and digest of a file."""

    size: int  # bytes
    digest: str  # xxh3-128, 32 hexadecimal digits


def digest_file(path: AnyPath, size: int | None = None) -> FileRecord:
    """Return the record of a file; of an object, only the first `size` bytes are read if `size` is given."""
    digest, nbytes = xxhash.xxh3_128(), 0
    for block in read_blocks(path, size):
        digest.update(block)
        nbytes += len(block)
    return FileRecord(nbytes, digest.hexdigest())


def digest_bytes(data: bytes) -> FileRecord:
    """Return the record of a file with this content."""
    return FileRecord(len(data), xxhash.xxh3_128_hexdigest(data))
