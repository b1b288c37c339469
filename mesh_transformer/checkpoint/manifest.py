# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: what is in it, digests of every file, and the marker that makes it count.

    step_<N>/manifest.json   format, version, step, arrays (name -> shape, dtype, axes), files (path -> bytes, xxh3-128),
                             versions of the libraries, and meta: whatever the writer wants to keep (configuration, ...)
    step_<N>/COMMIT          bytes and sha256 of manifest.json; written last
    step_<N>/arrays/<name>/  one zarr3 array each (arrays.py)

Nothing in it speaks of a mesh. A byte changed anywhere is found: array data by its crc32c when it is read, every file
by the manifest, the manifest by COMMIT.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from mesh_transformer.checkpoint.arrays import CheckpointError

FORMAT, VERSION = "mesh-transformer checkpoint", 1
MANIFEST, COMMIT, ARRAYS = "manifest.json", "COMMIT", "arrays"
NAME = re.compile(r"(?!\.)[A-Za-z0-9_.~-]+(/(?!\.)[A-Za-z0-9_.~-]+)*")


def check_name(name: str) -> None:
    """Array names are relative paths of plain parts: nothing that could leave the folder."""
    if not NAME.fullmatch(name):
        raise CheckpointError(f"array name {name!r} is not a path of letters, digits, '_', '-', '.' and '~'")


def write_manifest(folder: Path, step: int, arrays: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    """Digest what is in `folder`, write the manifest, then the marker; all of it is on disk when this returns."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "arrays": arrays,
        "files": {path: digest_file(folder / path) for path in list_files(folder)},
        "versions": {name: version(name) for name in ("jax", "tensorstore", "mesh-transformer")},
        "meta": meta,
    }
    data = json.dumps(manifest, indent=1).encode()
    _write(folder / MANIFEST, data)
    _write(folder / COMMIT, json.dumps({"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}).encode())
    for directory, _, _ in os.walk(folder):
        sync_folder(Path(directory))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, proved by the marker. Raises CheckpointError naming the file that is missing or damaged."""
    try:
        commit = json.loads((folder / COMMIT).read_bytes())
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: no such file; this checkpoint was never finished or is damaged") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / COMMIT} is damaged: {error}") from None
    if not isinstance(commit, dict) or commit.keys() != {"bytes", "sha256"}:
        raise CheckpointError(f"{folder / COMMIT} is damaged: not the marker of a checkpoint")
    if commit != {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it does not match {COMMIT}")
    manifest = json.loads(data)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(f"{folder / MANIFEST}: {manifest.get('format')!r} version {manifest.get('version')}; we read {VERSION}")
    for name in manifest["arrays"]:
        check_name(name)
    for path in manifest["files"]:
        check_name(path)
    return manifest


def find_damage(folder: Path, manifest: Mapping[str, Any], *, quick: bool = False, names: set[str] | None = None) -> list[str]:
    """What is wrong with the files of a checkpoint, a line each; `quick` digests only the arrays' metadata files.

    `names` limits it to these arrays' files.
    """
    problems = []
    for path, expected in manifest["files"].items():
        array = array_of(path)
        if names is not None and array not in names:
            continue
        problem = _find_file_damage(folder / path, expected, quick=quick and not path.endswith("zarr.json"))
        if problem:
            problems.append(f"{folder / path} (array {array}) {problem}")
    if not quick:
        extra = set(list_files(folder)) - set(manifest["files"]) - {MANIFEST, COMMIT}
        problems += [f"{folder / path} is not in the manifest" for path in sorted(extra)]
    return problems


def _find_file_damage(path: Path, expected: Mapping[str, Any], *, quick: bool) -> str:
    if path.is_symlink() or not path.is_file():
        return "is a link, not a file" if path.is_symlink() else "is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"has {size:,} bytes instead of {expected['bytes']:,}"
    if not quick and digest_file(path) != expected:
        return "is damaged: its digest is not the manifest's"
    return ""


def array_of(path: str) -> str:
    """The array that a file of the manifest belongs to."""
    inner = path.removeprefix(f"{ARRAYS}/")
    return re.sub(r"/(zarr\.json|c(/.*)?)$", "", inner)


def list_files(folder: Path) -> list[str]:
    """All files below `folder`, as sorted relative paths."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def digest_file(path: Path) -> dict[str, Any]:
    """Size and xxh3-128 of a file, read in pieces."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "xxh3": digest.hexdigest()}


def sync_folder(path: Path) -> None:
    """Make the entries of a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
