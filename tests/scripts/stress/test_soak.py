# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The soak test's own functions."""

import pytest
from mesh_transformer.scripts.stress import soak


def test_slope_of_memory():
    assert soak.fit_slope([(0.0, 10), (1.0, 12), (2.0, 14)]) == pytest.approx(2)
    assert soak.fit_slope([(0.0, 10), (5.0, 10)]) == 0
    assert soak.fit_slope([(1.0, 10), (1.0, 20)]) == 0


def test_result_as_text():
    assert soak.format_result(soak.Result()).endswith("nothing was lost")
    text = soak.format_result(soak.Result(problems=["a loss differs"]))
    assert text.endswith("PROBLEM: a loss differs")
