# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The library of the stress tests: preloaded modules, distances in units in the last place, differences of checkpoints."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from mesh_transformer.scripts.stress import fault_injection
from mesh_transformer.scripts.stress.fault_injection import compare_checkpoints, count_ulps

from mesh_transformer.checkpoint.store import Store


@pytest.mark.parametrize("name", fault_injection.PRELOAD)
def test_preloaded_modules_exist(name):
    assert importlib.util.find_spec(name) is not None  # the fork server ignores modules that it cannot import


def test_ulps():
    one = np.float32(1)
    assert count_ulps(one, np.nextafter(one, np.float32(2))) == 1
    assert count_ulps(np.float32(0.0), np.float32(-0.0)) == 0
    tiny = np.nextafter(np.float32(0), one)
    assert count_ulps(tiny, -tiny) == 2
    assert count_ulps(np.array([1, 7]), np.array([1, 4])) == 3


def test_checkpoints_are_compared_bit_by_bit(tmp_path):
    arrays = {"a": jnp.ones(3), "b": jnp.full(2, 4.0)}
    changed = {"a": arrays["a"], "b": arrays["b"].at[1].set(np.nextafter(np.float32(4), np.float32(5)))}
    for name, saved in (("left", arrays), ("same", arrays), ("changed", changed), ("fewer", {"a": arrays["a"]})):
        store = Store(tmp_path / name)
        store.save(1, saved, axes=dict.fromkeys(saved, ("embed",)), meta={})
        store.wait()
    assert compare_checkpoints(tmp_path / "left", tmp_path / "same", 1) == (1, 2, 0, "", 0, 0.0)
    diff = compare_checkpoints(tmp_path / "left", tmp_path / "changed", 1)
    assert (diff.n_different, diff.first, diff.ulps) == (1, "b", 1)
    assert diff.relative == pytest.approx(2.0**-23)
    assert compare_checkpoints(tmp_path / "left", tmp_path / "fewer", 1).n_different == 1
