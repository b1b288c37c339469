# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Write a planned checkpoint as a GGUF file, one block of rows at a time, and compare the file with its source.

`gguf.GGUFWriter` writes the header; the tensors are written at the offsets in the header, so an interrupted write can
continue. Matrices have the requested type; vectors, the routers of experts and learned position embeddings are float32, as
in llama.cpp's converter.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType

from mesh_transformer.checkpoint import local_backend
from mesh_transformer.checkpoint.bounded_pool import run_bounded
from mesh_transformer.config import ModelConfig, format_value
from mesh_transformer.convert.gguf.architectures import (
    ARCHITECTURES,
    OUTPUT,
    TOKEN_EMBEDDING,
    make_family,
    write_config,
)
from mesh_transformer.convert.gguf.container import TensorInfo, read_gguf
from mesh_transformer.convert.gguf.metadata import Table, constant_tensors
from mesh_transformer.convert.gguf.quantize import encode_rows
from mesh_transformer.convert.gguf.reader import read_gguf_model
from mesh_transformer.convert.gguf.tensors import to_pairs
from mesh_transformer.convert.gguf.tokenizer_writer import write_tokenizer
from mesh_transformer.convert.huggingface.reader import find_family, pack_tensors
from mesh_transformer.convert.huggingface.tensor_files import write_values
from mesh_transformer.convert.import_plan import ImportPlan, describe_weights, make_model_config
from mesh_transformer.convert.layout_views import Joined, Packed
from mesh_transformer.convert.lazy_arrays import FLOAT32, FileArray, Index, InMemory, LazyArray
from mesh_transformer.convert.progress import ByteCounter, Progress
from mesh_transformer.convert.slicing import SLICE_BYTES
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.resume_log import ResumeLog

FLOAT32_TENSORS = ("ffn_gate_inp.weight", "position_embd.weight", "token_types.weight", "_norm.weight", ".bias")
BYTES = np.dtype(np.uint8)
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
K_FILE_TYPES = {"Q4_K": LlamaFileType.MOSTLY_Q4_K_S}
ENCODING_OVERHEAD = 8  # memory to encode a slice, as a multiple of its size


class PlannedTensor(NamedTuple):
    """A planned tensor of the file, packed from native arrays."""

    parts: Sequence[Packed | Joined]  # consecutive parts of the first dimension: one for each expert, or only one
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    change: Callable[[np.ndarray], np.ndarray]  # applied to rows before they are encoded

    @property
    def nbytes(self) -> int:
        """Size of the stored values in bytes."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * block_bytes


class GGUFPlan(NamedTuple):
    """The plan of a GGUF file; no values have been read."""

    metadata: Table
    tensors: Mapping[str, PlannedTensor]
    constants: Mapping[str, np.ndarray]  # tensors computed from the configuration
    type: str  # type of the matrices; see `fitting_type` for exceptions
    is_exact: bool  # whether the type represents the values of the source exactly

    @property
    def nbytes(self) -> int:
        """Size of the stored values in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_gguf(plan: ImportPlan, gguf_type: str | None, model_type: str | None = None) -> GGUFPlan:
    """Plan the file of a model. Raise CheckpointError if no supported architecture of llama.cpp computes its function.

    If several architectures do, the architecture of the family `model_type` is used if it is one of these.
    """
    kind, config = _find_family(plan.config, model_type)
    metadata = write_config(config)
    name = metadata["general.architecture"]
    family = make_family(kind, name)
    weights = {spec.name for specs in describe_weights(plan.config).values() for spec in specs}
    missing = weights - family.mappings_of(plan.config).keys()
    if missing:
        raise CheckpointError(
            f"the architecture {name!r} of llama.cpp has no tensor for {', '.join(sorted(missing))}; export the model with "
            "--format huggingface"
        )
    wanted = GGMLQuantizationType[gguf_type or DTYPES[plan.weight_dtype()]]
    packed = pack_tensors(plan.config, plan.values, family)
    tensors = {tensor: _plan_tensor(tensor, each, wanted, name, plan.config) for tensor, each in packed.items()}
    constants = constant_tensors(config, plan.config.head_dim)
    is_exact = wanted.name in ("F32", DTYPES[plan.weight_dtype()])
    model = GGUFPlan(metadata, tensors, constants, wanted.name, is_exact)
    _check_function(plan.config, model)
    file_type = (
        K_FILE_TYPES.get(wanted.name) or LlamaFileType["ALL_F32" if wanted.name == "F32" else f"MOSTLY_{wanted.name}"]
    )
    return model._replace(metadata=metadata | {"general.file_type": int(file_type), "general.quantization_version": 2})


def _find_family(config: ModelConfig, preferred: str | None) -> tuple[str, Table]:
    """Return a family that computes the function of a model, if possible one in ARCHITECTURES, and its config.json."""
    kinds = [kind for architecture in ARCHITECTURES.values() for kind in architecture.families]
    kinds.sort(key=lambda kind: kind != preferred)
    family = find_family(config, kinds[0])
    for kind in kinds:
        if family[0] not in kinds:
            family = find_family(config, kind)
    return family


def _check_function(config: ModelConfig, model: GGUFPlan) -> None:
    """Raise CheckpointError with the fields of the model's function that the file cannot represent."""
    shapes: dict[str, LazyArray] = {
        name: InMemory(np.broadcast_to(FLOAT32.type(0), each.shape)) for name, each in model.tensors.items()
    }
    shapes |= {name: InMemory(values) for name, values in model.constants.items()}
    name = model.metadata["general.architecture"]
    represented = make_model_config(read_gguf_model(model.metadata, shapes, "GGUF")[1], "GGUF").effective_fields()
    fields = config.effective_fields()
    different = [f"{key} = {format_value(value)}" for key, value in fields.items() if represented.get(key) != value]
    if different:
        raise CheckpointError(
            f"a GGUF file of the architecture {name!r} does not compute the function of this model; it cannot represent "
            + ", ".join(different)
            + "; export the model with --format huggingface"
        )


def _plan_tensor(
    name: str, packed: Packed | Joined, wanted: GGMLQuantizationType, architecture: str, config: ModelConfig
) -> PlannedTensor:
    module = name.rpartition(".")[0]
    entry = ARCHITECTURES[architecture]

    def change(values: np.ndarray) -> np.ndarray:
        if entry.pairs and module.endswith(("attn_q", "attn_k")):
            return to_pairs(values, config.head_dim)
        if entry.norm_offset and module.endswith("norm"):
            return values.astype(FLOAT32) + FLOAT32.type(1)
        return values

    parts: list[Packed | Joined] = [packed]
    if isinstance(packed, Packed) and packed.pattern[0] == ["expert"] and len(packed.shape) == 3:
        (array,), (axes,) = packed.arrays, packed.axes
        pattern = " ".join(word for group in packed.pattern[1:] for word in group)
        parts = [Packed([Index(array, e)], pattern, [axes[1:]]) for e in range(packed.shape[0])]
    if len(packed.shape) == 1 or name.endswith(FLOAT32_TENSORS):
        return PlannedTensor(parts, packed.shape, GGMLQuantizationType.F32, change)
    return PlannedTensor(parts, packed.shape, fitting_type(wanted, name, packed.shape[-1]), change)


def fitting_type(wanted: GGMLQuantizationType, name: str, row: int) -> GGMLQuantizationType:
    """Return the type of a matrix with rows of `row` values: `wanted`, or Q8_0 or F16 if the blocks of `wanted` do not fit.

    In a file of K-quants, token embeddings and the output matrix are Q8_0.
    """
    if wanted.name.endswith("_K") and (name in (TOKEN_EMBEDDING, OUTPUT) or row % GGML_QUANT_SIZES[wanted][0]):
        wanted = GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16 if row % GGML_QUANT_SIZES[wanted][0] else wanted


def write_gguf(
    path: Path,
    model: GGUFPlan,
    meta: Mapping[str, Any],
    log: ResumeLog,
    progress: Progress,
    slice_bytes: int = SLICE_BYTES,
) -> None:
    """Write the file at `path`; blocks that an earlier attempt has written according to `log` are left unchanged."""
    _write_header(path, model, meta)
    infos = read_gguf(path).tensors
    counter = ByteCounter("writing", sum(tensor.nbytes for tensor in model.tensors.values()), progress)
    for name, values in model.constants.items():
        write_values(_stored(infos[name]), 0, values.view(np.uint8).reshape(1, -1))

    def write(name: str, block: "Block") -> str:
        write_values(_stored(infos[name]), block.first, encode_block(name, model.tensors[name], block))
        return f"{name} {block.first}"

    def jobs() -> Iterator[Callable[[], str]]:
        for name, tensor in model.tensors.items():
            for block in list_blocks(tensor, slice_bytes):
                if f"{name} {block.first}" not in log.done:
                    yield functools.partial(write, name, block)
                counter.add(block.rows * infos[name].row_bytes)

    for key in run_bounded(jobs()):
        log.add(key, True)
    local_backend.sync_file(path)


def verify_gguf(path: Path, model: GGUFPlan, progress: Progress, slice_bytes: int = SLICE_BYTES) -> dict[str, str]:
    """Read every tensor with weights back, compare it with the encoded values of the source, and return the digest of each tensor.

    Raises CheckpointError if a bit differs.
    """
    infos = read_gguf(path).tensors
    counter = ByteCounter("verifying", sum(tensor.nbytes for tensor in model.tensors.values()), progress)
    digests = {name: xxhash.xxh3_128() for name in model.tensors}

    def compare(name: str, block: "Block") -> tuple[str, np.ndarray]:
        expected = encode_block(name, model.tensors[name], block)
        stored = _stored(infos[name])
        actual = stored.read((slice(block.first, block.first + block.rows), slice(0, stored.shape[1])))
        if not np.array_equal(actual, expected):
            raise CheckpointError(
                f"{name} at row {block.first}: the result differs from the source; the result was deleted. Check the disk, then "
                "run the conversion again"
            )
        return name, expected

    jobs = (
        functools.partial(compare, name, block)
        for name, tensor in model.tensors.items()
        for block in list_blocks(tensor, slice_bytes)
    )
    for name, rows in run_bounded(jobs):
        digests[name].update(np.ascontiguousarray(rows).data)
        counter.add(rows.nbytes)
    return {name: digest.hexdigest() for name, digest in digests.items()}


class Block(NamedTuple):
    """Rows of a tensor that are read, encoded and written at once; a vector is one row."""

    part: int  # index into PlannedTensor.parts
    start: int  # [start, stop) of the first dimension of the part
    stop: int
    first: int  # first row in the stored tensor
    rows: int  # number of rows


def list_blocks(tensor: PlannedTensor, slice_bytes: int) -> Iterator[Block]:
    """Yield blocks that cover a tensor, in order; encoding a block takes about `slice_bytes` of memory or less."""
    if len(tensor.shape) == 1:
        yield Block(0, 0, tensor.shape[0], 0, 1)
        return
    first = 0
    for i, part in enumerate(tensor.parts):
        multiple = part.row_chunking.multiple if isinstance(part, Packed) else part.chunking.multiple
        row_bytes = ENCODING_OVERHEAD * part.shape[1] * FLOAT32.itemsize
        step = max(slice_bytes // (row_bytes * multiple), 1) * multiple
        for start in range(0, part.shape[0], step):
            stop = min(start + step, part.shape[0])
            yield Block(i, start, stop, first, stop - start)
            first += stop - start


def encode_block(name: str, tensor: PlannedTensor, block: Block) -> np.ndarray:
    """Return the stored rows [rows, bytes] of a block."""
    values = tensor.change(tensor.parts[block.part].read_slice(0, block.start, block.stop))
    return encode_rows(values.reshape(block.rows, -1), tensor.type, name)


def _stored(info: TensorInfo) -> FileArray:
    """Return a tensor's stored rows as bytes [rows, bytes]."""
    rows = math.prod(info.shape[:-1])
    return FileArray(info.path, info.offset, (rows, info.row_bytes), BYTES)


def _write_header(path: Path, model: GGUFPlan, meta: Mapping[str, Any]) -> None:
    """Create the file with its header and its final size, unless a file with this header and size exists."""
    name = model.metadata["general.architecture"]
    n_vocab = model.tensors[TOKEN_EMBEDDING].shape[0]
    values = {"general.type": "model", "general.name": path.stem} | model.metadata | write_tokenizer(meta, n_vocab)
    header = path.with_name(path.name + ".header")
    writer = GGUFWriter(header, name)
    for key, value in values.items():
        if key != "general.architecture":  # GGUFWriter has added this key
            _add_value(writer, key, value)
    end = 0
    for tensor, array in model.constants.items():
        writer.add_tensor_info(tensor, array.shape, array.dtype, array.nbytes)
        end = _pad(end, writer.data_alignment) + array.nbytes
    for tensor, each in model.tensors.items():
        writer.add_tensor_info(tensor, each.shape, FLOAT32, each.nbytes, raw_dtype=each.type)
        end = _pad(end, writer.data_alignment) + each.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = _pad(header.stat().st_size, writer.data_alignment) + _pad(end, writer.data_alignment)
    if path.exists() and path.stat().st_size == size and _begins_with(path, header):
        header.unlink()
        return
    with open(header, "r+b") as file:
        file.truncate(size)
    header.replace(path)


def _begins_with(path: Path, header: Path) -> bool:
    expected = header.read_bytes()
    with open(path, "rb") as file:
        return file.read(len(expected)) == expected


def _pad(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add one entry of the metadata with the type that llama.cpp reads."""
    if isinstance(value, list | bytes):
        writer.add_array(key, value)
        return
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    writer.add_key_value(key, value, kinds[type(value)])
