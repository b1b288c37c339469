# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Shard files equal TensorStore's byte for byte, slices equal NumPy's, and damage is detected and named."""

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from mesh_transformer.checkpoint.arrays import HostSlice, StoredArray, make_metadata, shard_jobs
from mesh_transformer.checkpoint.manifest import ArrayRecord, CheckpointError, array_folder

DTYPES = ("float32", "bfloat16", "bool", "int8", "uint16", "float64")


def make_case(rng: np.random.Generator, dtype: str) -> tuple[ArrayRecord, np.ndarray]:
    """Return an array of up to three dimensions with random shards and chunks, values or zeros, in any memory order."""
    ndim = int(rng.integers(0, 4))
    shape = [int(n) for n in rng.integers(1, 12, ndim)]
    chunk = [int(rng.integers(1, dim + 1)) for dim in shape]
    shard = [int(part * rng.integers(1, 4)) for part in chunk]
    values = rng.standard_normal(shape) * 3 * rng.integers(0, 2)
    values = np.asarray(values, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, order=str(rng.choice(["C", "F"])))
    return ArrayRecord(tuple(shape), dtype, tuple("xyz"[:ndim]), tuple(shard), tuple(chunk)), values


def write(folder, record: ArrayRecord, values: np.ndarray) -> StoredArray:
    array_folder(folder, "x").mkdir(parents=True)
    everything = tuple(slice(0, dim) for dim in record.shape)
    files = {
        key: file
        for _, key, file in (job() for job in shard_jobs(folder, "x", record, [HostSlice(everything, values)]))
    }
    assert sum(file.size for file in files.values()) > values.nbytes
    return StoredArray(folder, "x", record)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_files_equal_those_of_tensorstore(dtype, tmp_path):
    rng, several = np.random.default_rng(DTYPES.index(dtype)), 0
    for trial in range(25):
        record, values = make_case(rng, dtype)
        native = tmp_path / f"native{trial}"
        reference = tmp_path / f"reference{trial}"
        array = write(native, record, values)
        array_folder(reference, "x").mkdir(parents=True)
        spec = {
            "driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array_folder(reference, 'x')}/"},
            "metadata": make_metadata(record), "store_data_equal_to_fill_value": True,
        }  # fmt: skip
        ts.open(spec, open=True, assume_metadata=True).result()[...].write(values).result()
        files = [
            {p.name: p.read_bytes() for p in array_folder(folder, "x").iterdir()} for folder in (native, reference)
        ]
        assert files[0] == files[1], record
        several += len(files[0]) > 1
        for _ in range(4):
            low = [int(rng.integers(0, dim)) for dim in record.shape]
            index = tuple(slice(a, int(rng.integers(a, dim)) + 1) for a, dim in zip(low, record.shape, strict=True))
            np.testing.assert_array_equal(array.read(index), values[index])
    assert several > 5


def test_every_changed_byte_and_every_truncation_is_detected(tmp_path):
    record = ArrayRecord((5, 6), "int8", ("x", "y"), (4, 6), (2, 3))
    values = np.arange(30, dtype=np.int8).reshape(5, 6)
    array = write(tmp_path, record, values)
    file = array_folder(tmp_path, "x") / "c.0.0"
    good, everything = file.read_bytes(), (slice(0, 5), slice(0, 6))
    changed = [bytes([*good[:i], good[i] ^ 255, *good[i + 1 :]]) for i in range(len(good))]
    for data in (*changed, *(good[:size] for size in range(len(good))), good + b"\0"):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"c\.0\.0: damaged or unreadable file of array x: "):
            array.read(everything)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"c\.0\.0: damaged or unreadable file of array x: No such file"):
        array.read(everything)
    np.testing.assert_array_equal(array.read((slice(4, 5), slice(0, 6))), values[4:5])  # the other file is intact
    file.write_bytes(good)
    np.testing.assert_array_equal(array.read(everything), values)
