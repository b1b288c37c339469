# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A small state with every kind of array, sharded over a mesh and stored in many small files."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mesh_transformer.checkpoint import chunk_grid

SPECS = {
    "params/embed/w": PartitionSpec(("fsdp", "tensor")),
    "params/layers/w_q": PartitionSpec(None, "fsdp", "tensor"),
    "params/layers/b": PartitionSpec(None, "tensor"),
    "opt_state/mu/embed/w": PartitionSpec("fsdp", "tensor"),
    "guard/window": PartitionSpec(),
}


def make_values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42], np.float32)
    odd = np.append(odd, np.array([0x7FC12345, 0xFFA00001], np.uint32).view(np.float32))  # NaNs that carry bits
    return {
        "params/embed/w": rng.standard_normal((64, 24), np.float32),
        "params/layers/w_q": rng.standard_normal((3, 16, 40), np.float32).astype(ml_dtypes.bfloat16),
        "params/layers/b": rng.standard_normal((3, 8), np.float32).astype(np.float16),
        "opt_state/mu/embed/w": np.zeros((64, 24), np.float32),
        "opt_state/count": np.array(41, np.int32),
        "guard/window": odd,
        "guard/seen": rng.random(7) < 0.5,
        "guard/key": rng.integers(0, 2**32, 2, np.uint32),
        "guard/none": np.zeros((0, 4), np.float32),
        "step": np.array(0, np.int32),
    }


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_grid, "MAX_CHUNK_BYTES", 256)
    monkeypatch.setattr(chunk_grid, "MAX_SHARD_BYTES", 1024)


@pytest.fixture(scope="session")
def values() -> dict[str, np.ndarray]:
    return make_values()


@pytest.fixture(scope="session")
def axes(values: Mapping[str, np.ndarray]) -> dict[str, tuple[str, ...]]:
    return {name: ("layers", "embed", "heads")[: value.ndim] for name, value in values.items()}


@pytest.fixture(scope="session")
def shardings() -> Callable[..., dict[str, NamedSharding]]:
    """`shardings(data, fsdp, tensor)` returns the sharding of each array on a mesh of these sizes."""

    def make(*dims: int) -> dict[str, NamedSharding]:
        mesh = jax.make_mesh(
            dims,
            ("data", "fsdp", "tensor"),
            axis_types=(jax.sharding.AxisType.Auto,) * 3,
            devices=jax.devices()[: int(np.prod(dims))],
        )
        return {name: NamedSharding(mesh, SPECS.get(name, PartitionSpec())) for name in make_values()}

    return make


@pytest.fixture(scope="session")
def arrays(values: Mapping[str, np.ndarray], shardings: Callable[..., Any]) -> dict[str, jax.Array]:
    targets = shardings(2, 2, 2)
    return {name: jax.device_put(value, targets[name]) for name, value in values.items()}


@pytest.fixture(scope="session")
def like(arrays: Mapping[str, jax.Array]) -> Callable[..., dict[str, jax.ShapeDtypeStruct]]:
    """`like(shardings)` returns the argument of `restore`."""

    def make(targets: Mapping[str, NamedSharding]) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=targets[name]) for name, a in arrays.items()}

    return make


@pytest.fixture(scope="session")
def digests() -> Callable[..., dict[str, str]]:
    """`digests(arrays)` is equal for two states if and only if all bits are."""
    return lambda arrays: {name: hashlib.sha256(np.asarray(a).tobytes()).hexdigest() for name, a in arrays.items()}
