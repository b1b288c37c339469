# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare the arrays of the source and the result of a conversion bit by bit."""

import functools

import numpy as np
import xxhash

from mesh_transformer.checkpoint.bounded_pool import run_bounded
from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.import_plan import WEIGHT_DTYPES, ImportPlan, target_dtype
from mesh_transformer.convert.lazy_arrays import cast_values, to_c_order
from mesh_transformer.convert.progress import ByteCounter, Progress
from mesh_transformer.convert.slicing import slices_of_bytes
from mesh_transformer.storage.errors import CheckpointError


def verify_bits(source: ImportPlan, result: ImportPlan, dtype: str | None, progress: Progress) -> dict[str, str]:
    """Read every array of both checkpoints, compare them bit by bit and return the digest of each array.

    Source weights are cast to `dtype` unless it is None. Raises CheckpointError if a bit differs.
    """
    if source.arrays.keys() != result.arrays.keys():
        different = sorted(source.arrays.keys() ^ result.arrays.keys())
        raise CheckpointError(
            f"arrays in only one of the source and the result: {different[:5]}; the result was deleted. This is a bug in the "
            "conversion, please report it"
        )
    counter = ByteCounter("verifying", source.nbytes(dtype), progress)
    sources, results = source.values, result.values

    def compare(name: str, index: Slices) -> tuple[str, np.ndarray]:
        target = target_dtype(sources[name], name, dtype)
        expected = to_c_order(cast_values(sources[name].read(index), target, name))
        actual = to_c_order(results[name].read(index))
        if actual.dtype == np.float32 != expected.dtype and expected.dtype.name in WEIGHT_DTYPES:
            expected = expected.astype(np.float32)  # reading the result sums arrays of `dtype` in float32
        if actual.dtype != expected.dtype or not np.array_equal(_bits(actual), _bits(expected)):
            bounds = ", ".join(f"{part.start}:{part.stop}" for part in index)
            raise CheckpointError(
                f"{name}[{bounds}]: the result differs from the source; the result was deleted. Check the disk, then run the "
                "conversion again"
            )
        return name, _bits(expected)

    digests = {name: xxhash.xxh3_128() for name in sources}
    blocks = (
        functools.partial(compare, name, index)
        for name, array in sources.items()
        for index in slices_of_bytes(array.shape, target_dtype(array, name, dtype).itemsize)
    )
    for name, values in run_bounded(blocks):
        digests[name].update(values.data)
        counter.add(values.nbytes)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _bits(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1).view(np.uint8)
