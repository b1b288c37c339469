# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Lazy arrays equal the NumPy operation that they stand for, in every slice, and combine the properties of their parts."""

import ml_dtypes
import numpy as np
import pytest

from mesh_transformer.convert.lazy_arrays import (
    AddBias,
    Concat,
    FileArray,
    Index,
    InMemory,
    LazyArray,
    Stack,
    Sum,
    cast_values,
    full_index,
    to_c_order,
)
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import RemotePath, parse_path

A, B = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
CASES: dict[str, tuple[LazyArray, np.ndarray]] = {
    "concat": (Concat([InMemory(A), InMemory(B)], 1), np.concatenate([A, B], axis=1)),
    "stack": (Stack([InMemory(A), InMemory(B)]), np.stack([A, B])),
    "mixed types": (Stack([InMemory(A), InMemory(B.astype(np.float16))]), np.stack([A, B.astype(np.float16)])),
    "stacked scalars": (Stack([Index(InMemory(A[0]), i) for i in range(6)]), A[0]),
    "sum": (Sum([InMemory(A), InMemory(B)]), A + B),
    "mean": (Sum([InMemory(A), InMemory(A), InMemory(A)], mean=True), A),
    "bias": (AddBias(InMemory(A), InMemory(B[0])), A + B[0]),
    "index": (Index(Stack([InMemory(A), InMemory(B)]), 1), B),
}


@pytest.mark.parametrize("name", CASES)
def test_slices_equal_numpy(name):
    array, expected = CASES[name]
    assert array.shape == expected.shape
    assert array.dtype == expected.dtype == np.float32
    index = tuple(slice(dim // 3, dim - dim // 4) for dim in array.shape)
    np.testing.assert_array_equal(array.read(full_index(array)), expected)
    np.testing.assert_array_equal(array.read(index), expected[index])


class Chunked(InMemory):
    """An array in memory that reports remote chunks."""

    def __init__(self, values: np.ndarray):
        super().__init__(values)
        self.is_local = False

    @property
    def read_granularity(self) -> tuple[int, ...]:
        return (2, 3)


def test_combinations_report_location_and_granularity():
    remote = Chunked(A)
    assert Index(remote, 0).read_granularity == (3,)
    assert not Index(remote, 0).is_local
    for array in (Concat([InMemory(A), remote], 0), Stack([InMemory(A), remote]), Sum([InMemory(A), remote])):
        assert not array.is_local
        assert set(array.read_granularity) == {1}
    assert not FileArray(parse_path("s3://bucket/file"), 0, (2,), A.dtype).is_local


def test_file_arrays(tmp_path):
    path = tmp_path / "values"
    path.write_bytes(bytes(8) + A.tobytes())
    array = FileArray(path, 8, A.shape, A.dtype)
    assert array.is_local
    np.testing.assert_array_equal(array.read(full_index(array)), A)
    np.testing.assert_array_equal(array.read((slice(1, 4), slice(2, 5))), A[1:4, 2:5])
    with pytest.raises(ValueError, match="truncated"):
        FileArray(path, 16, A.shape, A.dtype).read(full_index(array))


def test_an_object_is_requested_in_large_blocks(monkeypatch):
    """Rows of an array are requested in blocks that stay in the array; a large slice is one request."""
    values = np.arange(3 * 2**20, dtype=np.float32).reshape(-1, 2**10)  # 12 MiB
    stored = bytes(8) + values.tobytes() + bytes(8)
    requests: list[tuple[int, int]] = []

    def read_range(_: RemotePath, start: int, stop: int) -> bytes:
        requests.append((start, stop))
        return stored[start:stop]

    monkeypatch.setattr(RemotePath, "read_range", read_range)
    array = FileArray(parse_path("s3://bucket/large-blocks"), 8, values.shape, values.dtype)
    for first in range(0, len(values), 96):
        index = (slice(first, min(first + 96, len(values))), slice(5, 1000))
        np.testing.assert_array_equal(array.read(index), values[index])
    assert requests == [(8 + (i << 22), 8 + ((i + 1) << 22)) for i in range(3)]
    index = (slice(3, 1500), slice(0, 2**10))
    np.testing.assert_array_equal(array.read(index), values[index])
    assert requests[3:] == [(8 + 3 * 2**12, 8 + 1500 * 2**12)]


@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((40, 50), (1, 0)),
        ((300, 1100), (1, 0)),
        ((2, 300, 70), (0, 2, 1)),
        ((9, 150, 130), (2, 0, 1)),
        ((150, 9, 130), (1, 2, 0)),
        ((3, 150, 2, 130), (2, 3, 0, 1)),
    ],
)
def test_c_order_of_a_transposed_array(dtype, shape, order):
    stored = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]
    for values in (stored.transpose(order), stored.transpose(order)[1:, ..., :-1], stored[..., None, :].T):
        packed = to_c_order(values)
        assert packed.flags.c_contiguous
        assert (packed.shape, packed.dtype) == (values.shape, values.dtype)
        assert packed.tobytes() == values.tobytes()


def test_arrays_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="cannot concatenate"):
        Concat([InMemory(A), InMemory(A[:, :2])], 0)
    with pytest.raises(ValueError, match="cannot stack"):
        Stack([InMemory(A), InMemory(A[:2])])
    with pytest.raises(ValueError, match="cannot add"):
        Sum([InMemory(A), InMemory(A[:2])])


def test_c_order_keeps_the_shape():
    for values in (np.array(3, np.int32), np.arange(6).reshape(2, 3).T, np.zeros((0, 2)), np.arange(4)[::2]):
        packed = to_c_order(values)
        assert packed.flags.c_contiguous
        assert packed.shape == values.shape
        np.testing.assert_array_equal(packed, values)


def test_cast_refuses_values_that_become_infinite():
    half = np.dtype(np.float16)
    values = np.array([1.0, np.inf, np.nan, 60000.0], np.float32)
    np.testing.assert_array_equal(cast_values(values, half, "w"), values.astype(half))
    with pytest.raises(CheckpointError, match="w: the value -1e\\+06 is too large for float16; pass --dtype bfloat16"):
        cast_values(np.array([1.0, -1e6], np.float32), half, "w")
    with pytest.raises(CheckpointError, match="w: the value 999424 is too large for float16"):
        cast_values(np.array([[1e6]], ml_dtypes.bfloat16), half, "w")
