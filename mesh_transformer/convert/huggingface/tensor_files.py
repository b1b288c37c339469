# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Files of tensors: safetensors, read and written; pytorch_model.bin, read without PyTorch and its code; .npz, read in place.

safetensors: eight bytes of header length (little endian), the header (JSON: name -> dtype, shape, data_offsets, counted
from its end), then the values. A .bin is a zip archive whose member data.pkl says how storages become tensors, and whose
storages are members of their own, stored as they are. Either way a tensor is a range of bytes in a file, and nothing is
read until it is needed.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mesh_transformer.convert.lazy_arrays import FileArray, pack, to_dtype
from mesh_transformer.storage.direct_io import DirectFile
from mesh_transformer.storage.errors import CheckpointError, StorageError
from mesh_transformer.storage.paths import AnyPath

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
ROWS = 512  # of a tensor that are turned at once before parts of them are written
_WRITING = threading.Lock()  # the kernel lets one write into a file at a time, and others spin until then
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
# NumPy reads headers with ast, which several threads of Python 3.11 cannot do at once (python/cpython#106905).
_ONE_HEADER = threading.Lock()


def find_tensors(folder: AnyPath) -> dict[str, FileArray]:
    """Every tensor in a Hugging Face model folder; CheckpointError if files are missing, damaged, or name one twice."""
    for name, read in ((SAFETENSORS, read_safetensors), (TORCH, read_torch)):
        if (folder / name).is_file():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_indexed(index, read)
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
    raise CheckpointError(f"{folder}: no {SAFETENSORS} or {TORCH}, nor an index of them; it holds: {held}")


def read_safetensors(path: AnyPath) -> dict[str, FileArray]:
    """The tensors of one file; CheckpointError unless they fill it exactly."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path}: not a safetensors file, or cut short: header of {length} in {size} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        tensors = {name: _read_entry(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged header: {error}") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, _nbytes(item[1]))):
        if tensor.offset != end:
            raise CheckpointError(f"{path}: {name} begins at byte {tensor.offset}, not at {end}")
        end += _nbytes(tensor)
    if end != size:
        raise CheckpointError(f"{path}: {size:,} bytes, where its tensors end at {end:,}; copy or download it again")
    return tensors


def read_torch(path: AnyPath) -> dict[str, FileArray]:
    """The tensors of one .bin; its pickle is read by rules that know tensors only, and nothing in it is run."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            root = pickled.removesuffix("data.pkl")
            offsets = {
                info.filename: _data_offset(file, path, info) for info in archive.infolist() if not info.is_dir()
            }
            byteorder = f"{root}byteorder"
            if byteorder in offsets and archive.read(byteorder) != b"little":
                raise CheckpointError(f"{path}: big-endian values are not supported")
            tree = _Unpickler(io.BytesIO(archive.read(pickled))).load()
    except (zipfile.BadZipFile, ValueError, KeyError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: not a checkpoint of tensors alone (torch.save of a state_dict): {error}"
        ) from None
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{path}: holds a {type(tree).__name__}, not named tensors")
    tensors = {}
    for name, entry in tree.items():
        if not isinstance(entry, _Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(entry).__name__}, not a tensor")
        if entry.stride != _c_strides(entry.shape) and math.prod(entry.shape) > 1:
            raise CheckpointError(f"{path}: {name} is not contiguous (strides {entry.stride}); save it contiguous")
        offset = offsets[f"{root}data/{entry.key}"]
        dtype = to_dtype(entry.dtype)
        tensors[str(name)] = FileArray(path, offset + entry.first * dtype.itemsize, entry.shape, dtype)
    return tensors


def read_npz(path: AnyPath) -> list[FileArray]:
    """Where the arrays of an .npz lie; ValueError or BadZipFile if that cannot be relied upon."""
    arrays = []
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        names = [f"arr_{i}.npy" for i in range(len(members))]
        if members.keys() != set(names):
            raise ValueError(f"members are {sorted(members)[:5]}, not arr_0.npy, arr_1.npy ...")
        for name in names:
            info = members[name]
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed; save it with np.savez")
            file.seek(info.header_offset)
            mark, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
            start = file.seek(name_length + extra_length, os.SEEK_CUR)
            version = np.lib.format.read_magic(file) if mark == b"PK\3\4" else None
            if version != (1, 0):
                raise ValueError(f"{name} is not an array in .npy format 1.0")
            with _ONE_HEADER:
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.hasobject:
                raise ValueError(f"{name} is pickled, which is refused and was not run")
            if fortran:
                raise ValueError(f"{name} is in Fortran order")
            array = FileArray(path, file.tell(), shape, to_dtype("bfloat16") if dtype.str == "|V2" else dtype)
            if array.offset + math.prod(shape) * dtype.itemsize != start + info.file_size:
                raise ValueError(f"{name} has not the bytes of {dtype}{list(shape)}: cut short")
            arrays.append(array)
    return arrays


class Planned(NamedTuple):
    """A tensor to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype


def create_safetensors(path: Path, tensors: Mapping[str, Planned]) -> dict[str, FileArray]:
    """A file of the right size with its header, and where each tensor's values go (see `write_values`)."""
    names = {value: key for key, value in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype.name], "shape": list(shape), "data_offsets": [offset, end]}
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
        name: FileArray(path, start + header[name]["data_offsets"][0], tensor.shape, tensor.dtype)
        for name, tensor in tensors.items()
    }


def write_values(place: FileArray, first: int, values: np.ndarray, dim: int = 0) -> None:
    """Places from `first` on of one dim of a tensor in a created file (all of it, where it has no dims).

    Only along the first dim do they lie in one piece; along another one each row of what is before it is written by
    itself. They are durable once the file is synced.
    """
    if dim and values.shape[dim] == place.shape[dim]:
        dim = 0
    if dim == 0:
        values = pack(values)
    rows = math.prod(place.shape[:dim])
    inner = math.prod(place.shape[dim + 1 :]) * place.dtype.itemsize
    start, stride = place.offset + first * inner, inner * place.shape[dim] if dim else 0
    values = values.astype(place.dtype, copy=False).reshape(rows, -1)
    with DirectFile(Path(str(place.path)), truncate=False) as file:
        if not dim:
            file.write_at(values.view(np.uint8).data, start)
            return
        for low in range(0, rows, ROWS):
            block = pack(values[low : low + ROWS]).view(np.uint8)
            with _WRITING:
                for row, data in enumerate(block, low):
                    file.write_at(data.data, start + row * stride)


class _Tensor(NamedTuple):
    key: str
    dtype: str
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Knows the names that a saved state_dict uses, and maps them to records of ours."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"its pickle calls {module}.{name}, which is refused and was not run")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        kind, dtype, key, *_ = pid
        if kind != "storage" or dtype not in STORAGES.values():
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        return str(key), dtype


def _rebuild_tensor(storage: tuple[str, str], first: int, shape: Sequence[int], stride: Sequence[int], *_: Any) -> Any:
    key, dtype = storage
    return _Tensor(key, dtype, int(first), tuple(shape), tuple(stride))


def _c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _data_offset(file: IO[bytes], path: AnyPath, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin; the local header's lengths are its own."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path}: member {info.filename} is compressed; save it with PyTorch 1.6 or later")
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{path}: damaged at member {info.filename}")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name_length + extra_length


def _read_indexed(index: AnyPath, read: Any) -> dict[str, FileArray]:
    try:
        weight_map = json.loads(index.read_bytes(), object_pairs_hook=_no_duplicates)["weight_map"]
        files = sorted(set(weight_map.values()))
    except StorageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of tensors: {error}") from None
    tensors: dict[str, FileArray] = {}
    problems = []
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{index}: {name!r} is not the name of a file beside it")
        if not (index.parent / name).is_file():
            problems.append(f"{name} is missing")
            continue
        found = read(index.parent / name)
        problems += [f"{tensor} is in {name} and in another file" for tensor in found if tensor in tensors]
        problems += [
            f"{tensor} is in {name}, which the index does not say" for tensor in found if weight_map.get(tensor) != name
        ]
        tensors |= found
    problems += [f"{tensor} is not in {file}" for tensor, file in weight_map.items() if tensor not in tensors]
    if problems:
        raise CheckpointError(f"{index}:\n  " + "\n  ".join(problems[:50]))
    return tensors


def _read_entry(path: AnyPath, start: int, entry: Mapping[str, Any]) -> FileArray:
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES or not all(type(x) is int and x >= 0 for x in (*shape, begin, end)):
        raise ValueError(f"{str(dict(entry))[:100]} is not a tensor")
    array = FileArray(path, start + begin, shape, to_dtype(DTYPES[entry["dtype"]]))
    if end - begin != _nbytes(array):
        raise ValueError(f"{end - begin} bytes for {entry['dtype']}{list(shape)}")
    return array


def _nbytes(array: FileArray) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice in it")
    return table
