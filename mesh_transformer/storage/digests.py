# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a file or an object must be: its size and its xxh3-128."""

from typing import NamedTuple

import xxhash

from mesh_transformer.storage.paths import AnyPath, read_blocks


class FileRecord(NamedTuple):
    """What a file must be."""

    size: int  # bytes
    digest: str  # xxh3-128, 32 hexadecimal digits


def digest_file(path: AnyPath, size: int | None = None) -> FileRecord:
    """Size and digest of a file; of an object, `size` is the part from its beginning that is read, if it is known."""
    digest, found = xxhash.xxh3_128(), 0
    for block in read_blocks(path, size):
        digest.update(block)
        found += len(block)
    return FileRecord(found, digest.hexdigest())


def digest_bytes(data: bytes) -> FileRecord:
    """The same of what is in memory."""
    return FileRecord(len(data), xxhash.xxh3_128_hexdigest(data))
