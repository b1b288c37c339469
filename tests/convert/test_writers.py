# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Conversions in many slices equal conversions in one; chunks in an object store are downloaded once."""

import collections

import pytest
from reference_models import CASES, make_model_folder, make_random_arrays

from mesh_transformer.checkpoint import arrays, chunk_grid, manifest, zarr_sharding
from mesh_transformer.convert import slicing
from mesh_transformer.convert.bit_check import verify_bits
from mesh_transformer.convert.gptj.reader import read_model
from mesh_transformer.convert.import_plan import ImportPlan, PlannedArray, make_model_config
from mesh_transformer.convert.layout_views import Packed
from mesh_transformer.convert.progress import no_progress
from mesh_transformer.convert.readers import open_checkpoint
from mesh_transformer.convert.writers import WriteOptions, write_gptj_v1, write_huggingface, write_native
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import parse_path
from mesh_transformer.storage.resume_log import open_staging_log

OPTIONS = WriteOptions(slice_bytes=3000)
MTJ_CONFIG = dict(layers=12, d_model=16, n_heads=4, n_vocab=24, norm="layernorm", pe="rotary", pe_rotary_dims=2, seq=8)


@pytest.fixture
def small_slices(monkeypatch):
    """Chunks, files and slices of some kilobytes, so that small matrices are divided as large ones are."""
    monkeypatch.setattr(chunk_grid, "MAX_CHUNK_BYTES", 1000)
    monkeypatch.setattr(slicing, "MIN_SHARD_BYTES", 2000)


def write(kind, plan, folder, *, shards=1):
    """Write without verification; return the path of the result."""
    with open_staging_log(folder, {}) as log:
        match kind:
            case "gptj-v1":
                return write_gptj_v1(folder, plan, OPTIONS, shards=shards)
            case "native":
                return write_native(folder, plan, {"config": {"model": plan.model}}, log, OPTIONS)
            case _:
                return write_huggingface(folder, plan, log, OPTIONS)


def has_several_chunks(plan: ImportPlan) -> bool:
    return any(
        1 < part < dim
        for array in plan.values.values()
        for part, dim in zip(array.record.chunk, array.shape, strict=True)
    )


@pytest.fixture(params=["local", "remote"])
def location(request, monkeypatch):
    """Where native checkpoints appear to be. From a remote one, rows are written in parts."""
    monkeypatch.setattr(arrays.StoredArray, "is_local", request.param == "local")
    return request.param


@pytest.mark.usefixtures("small_slices", "location")
@pytest.mark.parametrize("name", CASES)
def test_round_trip_in_slices(name, tmp_path):
    make_model_folder(tmp_path / "external", name)
    external = open_checkpoint(tmp_path / "external")
    written = write("native", external.plan, tmp_path / "native")
    native = open_checkpoint(tmp_path / "native")
    assert written == native.path
    assert has_several_chunks(native.plan)
    back = write("huggingface", native.plan, tmp_path / "back")
    verify_bits(external.plan, open_checkpoint(back).plan, None, no_progress)


def make_plan() -> ImportPlan:
    """Return a model in memory that mesh-transformer-jax can hold in four shards."""
    model = read_model(MTJ_CONFIG)
    config = make_model_config(model, "test")
    axes = {f"params/{name}": info.axes for name, info in flatten_names(describe_params(config)).items()}
    planned = {name: PlannedArray(array, axes[name]) for name, array in make_random_arrays(config).items()}
    return ImportPlan(config, model, planned, 0)


def array_name(path: str) -> str:
    return path.rpartition("/")[0].partition("/arrays/")[2]


@pytest.mark.usefixtures("small_slices")
def test_remote_chunks_are_read_once(location, tmp_path, monkeypatch):
    write("native", make_plan(), tmp_path / "native")
    plan = open_checkpoint(tmp_path / "native").plan
    reads = collections.Counter()
    original = zarr_sharding._read_checked

    def count(file, offset, values, what):
        if what.startswith("chunk"):
            reads[zarr_sharding.os.readlink(f"/proc/self/fd/{file}"), offset] += 1
        return original(file, offset, values, what)

    monkeypatch.setattr(zarr_sharding, "_read_checked", count)
    for kind, shards in (("huggingface", 1), ("gptj-v1", 4)):
        reads.clear()
        write(kind, plan, tmp_path / kind, shards=shards)
        # A chunk of several layers is read once per layer; such matrices are small.
        large = {key: n for key, n in reads.items() if plan.values[array_name(key[0])].record.chunk[0] == 1}
        assert len(large) > 50
        expect_once = kind == "gptj-v1" or location == "remote"
        assert (set(large.values()) == {1}) == expect_once, kind


def test_location_of_the_source_decides_the_dimension_of_slices(tmp_path):
    record = manifest.ArrayRecord((64, 32), "float32", ("embed", "vocab"), (64, 32), (8, 32))
    for folder, dim in ((tmp_path, 0), (parse_path("s3://bucket/run"), 1)):
        stored = arrays.StoredArray(folder, "w", record)
        assert Packed([stored], "vocab embed", [record.axes]).chunking.dim == dim


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("shards", [1, 4])
def test_mtj_checkpoints_in_slices(shards, tmp_path):
    in_memory = make_plan()
    write("native", in_memory, tmp_path / "native")
    for name, plan in (("memory", in_memory), ("native", open_checkpoint(tmp_path / "native").plan)):
        folder = tmp_path / f"v1-{name}"
        write("gptj-v1", plan, folder, shards=shards)
        found = open_checkpoint(folder, folder / "config.json")
        verify_bits(plan, found.plan, None, no_progress)


@pytest.mark.usefixtures("small_slices")
def test_native_copy_has_the_same_files_and_refuses_a_damaged_source(tmp_path):
    first = write("native", make_plan(), tmp_path / "native")
    second = write("native", open_checkpoint(tmp_path / "native").plan, tmp_path / "copy")
    files = sorted(path.relative_to(first) for path in (first / "arrays").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in (second / "arrays").rglob("*") if path.is_file())
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    victim = next(path for path in sorted((first / "arrays").rglob("c.*")) if path.stat().st_size > 1000)
    data = bytearray(victim.read_bytes())
    data[500] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{victim.name}: damaged"):
        write("native", open_checkpoint(tmp_path / "native").plan, tmp_path / "again")
