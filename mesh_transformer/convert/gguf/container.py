# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Container format of GGUF: read the metadata and the location of each tensor of a file or of a set of split files.

The layout is specified in ggml's docs/gguf.md. `gguf.GGUFReader` is not used: it keeps a NumPy array per string of the
metadata, which for a vocabulary of 256,000 entries takes 800 MB, and it needs a local file.
"""

import math
import re
import struct
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ENTRIES = 1 << 26  # of a table or an array; a larger number means that the file is damaged
MAX_DIMS = 4
NUMBERS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4", GGUFValueType.FLOAT64: "<f8", GGUFValueType.BOOL: "?",
}  # fmt: skip
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class TensorInfo(NamedTuple):
    """The location and type of a stored tensor."""

    path: AnyPath
    offset: int  # bytes from the beginning of the file
    shape: tuple[int, ...]  # in the order of NumPy: the last dimension is contiguous
    type: GGMLQuantizationType

    @property
    def row_bytes(self) -> int:
        """Size of one row, the values of the last dimension, in bytes."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * block_bytes

    @property
    def nbytes(self) -> int:
        """Size of the stored values in bytes."""
        return math.prod(self.shape[:-1]) * self.row_bytes


class GGUFFile(NamedTuple):
    """The metadata and tensors of a model."""

    path: AnyPath  # of the first file
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def find_files(folder: AnyPath) -> list[AnyPath]:
    """Return the GGUF files of a folder; of a set of split files, only the first."""
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".gguf")), key=lambda entry: entry.name)
    names = [SPLIT_NAME.fullmatch(file.name) for file in files]
    return [file for file, name in zip(files, names, strict=True) if name is None or int(name[2]) == 1]


def read_gguf(path: AnyPath) -> GGUFFile:
    """Read the metadata and tensor table of a GGUF file, of a folder with one, or of a set of split files.

    Raises CheckpointError if a file is missing or damaged, or if the folder has several models.
    """
    if path.is_dir():
        files = find_files(path)
        if len(files) != 1:
            names = ", ".join(file.name for file in files)
            raise CheckpointError(f"{path}: holds {len(files)} GGUF models ({names}); pass the path of one file")
        path = files[0]
    parts = [_read_file(part) for part in _split_paths(path)]
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        if repeated := sorted(tensors.keys() & part.tensors.keys()):
            raise CheckpointError(
                f"{part.path}: the tensor {repeated[0]} is also in another of the split files; download the files again"
            )
        tensors |= part.tensors
    return GGUFFile(path, parts[0].metadata, tensors)


def _split_paths(path: AnyPath) -> list[AnyPath]:
    """Return the paths of all split files of a model, given one of them. Raise CheckpointError if some are missing."""
    name = SPLIT_NAME.fullmatch(path.name)
    if name is None:
        return [path]
    count = int(name[3])
    paths = [path.parent / f"{name[1]}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise CheckpointError(
            f"{path}: one of {count} split files; missing: {', '.join(missing)}; copy the missing files next to it"
        )
    return paths


def _read_file(path: AnyPath) -> GGUFFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, path, size)
        if (magic := reader.take(4)) != MAGIC:
            raise CheckpointError(
                f"{path}: not a GGUF file: it begins with {magic!r} instead of {MAGIC!r}; copy or download it again"
            )
        version = reader.number("<u4")
        if version not in VERSIONS:
            raise CheckpointError(
                f"{path}: GGUF version {version} is not supported; supported: {', '.join(map(str, VERSIONS))}, "
                "little endian"
            )
        n_tensors, n_keys = reader.count(), reader.count()
        metadata = dict(reader.entry() for _ in range(n_keys))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(
                f"{path}: general.alignment = {alignment!r}, but it must be a positive integer; copy or download the file again"
            )
        table = [reader.tensor() for _ in range(n_tensors)]
        start = -(-reader.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, info in table:
        if name in tensors:
            raise CheckpointError(f"{path}: damaged: the tensor {name} occurs twice; copy or download it again")
        tensors[name] = info._replace(offset=start + info.offset)
        if tensors[name].offset + info.nbytes > size:
            raise CheckpointError(
                f"{path}: truncated: {name} ends at byte {tensors[name].offset + info.nbytes:,}, but the file has {size:,} "
                "bytes; copy or download it again"
            )
    return GGUFFile(path, metadata, tensors)


class _Reader:
    """Reader of consecutive values of a header. Raises CheckpointError if the file ends early or a value is invalid."""

    def __init__(self, file: IO[bytes], path: AnyPath, size: int):
        self.file = file
        self.path = path
        self.size = size
        self.position = 0

    def take(self, length: int) -> bytes:
        if length > self.size - self.position:
            raise CheckpointError(
                f"{self.path}: truncated or damaged: the header needs {length:,} bytes at byte {self.position:,}, "
                f"but the file has {self.size:,} bytes; copy or download it again"
            )
        data = self.file.read(length)
        self.position += length
        return data

    def number(self, type_string: str) -> Any:
        dtype = np.dtype(type_string)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def count(self) -> int:
        (count,) = struct.unpack("<Q", self.take(8))
        if count > MAX_ENTRIES:
            raise CheckpointError(
                f"{self.path}: damaged: {count:,} entries at byte {self.position:,}, but at most {MAX_ENTRIES:,} are allowed; "
                "copy or download it again"
            )
        return count

    def text(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        return self.take(length).decode("utf-8", errors="surrogateescape")

    def entry(self) -> tuple[str, Any]:
        key = self.text()
        return key, self.value(key, self.number("<u4"))

    def value(self, key: str, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            inner = self.number("<u4")
            count = self.count()
            if inner in NUMBERS:
                dtype = np.dtype(NUMBERS[GGUFValueType(inner)])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            return [self.value(key, inner) for _ in range(count)]
        if kind not in NUMBERS:
            raise CheckpointError(
                f"{self.path}: damaged: the value of {key} has the unknown type {kind}; copy or download it again"
            )
        type_string = NUMBERS[GGUFValueType(kind)]
        if type_string == "<f4":  # the shortest decimal that rounds to this number: 1e-05, not 9.999999747378752e-06
            return float(str(np.frombuffer(self.take(4), "<f4")[0]))
        return self.number(type_string)

    def tensor(self) -> tuple[str, TensorInfo]:
        """Return a tensor's name and location, relative to the start of the data."""
        name = self.text()
        n_dims = self.number("<u4")
        if n_dims > MAX_DIMS:
            raise CheckpointError(
                f"{self.path}: damaged: the tensor {name} has {n_dims} dimensions, but at most {MAX_DIMS} are allowed; copy or "
                "download it again"
            )
        dims = [self.number("<u8") for _ in range(n_dims)]
        kind = self.number("<u4")
        offset = self.number("<u8")
        if kind not in set(GGMLQuantizationType):
            raise CheckpointError(
                f"{self.path}: the tensor {name} has the type {kind}, which the installed version of gguf does not know; update "
                "it: pip install -U gguf"
            )
        info = TensorInfo(self.path, offset, tuple(reversed(dims)) or (1,), GGMLQuantizationType(kind))
        block = GGML_QUANT_SIZES[info.type][0]
        if info.shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: damaged: the tensor {name} has rows of {info.shape[-1]} values, but {info.type.name} needs a "
                f"multiple of {block}; copy or download it again"
            )
        return name, info
