# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Conversions of arrays that are read and written in many parts give what those in one part do, of chunks fetched once."""

import collections

import pytest
from reference_models import CASES
from test_gptj import OLD, make_arrays
from test_huggingface import SILENT, make_folder

from mesh_transformer.checkpoint import arrays, manifest, zarr_sharding
from mesh_transformer.convert import lazy_arrays, reshard
from mesh_transformer.convert.gptj.reader import read_model
from mesh_transformer.convert.import_plan import Foreign, make_model_config
from mesh_transformer.storage.paths import parse_path

PART_BYTES = 3000


@pytest.fixture
def small(monkeypatch):
    """Chunks, files and parts of some kilobytes, so that small matrices are cut as large ones are."""
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 1000)
    monkeypatch.setattr(slices, "MIN_BLOCK_BYTES", 2000)


def write(kind, source, folder, **options):
    """A conversion without its proof, in parts; where its result is."""
    folder.mkdir()
    options |= dict(dtype=None, part_bytes=PART_BYTES, progress=SILENT)
    if kind == "gptj-v1":
        return reshard.write_original(folder, source, **options)
    options["journal"] = reshard.Journal(folder / "journal", {})
    if kind == "native":
        return reshard.write_native(folder, source, {"config": {"model": source.foreign.model}}, **options)
    return reshard.write_huggingface(folder, source, **options)


def is_cut(found) -> bool:
    return any(
        1 < part < dim for array in found.values() for part, dim in zip(array.record.chunk, array.shape, strict=True)
    )


@pytest.fixture(params=["here", "in a store"])
def place(request, monkeypatch):
    """Where checkpoints of ours seem to be: far away, rows are written in pieces."""
    monkeypatch.setattr(lazy, "is_here", lambda array: request.param == "here")
    return request.param


@pytest.mark.usefixtures("small", "place")
@pytest.mark.parametrize("name", CASES)
def test_there_and_back_in_parts(name, tmp_path):
    make_folder(tmp_path / "theirs", name)
    theirs = reshard.open_source(tmp_path / "theirs")
    ours = write("native", theirs, tmp_path / "ours")
    source = reshard.open_source(tmp_path / "ours")
    assert ours == source.path
    assert is_cut(source.foreign.arrays)
    folder = write("huggingface", source, tmp_path / "back")
    reshard.prove(theirs.foreign, reshard.open_source(folder).foreign, None, SILENT)


def make_source(folder) -> reshard.Source:
    """A model that mesh-transformer-jax can hold in four shards, in memory."""
    model = read_model(OLD)
    held = make_arrays(make_model_config(model, "test"))
    return reshard.Source("huggingface", folder, Foreign(model, held, 0, None), {}, {})


def name_of(path: str) -> str:
    return path.rpartition("/")[0].partition("/arrays/")[2]


@pytest.mark.usefixtures("small")
def test_no_chunk_is_fetched_twice(place, tmp_path, monkeypatch):
    write("native", make_source(tmp_path), tmp_path / "ours")
    source = reshard.open_source(tmp_path / "ours")
    read = collections.Counter()
    original = zarr_sharding._read_checked

    def count(file, offset, values, what):
        if what.startswith("chunk"):
            read[zarr_sharding.os.readlink(f"/proc/self/fd/{file}"), offset] += 1
        return original(file, offset, values, what)

    monkeypatch.setattr(shard_files, "_read_checked", count)
    for kind, options in (("huggingface", {}), ("gptj-v1", dict(shards=4))):
        read.clear()
        write(kind, source, tmp_path / kind, **options)
        # A chunk of several layers, whose matrices are small then, is read for each.
        large = {key: n for key, n in read.items() if source.foreign.arrays[name_of(key[0])].record.chunk[0] == 1}
        assert len(large) > 50
        once = kind == "gptj-v1" or place != "here"
        assert (set(large.values()) == {1}) == once, kind


def test_where_it_is_decides(tmp_path):
    record = manifest.ArrayRecord((64, 32), "float32", ("embed", "vocab"), (64, 32), (8, 32))
    for folder, dim in ((tmp_path, 0), (parse_path("s3://bucket/run"), 1)):
        assert (
            lazy_arrays.Composed([arrays.StoredArray(folder, "w", record)], "vocab embed", [record.axes]).cut[0] == dim
        )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shards", [1, 4])
def test_original_checkpoints_in_parts(shards, tmp_path):
    theirs = make_source(tmp_path)
    write("native", theirs, tmp_path / "ours")
    for name, source in (("theirs", theirs), ("ours", reshard.open_source(tmp_path / "ours"))):
        folder = tmp_path / f"v1-{name}"
        write("gptj-v1", source, folder, shards=shards)
        found = reshard.open_source(folder, folder / "config.json")
        reshard.prove(source.foreign, found.foreign, None, SILENT)


@pytest.mark.usefixtures("small")
def test_a_copy_has_the_files_of_its_source_and_finds_a_damaged_one(tmp_path):
    first = write("native", make_source(tmp_path), tmp_path / "ours")
    second = write("native", reshard.open_source(tmp_path / "ours"), tmp_path / "copy")
    files = sorted(path.relative_to(first) for path in (first / "arrays").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in (second / "arrays").rglob("*") if path.is_file())
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    victim = next(path for path in sorted((first / "arrays").rglob("c.*")) if path.stat().st_size > 1000)
    data = bytearray(victim.read_bytes())
    data[500] ^= 1
    victim.write_bytes(data)
    with pytest.raises(reshard.CheckpointError, match=rf"{victim.name}: damaged"):
        write("native", reshard.open_source(tmp_path / "ours"), tmp_path / "again")
