# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tensor files: read and write safetensors, read pytorch_model.bin without PyTorch, and locate the arrays of .npz files.

A safetensors file is eight bytes with the length of the header (little endian), the header (JSON: name -> dtype, shape, and
data_offsets, which count from the end of the header), and the values. A .bin file is a zip archive: the member data.pkl
describes how storages form tensors, and each storage is an uncompressed member. In each format a tensor is a range of bytes
in a file. The readers return these ranges without reading values.
"""

import collections
import io
import json
import math
import os
import pickle
import struct
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mesh_transformer.convert.lazy_arrays import FileArray, array_bytes, to_c_order, to_dtype
from mesh_transformer.storage.direct_io import DirectFile
from mesh_transformer.storage.errors import CheckpointError, StorageError
from mesh_transformer.storage.paths import AnyPath

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
TRANSPOSED_ROWS = 512  # rows of a tensor that are copied to C order at once, before a part of each is written
_WRITING = threading.Lock()  # the kernel serializes writes to a file, and waiting writers would spin
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
ZIP_SIGNATURE = b"PK\x03\x04"
LEGACY_NUMBER = 0x1950A86A20F9469CFC6C  # the first value in a file of PyTorch before 1.6
MAX_HEADER_BYTES = 100_000_000
BIG_ENDIAN = "big-endian values are not supported; save the file again on a little-endian machine"
# NumPy parses headers with ast, which is not thread-safe in Python 3.11 (python/cpython#106905).
_NPY_HEADER = threading.Lock()


def find_tensors(folder: AnyPath) -> dict[str, FileArray]:
    """Return every tensor of a Hugging Face model folder.

    Raises CheckpointError if files are missing or damaged, or have several tensors of one name.
    """
    for name, read in ((SAFETENSORS, read_safetensors), (TORCH, read_torch)):
        if (folder / name).is_file():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_indexed(index, read)
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
    raise CheckpointError(
        f"{folder}: expected {SAFETENSORS}, {TORCH} or an index of either; found: {found}; download the weights"
    )


def read_safetensors(path: AnyPath) -> dict[str, FileArray]:
    """Return the tensors of a safetensors file. Raise CheckpointError unless they fill it exactly."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: not a safetensors file, or truncated: the stated header length is {length:,} bytes, but the file has "
                f"{size:,} bytes; copy or download it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        tensors = {name: _read_entry(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged header: {error}; copy or download it again") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, array_bytes(item[1]))):
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: damaged: {name} starts at byte {tensor.offset:,}, expected {end:,}; copy or download it again"
            )
        end += array_bytes(tensor)
    if end != size:
        raise CheckpointError(f"{path}: {size:,} bytes, but its tensors end at {end:,}; copy or download it again")
    return tensors


def read_torch(path: AnyPath) -> dict[str, FileArray]:
    """Return the tensors of a .bin file. The unpickler accepts only tensors and does not run any code in the file."""
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP_SIGNATURE)) != ZIP_SIGNATURE:
                return _name_tensors(path, *_read_legacy(path))
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            root = pickled.removesuffix("data.pkl")
            offsets = {
                info.filename: _data_offset(file, path, info) for info in archive.infolist() if not info.is_dir()
            }
            byteorder = f"{root}byteorder"
            if byteorder in offsets and archive.read(byteorder) != b"little":
                raise CheckpointError(f"{path}: {BIG_ENDIAN}")
            tree = _Unpickler(io.BytesIO(archive.read(pickled))).load()
    except (
        zipfile.BadZipFile, ValueError, KeyError, TypeError, struct.error, pickle.UnpicklingError, EOFError, AttributeError,
    ) as error:  # fmt: skip
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: not a checkpoint that contains only tensors (torch.save of a state_dict): {error}"
        ) from None
    return _name_tensors(path, tree, {name.removeprefix(f"{root}data/"): start for name, start in offsets.items()})


def _read_legacy(path: AnyPath) -> tuple[Any, dict[str, int]]:
    """Return the state_dict of a file of PyTorch before 1.6, and the offset of each storage's values.

    Such a file is a sequence of pickles: a magic number, the version, properties of the machine, the state_dict, and the keys
    of the storages. The length and the values of each storage follow.
    """
    file_nbytes = path.stat().st_size
    with path.open("rb") as file:
        if _Unpickler(file).load() != LEGACY_NUMBER:
            raise pickle.UnpicklingError("it does not begin with the magic number of PyTorch's format")
        _Unpickler(file).load()
        if _Unpickler(file).load().get("little_endian") is False:
            raise CheckpointError(f"{path}: {BIG_ENDIAN}")
        unpickler = _Unpickler(file)
        tree = unpickler.load()
        offsets: dict[str, int] = {}
        for key in _Unpickler(file).load():
            (count,) = struct.unpack("<q", file.read(8))
            offsets[str(key)] = file.tell()
            end = file.seek(count * to_dtype(unpickler.storages[str(key)]).itemsize, os.SEEK_CUR)
            if end > file_nbytes:
                raise CheckpointError(
                    f"{path}: {file_nbytes:,} bytes, but its tensors end at {end:,}; copy or download it again"
                )
    return tree, offsets


def _name_tensors(path: AnyPath, tree: Any, offsets: Mapping[str, int]) -> dict[str, FileArray]:
    """Return the tensors of a state_dict, given the offset of each storage's values in the file."""
    if not isinstance(tree, Mapping):
        raise CheckpointError(
            f"{path}: contains an object of type {type(tree).__name__}, expected tensors by name; save model.state_dict()"
        )
    tensors = {}
    for name, entry in tree.items():
        if not isinstance(entry, _Tensor):
            raise CheckpointError(
                f"{path}: {name} is of type {type(entry).__name__}, expected a tensor; save only model.state_dict()"
            )
        if entry.stride != _c_strides(entry.shape) and math.prod(entry.shape) > 1:
            raise CheckpointError(
                f"{path}: {name} is not contiguous (strides {entry.stride}); call contiguous() before saving it"
            )
        dtype = to_dtype(entry.dtype)
        tensors[str(name)] = FileArray(path, offsets[entry.key] + entry.first * dtype.itemsize, entry.shape, dtype)
    return tensors


def read_npz(path: AnyPath) -> list[FileArray]:
    """Return the byte ranges of the arrays of an .npz file.

    Raises CheckpointError for an array that is compressed, pickled or in Fortran order, and ValueError or BadZipFile for a
    damaged file.
    """
    arrays = []
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        names = [f"arr_{i}.npy" for i in range(len(members))]
        if members.keys() != set(names):
            raise ValueError(f"members are {sorted(members)[:5]}, expected arr_0.npy, arr_1.npy, ...")
        for name in names:
            info = members[name]
            if info.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: {name} is compressed; save the arrays with np.savez")
            file.seek(info.header_offset)
            mark, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
            start = file.seek(name_length + extra_length, os.SEEK_CUR)
            version = np.lib.format.read_magic(file) if mark == b"PK\3\4" else None
            if version != (1, 0):
                raise ValueError(f"{name} is not an array in .npy format 1.0")
            with _NPY_HEADER:
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.hasobject:
                raise CheckpointError(
                    f"{path}: {name} has the type {dtype}, whose values are pickled; save it as an array of numbers"
                )
            if fortran:
                raise CheckpointError(f"{path}: {name} is in Fortran order; save it in C order (np.ascontiguousarray)")
            array = FileArray(path, file.tell(), shape, to_dtype("bfloat16") if dtype.str == "|V2" else dtype)
            if array.offset + math.prod(shape) * dtype.itemsize != start + info.file_size:
                raise ValueError(f"{name} does not have the number of bytes of {dtype}{list(shape)}; it is truncated")
            arrays.append(array)
    return arrays


class TensorSpec(NamedTuple):
    """Shape and type of a tensor to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def create_safetensors(path: Path, tensors: Mapping[str, TensorSpec]) -> dict[str, FileArray]:
    """Create a file of the final size with its header, and return the range of each tensor (see `write_values`)."""
    names = {value: key for key, value in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in tensors.items():
        end = offset + spec.nbytes
        header[name] = {"dtype": names[spec.dtype.name], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if not path.exists() or path.stat().st_size != 8 + len(raw) + offset:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + offset)
            os.fsync(file.fileno())
    start = 8 + len(raw)
    return {
        name: FileArray(path, start + header[name]["data_offsets"][0], spec.shape, spec.dtype)
        for name, spec in tensors.items()
    }


def write_values(target: FileArray, first: int, values: np.ndarray, dim: int = 0) -> None:
    """Write `values` into a tensor, from index `first` of the dimension `dim`; a scalar is written whole.

    A slice of the first dimension is contiguous in the file. For another dimension, each row of the leading dimensions is
    written separately. The values are durable once the file is synced.
    """
    if dim and values.shape[dim] == target.shape[dim]:
        dim = 0
    if dim == 0:
        values = to_c_order(values)
    rows = math.prod(target.shape[:dim])
    inner = math.prod(target.shape[dim + 1 :]) * target.dtype.itemsize
    start = target.offset + first * inner
    stride = inner * target.shape[dim] if dim else 0
    values = values.astype(target.dtype, copy=False).reshape(rows, -1)
    with DirectFile(Path(str(target.path)), truncate=False) as file:
        if not dim:
            file.write_at(values.view(np.uint8).data, start)
            return
        for low in range(0, rows, TRANSPOSED_ROWS):
            block = to_c_order(values[low : low + TRANSPOSED_ROWS]).view(np.uint8)
            with _WRITING:
                for row, data in enumerate(block, low):
                    file.write_at(data.data, start + row * stride)


class _Tensor(NamedTuple):
    key: str  # of the storage
    dtype: str
    first: int  # index of the tensor's first value in the storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Resolves only the names that a saved state_dict uses, to records of this module."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(
            f"its pickle calls {module}.{name}, which is not allowed and was not run; save it again"
        )

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.storages: dict[str, str] = {}  # dtype of each storage by its key

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        kind, dtype, key, *rest = pid
        if kind != "storage" or dtype not in STORAGES.values() or (len(rest) == 3 and rest[2] is not None):
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        self.storages[str(key)] = dtype
        return str(key), dtype


def _rebuild_tensor(storage: tuple[str, str], first: int, shape: Sequence[int], stride: Sequence[int], *_: Any) -> Any:
    key, dtype = storage
    return _Tensor(key, dtype, int(first), tuple(shape), tuple(stride))


def _c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _data_offset(file: IO[bytes], path: AnyPath, info: zipfile.ZipInfo) -> int:
    """Return the offset of a member's bytes, from the lengths in its local header; the archive's directory has other lengths."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path}: member {info.filename} is compressed; save it with PyTorch 1.6 or later")
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != ZIP_SIGNATURE:
        raise CheckpointError(f"{path}: damaged at member {info.filename}; copy or download it again")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name_length + extra_length


def _read_indexed(index: AnyPath, read: Callable[[AnyPath], dict[str, FileArray]]) -> dict[str, FileArray]:
    try:
        weight_map = json.loads(index.read_bytes(), object_pairs_hook=_no_duplicates)["weight_map"]
        files = sorted(set(weight_map.values()))
    except StorageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of tensors: {error}; copy or download it again") from None
    tensors: dict[str, FileArray] = {}
    problems = []
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{index}: {json.dumps(name)} is not the name of a file in the same folder")
        if not (index.parent / name).is_file():
            problems.append(f"{name} is missing")
            continue
        shard = read(index.parent / name)
        problems += [f"{tensor} is in {name} and in another file" for tensor in shard if tensor in tensors]
        problems += [
            f"{tensor} is in {name}, but not according to the index"
            for tensor in shard
            if weight_map.get(tensor) != name
        ]
        tensors |= shard
    problems += [f"{tensor} is not in {file}" for tensor, file in weight_map.items() if tensor not in tensors]
    if problems:
        raise CheckpointError(
            f"{index}: the index and the files do not match; download both again:\n  " + "\n  ".join(problems[:50])
        )
    return tensors


def _read_entry(path: AnyPath, start: int, entry: Mapping[str, Any]) -> FileArray:
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES or not all(type(x) is int and x >= 0 for x in (*shape, begin, end)):
        raise ValueError(f"{str(dict(entry))[:100]} is not a tensor; supported types: {', '.join(DTYPES)}")
    array = FileArray(path, start + begin, shape, to_dtype(DTYPES[entry["dtype"]]))
    if end - begin != array_bytes(array):
        raise ValueError(
            f"a tensor {entry['dtype']}{list(shape)} has {end - begin} bytes, expected {array_bytes(array)}"
        )
    return array


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        repeated = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {repeated} occurs twice")
    return table
