# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Token shards: memory-mapped files of tokenized documents, in the indexed format of Megatron-LM and GPT-NeoX.

A shard is `<prefix>.bin`, the concatenated tokens of all documents, and `<prefix>.idx` (little-endian):

    9 bytes   b"MMIDIDX\\x00\\x00"
    u64       version, 1
    u8        token type: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    u64       N, number of sequences
    u64       M, number of document boundaries
    i32 [N]   number of tokens of each sequence
    i64 [N]   byte offset of each sequence in .bin
    i64 [M]   boundaries: document j consists of sequences boundary[j] to boundary[j + 1]

ShardWriter writes one sequence per document (M = N + 1), with the end-of-text token at the sequence's end, as in Pythia's data.
"""

import os
import struct
from pathlib import Path
from types import TracebackType

import numpy as np

from mesh_transformer.data.errors import DataError

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
HEADER = struct.Struct("<9sQBQQ")


def token_dtype(n_vocab: int) -> np.dtype:
    """Return the smallest token type of the format that holds every id below `n_vocab`."""
    return np.dtype(np.uint16 if n_vocab <= 2**16 else np.int32)


def is_shard(prefix: str | Path) -> bool:
    """Return whether both files of a shard exist."""
    return Path(f"{prefix}.bin").is_file() and Path(f"{prefix}.idx").is_file()


class TokenShard:
    """A memory-mapped shard. Raises DataError if its files are missing or inconsistent."""

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index, data):
            if not path.is_file():
                raise DataError(f"{path}: no such file, but a shard consists of a .bin and an .idx file; copy both")
        dtype, ends = _read_index(index)
        n_bytes = data.stat().st_size
        if (
            n_bytes % dtype.itemsize
            or (len(ends) and ends[-1] * dtype.itemsize != n_bytes)
            or (not len(ends) and n_bytes)
        ):
            expected = int(ends[-1]) * dtype.itemsize if len(ends) else 0
            raise DataError(
                f"{data}: {n_bytes:,} bytes, but {index.name} describes {expected:,}; copy or rebuild the shard"
            )
        self.ends = ends  # [documents]: number of the shard's tokens up to the end of each document
        self.tokens = np.memmap(data, dtype, "r") if n_bytes else np.zeros(0, dtype)  # [tokens]

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return len(self.ends)

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of document `index`, including the end of text."""
        return self.tokens[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]

    def documents_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the index of the document at each token position in the shard."""
        return np.searchsorted(self.ends, positions, side="right")


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    raw = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    if len(raw) < HEADER.size or bytes(raw[: len(MAGIC)]) != MAGIC:
        raise DataError(
            f"{path}: begins with {bytes(raw[: len(MAGIC)])!r}, but the index of a token shard begins with {MAGIC!r}; copy or "
            "rebuild the shard"
        )
    _, version, code, n_sequences, n_boundaries = HEADER.unpack(bytes(raw[: HEADER.size]))
    if version != VERSION or code not in DTYPES:
        raise DataError(
            f"{path}: version {version}, token type {code}; supported: version {VERSION}, types {sorted(DTYPES)}; rebuild the shard"
        )
    expected = HEADER.size + 12 * n_sequences + 8 * n_boundaries
    if len(raw) != expected:
        raise DataError(f"{path}: {len(raw):,} bytes, but its header describes {expected:,}; copy or rebuild the shard")
    dtype = np.dtype(DTYPES[code])
    start = HEADER.size
    lengths = np.frombuffer(raw, "<i4", n_sequences, start).astype(np.int64)
    offsets = np.frombuffer(raw, "<i8", n_sequences, start + 4 * n_sequences)
    boundaries = np.frombuffer(raw, "<i8", n_boundaries, start + 12 * n_sequences)
    ends = np.cumsum(lengths)
    if (lengths < 0).any() or not np.array_equal(offsets, (ends - lengths) * dtype.itemsize):
        raise DataError(f"{path}: the sequences have gaps or overlap, but they must be contiguous; rebuild the shard")
    rising = n_boundaries == 0 or (
        boundaries[0] == 0 and boundaries[-1] == n_sequences and (np.diff(boundaries) >= 0).all()
    )
    if not rising or (n_sequences and not n_boundaries):
        raise DataError(f"{path}: document boundaries do not increase from 0 to {n_sequences}; rebuild the shard")
    last = boundaries[1:][np.diff(boundaries) > 0] - 1  # last sequence of each document that has sequences
    return dtype, ends[last]


class ShardWriter:
    """Writes a shard: `with ShardWriter(prefix, dtype) as shard: shard.add(tokens)`.

    The files appear under their names when the block ends without an exception.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.lengths: list[int] = []  # tokens of each document
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(f"{prefix}.tmp-{os.getpid()}")
        self._data = open(f"{self._temporary}.bin", "wb")  # noqa: SIM115 (closed in __exit__)

    def add(self, tokens: np.ndarray) -> None:
        """Add a document, including the end of text. Raises DataError if an id does not fit the token type."""
        limits = np.iinfo(self.dtype)
        if len(tokens) and not (limits.min <= tokens.min() and tokens.max() <= limits.max):
            raise DataError(
                f"{self.prefix}: token id {tokens.max()} does not fit {self.dtype}; use a larger token type"
            )
        self._data.write(np.ascontiguousarray(tokens, self.dtype).tobytes())
        self.lengths.append(len(tokens))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            _sync(self._data)
        self._data.close()
        if kind is not None:
            os.unlink(f"{self._temporary}.bin")
            return
        lengths = np.asarray(self.lengths, "<i4")
        offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * self.dtype.itemsize
        with open(f"{self._temporary}.idx", "wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(lengths) + 1))
            for array in (lengths, offsets.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8")):
                index.write(array.tobytes())
            _sync(index)
        # The index is renamed last: without it, the files are not recognized as a shard.
        os.replace(f"{self._temporary}.bin", f"{self.prefix}.bin")
        os.replace(f"{self._temporary}.idx", f"{self.prefix}.idx")


def _sync(file: object) -> None:
    file.flush()  # type: ignore[attr-defined]
    os.fsync(file.fileno())  # type: ignore[attr-defined]
