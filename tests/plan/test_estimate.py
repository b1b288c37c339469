# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The estimate of encoders and decoders against the paper's table of FLOPs per sequence."""

import pytest

from mesh_transformer.config import parse_config
from mesh_transformer.plan.estimate import estimate_training

# Switch (2101.03961), table 9, forward; there of 512 tokens and a target, here of 512 and 114.
PUBLISHED = {
    "t5-v1.1-base": 124e9,
    "t5-v1.1-large": 425e9,
    "t5-v1.1-xxl": 6.3e12,
    "switch-base-128": 124e9,
    "switch-large-128": 425e9,
    "switch-xxl": 6.3e12,
    "switch-c": 890e9,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_per_sequence_are_the_papers(name):
    table = {
        "model": {"preset": name},
        "data": {"train": {"a": {"path": "x"}}},
        "train": {"steps": 1, "batch_size": 64},
    }
    measured = estimate_training(parse_config(table, where=name), "local")
    assert measured.flops / 3 / 64 == pytest.approx(PUBLISHED[name], rel=0.15)
