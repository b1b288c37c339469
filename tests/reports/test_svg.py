# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""SVG: round ticks, distinct labels, series downsampled to their extremes, heat maps of deviations."""

import pytest

from mesh_transformer.reports.svg import MAX_POINTS, Series, downsample, format_number, heat_map, make_axis, plot


def test_ticks_are_round_and_cover_the_data():
    axis = make_axis(0.13, 4.87)
    assert axis.ticks == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert (axis.fraction(axis.low), axis.fraction(axis.high)) == (0.0, 1.0)
    assert make_axis(1e-6, 6e-4).ticks[-1] == pytest.approx(6e-4)
    log = make_axis(0.02, 300.0, log=True)
    assert all(0 <= log.fraction(tick) <= 1 for tick in log.ticks)
    assert 3 <= len(log.ticks) <= 8


def test_numbers_are_short_and_distinct():
    assert [format_number(x) for x in (0, 1234.5, 2e6, 6e-05, 0.5)] == ["0", "1.234k", "2M", "6e-05", "0.5"]


def test_a_long_series_stays_small():
    drawn = plot("t", "u", [Series("s", [(i, float(i % 7)) for i in range(50_000)], "main")])
    assert drawn.count("L") <= 1.1 * MAX_POINTS


def test_a_heat_map_shows_what_is_far_from_even():
    steps = list(range(10))
    drawn = heat_map("t", "u", steps, [[1.0] * 10, [4.0] * 10, [0.0] * 5 + [1.0] * 5, [None] * 10], row_name="expert")
    assert drawn.count('class="more" fill-opacity="1.000"') == drawn.count('class="less" fill-opacity="1.000"') == 1
    assert drawn.count("M") == 10 + 5, "even and unknown ones are left blank"
    large = heat_map("t", "u", list(range(20_000)), [[2.0 + i % 3 for i in range(20_000)]] * 2048, row_name="expert")
    assert len(large) < 100_000
    assert "nothing recorded" in heat_map("t", "u", [], [], row_name="expert")
    assert "nothing recorded" in heat_map("t", "u", [1], [[None]], row_name="expert")


def test_downsampling_retains_ends_extremes_and_gaps():
    points = [(float(i), 1.0 + i % 7) for i in range(5000)]
    points[1234], points[4321] = (1234.0, 99.0), (4321.0, -99.0)
    points[2000:2100] = [(x, None) for x, _ in points[2000:2100]]
    sampled = downsample(points, 500)
    assert 300 < len(sampled) <= 510
    assert {points[0], points[-1], points[1234], points[4321]} <= set(sampled)
    assert any(y is None for x, y in sampled if 2000 <= x < 2100)
    assert [x for x, _ in sampled] == sorted({x for x, _ in sampled})
    assert downsample(points[:500], 500) == points[:500]
