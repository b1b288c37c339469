# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Layout patterns: views equal reshapes and transposes in NumPy, slices equal slices, and packing is the inverse."""

import math

import numpy as np
import pytest

from mesh_transformer.convert.layout_views import Joined, LayoutView, Packed, Part, Split, parse_pattern
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


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("shape", [(), (D,)])
def test_joined_parts_of_unequal_sizes(blocks, shape):
    split = Split(blocks, (2 * C, C, C))
    external = InMemory(np.arange(blocks * 4 * C * math.prod(shape), dtype=np.float32).reshape(-1, *shape))
    by_block = external.values.reshape(blocks, 4 * C, *shape)
    parts = [Part(external, split, i) for i in range(3)]
    for part, rows in zip(parts, (slice(0, 2 * C), slice(2 * C, 3 * C), slice(3 * C, 4 * C)), strict=True):
        expected = by_block[:, rows].reshape(part.shape)
        np.testing.assert_array_equal(part.read(full_index(part)), expected)
        for low, high in ((1, 3), (C - 1, part.shape[0] - 1), (2, 2)):
            np.testing.assert_array_equal(part.read((slice(low, high), *full_index(part)[1:])), expected[low:high])
    axes, pattern = (("heads", "head_dim"), "(heads head_dim)")
    if shape:
        axes, pattern = (("embed", *axes), f"{pattern} embed")
    views = [LayoutView(part, pattern, axes, (*shape, part.shape[0] // C, C)) for part in parts]
    joined = Joined([Packed([view], pattern, [axes]) for view in views], split)
    assert joined.shape == external.shape
    bounds = list(joined.slice_bounds(max_bytes=1))
    assert len(bounds) == (4 if blocks == 1 else blocks)
    for found in ([joined.read_slice(0, *each) for each in bounds], [joined.read_slice(0, 0, joined.shape[0])]):
        np.testing.assert_array_equal(np.concatenate(found), external.values)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"tensor: shape \(7, 2\), expected 8 rows = 2 x \(2 \+ 1 \+ 1\)"):
        Part(InMemory(np.zeros((7, 2))), Split(2, (2, 1, 1)), 0)
    with pytest.raises(ValueError, match=r"parts of \[3, 2\] rows, expected \[3, 1\]"):
        Joined([Packed([InMemory(np.zeros(n))], "embed", [("embed",)]) for n in (3, 2)], Split(1, (3, 1)))
    with pytest.raises(ValueError, match=r"shape \(3, 4\), expected \(4, 3\) for layout 'vocab embed'"):
        LayoutView(InMemory(np.zeros((3, 4))), "vocab embed", ("vocab", "embed"), (4, 3))
    with pytest.raises(ValueError, match=r"the layout .* needs . arrays, got 2"):
        Packed([InMemory(np.zeros(2))] * 2, "(3 embed)", [("embed",)] * 2)
