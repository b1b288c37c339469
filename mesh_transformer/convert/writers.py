# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Write a planned checkpoint as a native, Hugging Face or mesh-transformer-jax checkpoint, one block at a time.

GGUF files are written by gguf/writer.py. A resume log lets an interrupted write continue.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.checkpoint import local_backend
from mesh_transformer.checkpoint.arrays import HostSlice, StoredArray, copy_file
from mesh_transformer.checkpoint.bounded_pool import run_bounded
from mesh_transformer.checkpoint.chunk_grid import DTYPES, plan_chunks, shard_key
from mesh_transformer.checkpoint.commit import RESUMABLE_OWNER, Files, write_checkpoint, write_slice
from mesh_transformer.checkpoint.manifest import MANIFEST, ArrayRecord
from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.gptj.writer import write_gptj
from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.huggingface.reader import CONFIG, find_family, pack_tensors
from mesh_transformer.convert.huggingface.tensor_files import SAFETENSORS, TensorSpec, create_safetensors, write_values
from mesh_transformer.convert.huggingface.text_files import copy_small_files
from mesh_transformer.convert.import_plan import ImportPlan, PlannedArray, target_dtype
from mesh_transformer.convert.lazy_arrays import FileArray, cast_values, to_c_order, to_dtype
from mesh_transformer.convert.progress import ByteCounter, Progress, no_progress
from mesh_transformer.convert.slicing import SLICE_BYTES, group_slices, shard_slices, shrink_shard
from mesh_transformer.storage.digests import FileRecord
from mesh_transformer.storage.paths import AnyPath
from mesh_transformer.storage.resume_log import ResumeLog

MAX_FILE_BYTES = 5_000_000_000  # of one safetensors file


class WriteOptions(NamedTuple):
    """Options that all formats share."""

    dtype: str | None = None  # of the weights; None: unchanged
    slice_bytes: int = SLICE_BYTES  # size of a slice that a worker reads and writes at once
    progress: Progress = no_progress


def write_native(
    staging: Path, plan: ImportPlan, meta: Mapping[str, Any], log: ResumeLog, options: WriteOptions
) -> Path:
    """Write a native checkpoint below `staging` and return its step folder."""
    records = {name: _plan_record(name, planned, options) for name, planned in sorted(plan.arrays.items())}
    counter = ByteCounter("writing", plan.nbytes(options.dtype), options.progress)
    finished: dict[str, dict[str, FileRecord]] = {}
    for files in log.done.values():
        for name, key, size, digest in files:
            finished.setdefault(name, {})[key] = FileRecord(size, digest)

    def read_block(name: str, index: Slices) -> HostSlice:
        values = cast_values(plan.arrays[name].array.read(index), to_dtype(records[name].dtype), name)
        return HostSlice(index, to_c_order(values))

    def blocks() -> Iterator[tuple[str, Callable[[AnyPath], Files]]]:
        for name, record in records.items():
            array = plan.arrays[name].array
            for index in shard_slices(record):
                key = shard_key([part.start // size for part, size in zip(index, record.shard, strict=True)])
                if key not in finished.get(name, {}):
                    if isinstance(array, StoredArray) and array.record.dtype == record.dtype:
                        yield name, functools.partial(copy_file, array, key)
                    else:
                        read = functools.partial(read_block, name, index)
                        yield name, functools.partial(write_slice, name, record, read)
                counter.add(math.prod(part.stop - part.start for part in index) * DTYPES[record.dtype])

    def on_written(name: str, files: dict[str, FileRecord]) -> None:
        log.add(f"{name} {' '.join(files)}", [[name, key, *file] for key, file in files.items()])

    _reopen_staging(staging, plan.step)
    write_checkpoint(staging, plan.step, records, blocks(), meta, finished, on_written)
    return staging / f"step_{plan.step}"


def _plan_record(name: str, planned: PlannedArray, options: WriteOptions) -> ArrayRecord:
    array = planned.array
    dtype = target_dtype(array, name, options.dtype)
    if isinstance(array, StoredArray) and array.dtype == dtype:  # the files of the array are copied
        return dataclasses.replace(array.record, files={})
    shard, chunk = plan_chunks(array.shape, array.shape, dtype.name)
    shard = shrink_shard(shard, chunk, dtype, options.slice_bytes)
    return ArrayRecord(array.shape, dtype.name, planned.axes, shard, chunk)


def _reopen_staging(staging: Path, step: int) -> None:
    """Turn a committed step back into a temporary folder, if an earlier attempt stopped during verification or upload."""
    final, temporary = staging / f"step_{step}", local_backend.staging_folder(staging, step, RESUMABLE_OWNER)
    if final.is_dir() and not temporary.exists():
        os.rename(final, temporary)
        for name in (local_backend.COMMIT, MANIFEST):
            (temporary / name).unlink(missing_ok=True)


def write_huggingface(
    staging: Path,
    plan: ImportPlan,
    log: ResumeLog,
    options: WriteOptions,
    *,
    copy_files_from: AnyPath | None = None,
    model_type: str | None = None,
) -> Path:
    """Write a Hugging Face model folder in `staging` and return `staging`.

    The tokenizer and other small files are copied from the model folder `copy_files_from`. If several families of
    transformers compute the model's function, the family `model_type` is written.
    """
    kind, config = find_family(plan.config, model_type)
    tensors = pack_tensors(plan.config, plan.values, FAMILIES[kind])
    specs = {
        name: TensorSpec(tensor.shape, to_dtype(options.dtype) if options.dtype else tensor.dtype)
        for name, tensor in tensors.items()
    }
    files = _split_files(specs)
    total = sum(spec.nbytes for spec in specs.values())
    counter = ByteCounter("writing", total, options.progress)

    def write(keys: Sequence[str], name: str, target: FileArray, bounds: Sequence[tuple[int, int]]) -> Sequence[str]:
        dim = tensors[name].chunking.dim if tensors[name].shape else 0
        for first, last in bounds:
            values = tensors[name].read_slice(dim, first, last)
            write_values(target, first, cast_values(values, target.dtype, name), dim)
        return keys

    def blocks() -> Iterator[Callable[[], Sequence[str]]]:
        for file, names in files.items():
            targets = create_safetensors(staging / file, {name: specs[name] for name in names})
            for name in names:
                groups = list(group_slices(tensors[name], options.slice_bytes))
                for bounds in groups:
                    keys = [f"{name} {first}" for first, _ in bounds]
                    if any(key not in log.done for key in keys):
                        yield functools.partial(write, keys, name, targets[name], bounds)
                    counter.add(specs[name].nbytes * (bounds[-1][1] - bounds[0][0]) // groups[-1][-1][1])

    for keys in run_bounded(blocks()):
        for key in keys:
            log.add(key, True)
    for file in files:
        local_backend.sync_file(staging / file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {n: f for f, names in files.items() for n in names}}
        (staging / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=1))
    config |= {"torch_dtype": options.dtype or plan.weight_dtype()}
    (staging / CONFIG).write_text(json.dumps(config, indent=1))
    if copy_files_from is not None:
        copy_small_files(copy_files_from, staging)
    return staging


def _split_files(specs: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """Return {file name: tensor names}; a file has at most MAX_FILE_BYTES unless a single tensor is larger."""
    groups: list[list[str]] = [[]]
    nbytes = 0  # of the last group
    for name, spec in specs.items():
        if groups[-1] and nbytes + spec.nbytes > MAX_FILE_BYTES:
            groups.append([])
            nbytes = 0
        groups[-1].append(name)
        nbytes += spec.nbytes
    if len(groups) == 1:
        return {SAFETENSORS: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def write_gptj_v1(staging: Path, plan: ImportPlan, options: WriteOptions, *, shards: int) -> Path:
    """Write a mesh-transformer-jax v1 checkpoint below `staging` and return its step folder."""
    for name in ("config.json", "meta.json"):  # left by an earlier attempt that stopped during verification
        (staging / name).unlink(missing_ok=True)
    write_gptj(
        staging,
        plan,
        shards=shards,
        dtype=options.dtype or plan.weight_dtype(),
        slice_bytes=options.slice_bytes,
        progress=options.progress,
    )
    return staging / f"step_{plan.step}"
