# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Find the folder or file of a model by its name, and reject folders and files of formats that cannot be read.

A name is a local path, a URL, or a repository on the Hugging Face Hub. For the top folder of a repository in the Hub's
cache, the folder of its snapshot is used. readers.py detects the format of a model.
"""

import re
from pathlib import Path

from mesh_transformer.convert.hub import HUB_NAME, download_model
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath, describe_sibling_folders, parse_path

LFS_POINTER = b"version https://git-lfs"
WEIGHT_FILES = re.compile(r".*\.(safetensors|bin|pth|pt|gguf)")
PREFIX = "hf://"  # of a name that is always a repository on the Hub


def find_source(name: str | AnyPath, *, config_only: bool = False) -> AnyPath:
    """Return the folder or file of a model, downloaded first if `name` is a repository on the Hub.

    A name such as org/model or org/model@revision is a repository unless that path, or a local folder org, exists. With
    `config_only`, the only file that is downloaded is config.json.

    Raises:
      CheckpointError: the repository or snapshot is not found, or the path has a format that cannot be read.
      ConfigError: `name` is a repository on the Hub, and huggingface_hub is not installed.
    """
    text = str(name)
    if text.startswith(PREFIX) or _is_repository(text):
        return download_model(text.removeprefix(PREFIX), config_only=config_only)
    path = _find_snapshot(parse_path(name))
    reject_other_formats(path)
    return path


def _is_repository(text: str) -> bool:
    path = Path(text)
    return HUB_NAME.fullmatch(text) is not None and not path.exists() and not path.parent.is_dir()


def _find_snapshot(path: AnyPath) -> AnyPath:
    """Return the snapshot of `main`, or the only snapshot, if `path` is a repository in the Hub's cache; else `path`."""
    snapshots = path / "snapshots"
    if not path.name.startswith("models--") or not snapshots.is_dir():
        return path
    reference = path / "refs" / "main"
    if reference.is_file():
        named = snapshots / reference.read_bytes().decode().strip()
        if named.is_dir():
            return named
    folders = sorted(snapshots.iterdir())
    if len(folders) != 1:
        raise CheckpointError(
            f"{path}: a repository in the Hub's cache with {len(folders)} snapshots; give one of the folders in {snapshots}"
        )
    return folders[0]


def reject_other_formats(path: AnyPath) -> None:
    """Raise CheckpointError, with the fix, for common folders and files that are not models in a supported format."""
    if path.is_file() and not path.name.endswith(".gguf"):
        if WEIGHT_FILES.fullmatch(path.name):
            raise CheckpointError(f"{path}: a file with weights only; give the folder that also has config.json")
        raise CheckpointError(f"{path}: a file in an unknown format; give the folder of a model, or a .gguf file")
    if not path.is_dir():
        return
    entries = {entry.name: entry for entry in path.iterdir()}
    if "adapter_config.json" in entries and "config.json" not in entries:
        raise CheckpointError(
            f"{path}: an adapter without its base model; merge both with merge_and_unload() of peft, and give the folder "
            "of the merged model"
        )
    if "params.json" in entries and any(re.fullmatch(r"consolidated.*\.pth", name) for name in entries):
        raise CheckpointError(
            f"{path}: weights in Meta's original format; use the version of the model for transformers (with config.json)"
        )
    for entry in entries.values():
        _reject_placeholder(entry)


def _reject_placeholder(file: AnyPath) -> None:
    """Raise CheckpointError for a dangling symbolic link, and for a Git LFS pointer instead of a file."""
    if not isinstance(file, Path):
        return
    if file.is_symlink() and not file.exists():
        raise CheckpointError(
            f"{file}: a link to {file.readlink()}, which does not exist; copy the folder with its files (cp -rL), or download "
            "it again"
        )
    if file.is_file() and file.stat().st_size < 1000 and file.read_bytes().startswith(LFS_POINTER):
        raise CheckpointError(f"{file}: a Git LFS pointer instead of the file; run `git lfs pull` in {file.parent}")


def require_existing(path: AnyPath) -> None:
    """Raise CheckpointError, with the names of folders next to `path`, if `path` does not exist."""
    if path.is_dir() or path.is_file():
        return
    raise CheckpointError(
        f"{path}: no such folder, and not the name of a repository (org/model); {describe_sibling_folders(path)}"
    )
