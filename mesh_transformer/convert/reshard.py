# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Any checkpoint to any other in bounded memory: a block is read, cast and written; then everything is read back and compared.

What is written lies in DST.partial until it has been proved, with a journal of the blocks that are done, so that a
conversion that was killed goes on where it was. Then one rename makes it DST. If DST is remote, all of that happens in a
folder of this machine, and then it is uploaded (upload.py).
"""

import dataclasses
import functools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from mesh_transformer.checkpoint import local_backend
from mesh_transformer.checkpoint.arrays import Piece, StoredArray, copy_file
from mesh_transformer.checkpoint.bounded_pool import run_side_by_side
from mesh_transformer.checkpoint.chunk_grid import DTYPES, plan_chunks, shard_key
from mesh_transformer.checkpoint.commit import BLOCKS, Files, write_blocks, write_piece
from mesh_transformer.checkpoint.manifest import MANIFEST, ArrayRecord
from mesh_transformer.checkpoint.store import find_checkpoint
from mesh_transformer.convert.gptj.reader import open_gptj
from mesh_transformer.convert.gptj.writer import write_gptj
from mesh_transformer.convert.huggingface.reader import (
    CARRIED,
    CONFIG,
    compose_tensors,
    find_family,
    is_huggingface,
    open_huggingface,
    read_settings,
)
from mesh_transformer.convert.huggingface.tensor_files import SAFETENSORS, Planned, create_safetensors, write_values
from mesh_transformer.convert.huggingface.tensor_map import FAMILIES
from mesh_transformer.convert.import_plan import FLOATS, PREFIX, Foreign, make_model_config
from mesh_transformer.convert.lazy_arrays import FileArray, Lazy, Slices, pack, to_dtype
from mesh_transformer.convert.slicing import PART_BYTES, cut, group_parts, shard_slices, shrink
from mesh_transformer.convert.upload import Upload, check_remote, upload_folder
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.transformer import describe_params
from mesh_transformer.storage.digests import FileRecord
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import Place, RemotePath
from mesh_transformer.storage.resume_log import JOURNAL, Journal

FILE_BYTES = 5_000_000_000  # of one safetensors file
Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


class Source(NamedTuple):
    """A checkpoint of any kind."""

    kind: str  # "native", "huggingface", "gptj-v1"
    path: Place
    foreign: Foreign
    meta: dict[str, Any]  # of a native one
    settings: dict[str, Any]  # of a foreign one: its own configuration


def open_native(path: Place) -> Source:
    """A checkpoint of ours, of a run folder the newest."""
    store, step = find_checkpoint(path)
    meta = store.read_meta(step)
    model = meta.get("config", {}).get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{store.folder(step)}: its meta has no config.model")
    return Source("native", store.folder(step), Foreign(model, store.open_arrays(step), step, None), meta, {})


def open_source(path: Place, source_config: Place | None = None) -> Source:
    """The checkpoint that `path` is, whatever its kind; CheckpointError if it is none."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    shards = [path, *sorted(path.glob("step_*"))]
    original = next((folder for folder in shards if (folder / "shard_0").is_dir()), None)
    if original:
        if source_config is None:
            raise CheckpointError(f"{original}: a mesh-transformer-jax checkpoint needs --source-config, its JSON file")
        try:
            table = json.loads(source_config.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{source_config}: not a JSON file: {error}") from None
        return Source("gptj-v1", original, open_gptj(original, table, str(source_config)), {}, table)
    if is_huggingface(path):
        return Source("huggingface", path, open_huggingface(path), {}, dict(read_settings(path)[0].table))
    return open_native(path)


def check_destination(destination: Place, overwrite: bool, nbytes: int, staging: Path | None = None) -> None:
    """CheckpointError if something is there that must stay, or the disk has not `nbytes` to spare."""
    partial = partial_folder(destination, staging)
    if isinstance(destination, RemotePath):
        check_remote(destination, overwrite)
    elif destination.exists() and not overwrite:
        raise CheckpointError(f"{destination} exists; choose another place or say --overwrite")
    partial.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(partial.parent).free
    there = sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file()) if partial.exists() else 0
    if free + there < nbytes * 1.01 + 10_000_000:
        raise CheckpointError(f"{partial.parent}: {free:,} bytes are free, about {nbytes:,} are needed")


def partial_folder(destination: Place, staging: Path | None = None) -> Path:
    """Where the result is made: beside it, or on this machine in `staging`, by default the folder of temporary files."""
    if isinstance(destination, RemotePath):
        own = xxhash.xxh3_64_hexdigest(str(destination).encode())
        return (staging or Path(tempfile.gettempdir())).absolute() / f"{destination.name}-{own}.partial"
    return destination.with_name(destination.name + ".partial")


def target_dtype(array: Lazy, name: str, dtype: str | None) -> np.dtype:
    """What the values become: weights are cast, everything else stays."""
    return to_dtype(dtype) if dtype and name.startswith(PREFIX) else array.dtype


def common_dtype(arrays: Mapping[str, Lazy]) -> str:
    """The type that all weights have, or float32, which holds the values of each."""
    kinds = {array.dtype.name for name, array in arrays.items() if name.startswith(PREFIX)}
    return kinds.pop() if len(kinds) == 1 else "float32"


def count_bytes(arrays: Mapping[str, Lazy], dtype: str | None) -> int:
    """Size of the result's values."""
    return sum(math.prod(a.shape) * target_dtype(a, name, dtype).itemsize for name, a in arrays.items())


def write_native(
    partial: Path, source: Source, meta: Mapping[str, Any], *, dtype: str | None, part_bytes: int = PART_BYTES,
    journal: Journal, progress: Progress,
) -> Path:  # fmt: skip
    """A checkpoint of ours in `partial`; the step's folder."""
    arrays, step = source.foreign.arrays, source.foreign.step
    axes = _find_axes(source)
    records = {}
    for name, array in sorted(arrays.items()):
        kind = target_dtype(array, name, dtype)
        if isinstance(array, StoredArray) and array.dtype == kind:  # its files stay as they are
            records[name] = dataclasses.replace(array.record, files={})
            continue
        shard, chunk = plan_chunks(array.shape, array.shape, kind.name)
        records[name] = ArrayRecord(array.shape, kind.name, axes[name], shrink(shard, chunk, kind, part_bytes), chunk)
    total, done = count_bytes(arrays, dtype), 0
    finished: dict[str, dict[str, FileRecord]] = {}
    for files in journal.done.values():
        for name, key, size, digest in files:
            finished.setdefault(name, {})[key] = FileRecord(size, digest)

    def make(name: str, index: Slices) -> Piece:
        return Piece(index, pack(arrays[name].read(index).astype(to_dtype(records[name].dtype), copy=False)))

    def blocks() -> Iterator[tuple[str, Callable[[Place], Files]]]:
        nonlocal done
        for name, record in records.items():
            array = arrays[name]
            for index in shard_slices(record):
                key = shard_key([part.start // step_ for part, step_ in zip(index, record.shard, strict=True)])
                if key not in finished.get(name, {}):
                    if isinstance(array, StoredArray) and array.record.dtype == record.dtype:
                        yield name, functools.partial(copy_file, array, key)
                    else:
                        yield name, functools.partial(write_piece, name, record, functools.partial(make, name, index))
                done += math.prod(part.stop - part.start for part in index) * DTYPES[record.dtype]
                progress("writing", done, total)

    def log(name: str, files: dict[str, FileRecord]) -> None:
        journal.add(f"{name} {' '.join(files)}", [[name, key, *file] for key, file in files.items()])

    _take_back(partial, step)
    write_blocks(partial, step, records, blocks(), meta, finished, log)
    return partial / f"step_{step}"


def write_huggingface(
    partial: Path, source: Source, *, dtype: str | None, part_bytes: int = PART_BYTES, journal: Journal,
    progress: Progress,
) -> Path:  # fmt: skip
    """A model folder of transformers in `partial`, without tokenizer; `partial`."""
    config = make_model_config(source.foreign.model, source.path)
    kind, table = find_family(config)
    tensors = compose_tensors(config, source.foreign.arrays, FAMILIES[kind])
    planned = {name: Planned(t.shape, to_dtype(dtype) if dtype else t.dtype) for name, t in tensors.items()}
    files = _split_files(planned)
    total, done = sum(_nbytes(plan) for plan in planned.values()), 0

    def write(keys: Sequence[str], name: str, place: FileArray, parts: Sequence[tuple[int, int]]) -> Sequence[str]:
        dim = tensors[name].cut[0] if tensors[name].shape else 0
        for first, last in parts:
            values = tensors[name].read_part(dim, first, last)
            write_values(place, first, values, dim)
        return keys

    def blocks() -> Iterator[Callable[[], Sequence[str]]]:
        nonlocal done
        for file, names in files.items():
            places = create_safetensors(partial / file, {name: planned[name] for name in names})
            for name in names:
                groups = list(group_parts(tensors[name], part_bytes))
                for parts in groups:
                    keys = [f"{name} {first}" for first, _ in parts]
                    if any(key not in journal.done for key in keys):
                        yield functools.partial(write, keys, name, places[name], parts)
                    done += _nbytes(planned[name]) * (parts[-1][1] - parts[0][0]) // groups[-1][-1][1]
                    progress("writing", done, total)

    for keys in run_side_by_side(blocks()):
        for key in keys:
            journal.add(key, True)
    for file in files:
        local_backend.sync_file(partial / file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {n: f for f, names in files.items() for n in names}}
        (partial / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=1))
    theirs = dtype or common_dtype(source.foreign.arrays)
    (partial / CONFIG).write_text(json.dumps(table | {"torch_dtype": theirs}, indent=1))
    if source.kind == "huggingface":
        for name in CARRIED:
            if (source.path / name).is_file():
                (partial / name).write_bytes((source.path / name).read_bytes())
    return partial


def write_original(
    partial: Path, source: Source, *, shards: int, dtype: str | None, part_bytes: int = PART_BYTES, progress: Progress
) -> Path:
    """A mesh-transformer-jax checkpoint in `partial`; the step's folder."""
    foreign = source.foreign
    config = make_model_config(foreign.model, source.path)
    for name in ("config.json", "meta.json"):  # of a conversion that was killed while it was proved
        (partial / name).unlink(missing_ok=True)
    write_gptj(
        partial, config, foreign.arrays, foreign.step, shards=shards, dtype=dtype or common_dtype(foreign.arrays),
        part_bytes=part_bytes, report=lambda done, total: progress("writing", done, total),
    )  # fmt: skip
    return partial / f"step_{foreign.step}"


def prove(source: Foreign, result: Foreign, dtype: str | None, progress: Progress) -> dict[str, str]:
    """The digest of every array, read from both sides block by block; CheckpointError if a single bit differs."""
    if source.arrays.keys() != result.arrays.keys():
        raise CheckpointError(f"the result has other arrays: {sorted(source.arrays.keys() ^ result.arrays.keys())[:5]}")
    total, done = count_bytes(source.arrays, dtype), 0

    def compare(name: str, index: Slices) -> tuple[str, np.ndarray]:
        kind = target_dtype(source.arrays[name], name, dtype)
        wanted = pack(source.arrays[name].read(index).astype(kind, copy=False))
        found = pack(result.arrays[name].read(index))
        if (
            found.dtype == np.float32 != wanted.dtype and wanted.dtype.name in FLOATS
        ):  # a sum of what was written narrow
            wanted = wanted.astype(np.float32)
        if found.dtype != wanted.dtype or not np.array_equal(_bits(found), _bits(wanted)):
            raise CheckpointError(f"{name} at {index}: the result differs from the source; nothing was kept")
        return name, _bits(wanted)

    digests = {name: xxhash.xxh3_128() for name in source.arrays}
    blocks = (
        functools.partial(compare, name, index)
        for name, array in source.arrays.items()
        for index in cut(array.shape, target_dtype(array, name, dtype).itemsize)
    )
    for name, values in run_side_by_side(blocks):
        digests[name].update(values.data)
        done += values.nbytes
        progress("proving", done, total)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _bits(values: np.ndarray) -> np.ndarray:
    """The bytes of an array in C order."""
    return values.reshape(-1).view(np.uint8)


def finish(partial: Path, destination: Place, progress: Progress = lambda *_: None) -> Upload | None:
    """Give a proved result its name, or upload it; what was there before is deleted."""
    if isinstance(destination, RemotePath):
        return _send(partial, destination, progress)
    (partial / JOURNAL).unlink(missing_ok=True)
    local_backend.sync_tree(partial)
    old = destination.with_name(destination.name + ".old")
    if destination.exists():
        os.rename(destination, old)
    os.rename(partial, destination)
    local_backend.sync_folder(destination.parent)
    if old.exists():
        shutil.rmtree(old)
    return None


def _send(partial: Path, destination: RemotePath, progress: Progress) -> Upload:
    """The journal stays behind until all the rest is there, so that an interrupted upload goes on with the same files."""
    done = upload_folder(partial, destination, progress, leave=(JOURNAL,))
    shutil.rmtree(partial)
    return done


def _take_back(partial: Path, step: int) -> None:
    """The step of a conversion that was killed while it was proved or uploaded is a draft again."""
    final, draft = partial / f"step_{step}", local_backend.temporary_folder(partial, step, BLOCKS)
    if final.is_dir() and not draft.exists():
        os.rename(final, draft)
        for name in (local_backend.COMMIT, MANIFEST):
            (draft / name).unlink(missing_ok=True)


def _split_files(planned: Mapping[str, Planned]) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, plan in planned.items():
        if groups[-1] and size + _nbytes(plan) > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _nbytes(plan)
    if len(groups) == 1:
        return {SAFETENSORS: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _nbytes(plan: Planned) -> int:
    return math.prod(plan.shape) * plan.dtype.itemsize


def _find_axes(source: Source) -> dict[str, tuple[str, ...]]:
    if source.kind == "native":
        store, step = find_checkpoint(source.path)
        return {name: record.axes for name, record in store.read_manifest(step).arrays.items()}
    config = make_model_config(source.foreign.model, source.path)
    weights = {name: info.axes for name, info in flatten_names(describe_params(config)).items()}

    def axes_of(name: str, array: Lazy) -> tuple[str, ...]:
        """Moments lie as their weights do."""
        return next(
            (weights[short] for short in weights if name.endswith("/" + short)), ("replicated",) * len(array.shape)
        )

    return {name: axes_of(name, array) for name, array in source.foreign.arrays.items()}
