# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Layout patterns: views equal reshapes and transposes in NumPy, slices equal slices, and packing is the inverse."""

import numpy as np
import pytest

from mesh_transformer.convert.layout_views import LayoutView, Packed, parse_pattern
from mesh_transformer.convert.lazy_arrays import InMemory, full_index

D, H, C = 6, 2, 4


def test_patterns_are_parsed():
    assert parse_pattern("embed (3 heads head_dim)") == [["embed"], ["3", "heads", "head_dim"]]
    assert parse_pattern("") == []


def test_torch_linear():
    external = np.arange(H * C * D, dtype=np.float32).reshape(H * C, D)
    view = LayoutView(InMemory(external), "(heads head_dim) embed", ("embed", "heads", "head_dim"), (D, H, C))
    expected = external.reshape(H, C, D).transpose(2, 0, 1)
    np.testing.assert_array_equal(view.read(full_index(view)), expected)
    index = (slice(2, 5), slice(1, 2), slice(0, 3))
    np.testing.assert_array_equal(view.read(index), expected[index])


@pytest.mark.parametrize("component", range(3))
def test_fused_projection(component):
    external = np.arange(D * 3 * H * C, dtype=np.float32).reshape(D, 3 * H * C)
    axes = ("embed", "heads", "head_dim")
    view = LayoutView(InMemory(external), "embed (3 heads head_dim)", axes, (D, H, C), component=component)
    expected = external.reshape(D, 3, H, C)[:, component]
    np.testing.assert_array_equal(view.read(full_index(view)), expected)
    index = (slice(1, 3), slice(0, 1), slice(2, 4))
    np.testing.assert_array_equal(view.read(index), expected[index])


@pytest.mark.parametrize(
    "pattern", ["embed (3 heads head_dim)", "(heads 3 head_dim) embed", "(3 heads head_dim) embed"]
)
def test_packing_is_the_inverse_of_viewing(pattern):
    axes = ("embed", "heads", "head_dim")
    shape = (D, 3 * H * C) if pattern.startswith("embed") else (3 * H * C, D)
    external = InMemory(np.arange(3 * D * H * C, dtype=np.float32).reshape(shape))
    views = [LayoutView(external, pattern, axes, (D, H, C), component=i) for i in range(3)]
    packed = Packed(views, pattern, [axes] * 3)
    assert packed.shape == shape
    bounds = list(packed.slice_bounds(max_bytes=1))
    assert len(bounds) > 1 or pattern.startswith("(3")
    dim = packed.chunking.dim
    found = np.concatenate([packed.read_slice(dim, first, last) for first, last in bounds], axis=dim)
    np.testing.assert_array_equal(found, external.values)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 4\), expected \(4, 3\) for layout 'vocab embed'"):
        LayoutView(InMemory(np.zeros((3, 4))), "vocab embed", ("vocab", "embed"), (4, 3))
    with pytest.raises(ValueError, match=r"the layout .* needs . arrays, got 2"):
        Packed([InMemory(np.zeros(2))] * 2, "(3 embed)", [("embed",)] * 2)
