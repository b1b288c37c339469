# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Arrays on disk are plain Zarr 3; what is read is no more than what is needed, each part once."""

import jax
import numpy as np
import pytest
import tensorstore as ts

from mesh_transformer.checkpoint.arrays import _local_slices, copy_to_host, put_copies
from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.checkpoint.store import Store


@pytest.mark.usefixtures("small_files")
def test_any_reader_of_zarr_reads_it(tmp_path, arrays, axes, values):
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
    for index in [(slice(0, begin), slice(None)), (slice(begin + record.chunk[0], 64), slice(3, 5))]:
        np.testing.assert_array_equal(store.read_slice(1, name, index), values[name][index])
    with pytest.raises(
        CheckpointError, match=rf"{last.name}: damaged or unreadable, a file of {name}: .*another checksum"
    ):
        store.read_slice(1, name, (slice(begin, begin + 1), slice(None)))


def test_each_slice_belongs_to_one_device(arrays, values):
    pieces = copy_to_host(arrays)
    for name, value in values.items():
        seen = np.zeros(value.shape, int)
        for piece in pieces[name]:
            seen[piece.index] += 1
            assert piece.values.tobytes() == value[piece.index].tobytes()
            assert not any(np.shares_memory(piece.values, np.asarray(s.data)) for s in arrays[name].addressable_shards)
        assert (seen == 1).all()
    assert len(pieces["params/embed/w"]) == 4
    assert len(pieces["step"]) == 1


def test_replicas_are_read_once(shardings):
    places = shardings(2, 2, 2)
    assert {len(group) for group in _local_slices(places["step"], ()).values()} == {8}
    groups = _local_slices(places["params/embed/w"], (64, 24))
    assert sorted(groups) == [((16 * i, 16 * i + 16), (0, 24)) for i in range(4)]
    assert {len(group) for group in groups.values()} == {2}
    assert {d for group in groups.values() for p in group for d in p.device_set} == set(jax.devices())


def test_replicas_share_no_memory():
    """Even of a buffer that is aligned as JAX likes it: each can be donated without the others noticing."""
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
