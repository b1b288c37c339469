# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Sources of models: folders, files and cached repositories are found; other formats are rejected with a fix."""

import pytest

from mesh_transformer.convert.sources import find_source, require_existing
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import parse_path

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14484731808\n"


def write(folder, *names, text="{}"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(text)
    return folder


def test_an_adapter_needs_its_base_model(tmp_path):
    folder = write(tmp_path / "adapter", "adapter_config.json", "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter: an adapter without its base model; merge both with"):
        find_source(folder)
    assert find_source(write(folder, "config.json")) == folder


def test_meta_format_is_named(tmp_path):
    folder = write(tmp_path / "llama", "params.json", "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="weights in Meta's original format; use the version"):
        find_source(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    folder = write(tmp_path / "clone", "config.json")
    write(folder, name, text=POINTER)
    with pytest.raises(CheckpointError, match=rf"{name}: a Git LFS pointer instead of the file; run `git lfs pull` in"):
        find_source(folder)


def test_a_dead_link_is_named(tmp_path):
    folder = write(tmp_path / "copy", "config.json")
    (folder / "model.safetensors").symlink_to("../../blobs/4d7a")
    with pytest.raises(CheckpointError, match=r"model.safetensors: a link to ../../blobs/4d7a, which does not exist"):
        find_source(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "consolidated.00.pth"])
def test_a_file_of_weights_is_not_a_model(tmp_path, name):
    with pytest.raises(CheckpointError, match=rf"{name}: a file with weights only; give the folder that also has"):
        find_source(write(tmp_path, name) / name)


def test_the_top_folder_of_a_cached_repository_is_its_snapshot(tmp_path):
    top = tmp_path / "models--org--name"
    first = write(top / "snapshots" / "aaa", "config.json")
    assert find_source(top) == first
    second = write(top / "snapshots" / "bbb", "config.json")
    with pytest.raises(
        CheckpointError, match="a repository in the Hub's cache with 2 snapshots; give one of the folders in"
    ):
        find_source(top)
    write(top / "refs", "main", text="bbb")
    assert find_source(top) == second


def test_a_missing_folder_is_named_with_its_neighbors(tmp_path):
    write(tmp_path / "runs" / "quickstart", "a")
    path = tmp_path / "runs" / "quikstart"
    assert find_source(path) == path
    with pytest.raises(CheckpointError, match=r"quikstart: no such folder.*folders in .*runs: quickstart"):
        require_existing(parse_path(path))
