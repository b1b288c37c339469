# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of the resume rules: each field of the schema states whether a resumed run may change it."""

import pytest

from mesh_transformer.config.field_types import Resume
from mesh_transformer.config.resume_rules import resume_rule


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("run.dir", Resume.FREE),
        ("run.seed", Resume.FIXED),
        ("model.d_model", Resume.FIXED),
        ("model.remat", Resume.FREE),
        ("model.experts.n_experts", Resume.FIXED),
        ("mesh.tensor", Resume.FREE),
        ("mesh.rules.embed", Resume.FREE),
        ("data.train.books.weight", Resume.FIXED),
        ("data.validation.books.path", Resume.FREE),
        ("data.cache_dir", Resume.FREE),
        ("optimizer.learning_rate", Resume.LOGGED),
        ("optimizer.name", Resume.FIXED),
        ("train.steps", Resume.LOGGED),
        ("train.batch_size", Resume.FIXED),
        ("train.batch_ramp_steps", Resume.FIXED),
        ("train.log_grad_noise_scale", Resume.FIXED),
        ("checkpoint.every", Resume.LOGGED),
        ("sample.temperature", Resume.FREE),
        ("serve.slots", Resume.FREE),
        ("evaluate.tasks", Resume.FREE),
        ("track.wandb_project", Resume.FREE),
        ("section.that.is.gone", Resume.FIXED),
    ],
)
def test_rule(path, rule):
    assert resume_rule(path) is rule
