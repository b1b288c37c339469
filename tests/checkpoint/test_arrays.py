# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Stored arrays are plain Zarr 3; only the requested parts are read, each once."""

import jax
import numpy as np
import pytest
import tensorstore as ts

from mesh_transformer.checkpoint.arrays import _local_slices, copy_to_host, put_copies
from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.checkpoint.store import Store


@pytest.mark.usefixtures("small_files")
def test_tensorstore_reads_the_arrays(tmp_path, arrays, axes, values):
    store = Store(tmp_path)
    store.save(1, arrays, axes=axes, meta={})
    store.wait()
    for name, value in values.items():
        path = f"{store.folder(1)}/arrays/{name}/"
        array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result()
        assert array.read().result().tobytes() == value.tobytes()
        assert array.domain.labels == axes[name]
        codec = array.codec.to_json()["codecs"][0]
        assert codec["name"] == "sharding_indexed"
        assert [c["name"] for c in codec["configuration"]["codecs"]] == ["bytes", "crc32c"]
        assert [c["name"] for c in codec["configuration"]["index_codecs"]] == ["bytes", "crc32c"]


@pytest.mark.usefixtures("small_files")
def test_a_slice_is_read_without_the_rest(tmp_path, arrays, axes, values):
    store = Store(tmp_path)
    store.save(1, arrays, axes=axes, meta={})
    store.wait()
    name = "params/embed/w"
    record = store.read_manifest(1).arrays[name]
    assert record.shard[0] < 64
    assert record.chunk[0] < record.shard[0]
    last = sorted((store.folder(1) / "arrays" / name).glob("c.*"), key=lambda path: int(path.name.split(".")[1]))[-1]
    data = bytearray(last.read_bytes())
    data[0] ^= 1  # in the first chunk of the last file
    last.write_bytes(data)
    begin = 64 - record.shard[0]
    array = store.open_arrays(1)[name]
    for index in [(slice(0, begin), slice(None)), (slice(begin + record.chunk[0], 64), slice(3, 5))]:
        np.testing.assert_array_equal(array.read(index), values[name][index])
    with pytest.raises(
        CheckpointError,
        match=rf"{last.name}: damaged or unreadable file of array {name}: .*does not match its checksum",
    ):
        array.read((slice(begin, begin + 1), slice(None)))


def test_each_slice_belongs_to_one_device(arrays, values):
    slices = copy_to_host(arrays)
    for name, value in values.items():
        count = np.zeros(value.shape, int)
        for host_slice in slices[name]:
            count[host_slice.index] += 1
            assert host_slice.values.tobytes() == value[host_slice.index].tobytes()
            assert not any(
                np.shares_memory(host_slice.values, np.asarray(s.data)) for s in arrays[name].addressable_shards
            )
        assert (count == 1).all()
    assert len(slices["params/embed/w"]) == 4
    assert len(slices["step"]) == 1


def test_replicas_are_read_once(shardings):
    targets = shardings(2, 2, 2)
    assert {len(group) for group in _local_slices(targets["step"], ()).values()} == {8}
    groups = _local_slices(targets["params/embed/w"], (64, 24))
    assert sorted(groups) == [((16 * i, 16 * i + 16), (0, 24)) for i in range(4)]
    assert {len(group) for group in groups.values()} == {2}
    assert {d for group in groups.values() for p in group for d in p.device_set} == set(jax.devices())


def test_replicas_share_no_memory():
    """Even with an aligned buffer each replica can be donated without changing the others."""
    buffer = np.zeros(4096 + 64, np.uint8)
    begin = -buffer.ctypes.data % 64
    values = buffer[begin : begin + 4096].view(np.float32)
    values[:] = np.arange(1024)
    expected = 2 * values
    single = [jax.sharding.SingleDeviceSharding(device) for device in jax.devices()]
    copies = put_copies(values, single)
    assert len({copy.unsafe_buffer_pointer() for copy in copies}) == 8
    for copy in copies:
        np.testing.assert_array_equal(jax.jit(lambda x: 2 * x, donate_argnums=0)(copy), expected)
