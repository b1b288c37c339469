# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of which configuration fields a resumed run may change."""

import pytest

from mesh_transformer.config import Config, ConfigError, config_to_dict, parse_config
from mesh_transformer.train.resume import check_resume


def make_config(**sections: dict) -> Config:
    table: dict = {
        "model": dict(n_layers=2, d_model=32, n_heads=4, n_vocab=64, seq_len=16),
        "data": {"train": {"numbers": {"path": "made-up"}}},
        "train": dict(steps=40, batch_size=8),
    }
    for name, fields in sections.items():
        table[name] = {**table.get(name, {}), **fields}
    return parse_config(table, where="test")


def resume(config: Config) -> list[str]:
    """Return the notes of a run that was started with the default configuration and resumed with another."""
    return check_resume(config_to_dict(make_config()), config, "runs/test/checkpoints/step_10")


@pytest.mark.parametrize(
    "sections",
    [
        dict(serve=dict(slots=64)),
        dict(sample=dict(temperature=0.1)),
        dict(evaluate=dict(every=5)),
        dict(track=dict(sequences=True)),
        dict(mesh=dict(fsdp=2)),
        dict(model=dict(remat="full")),
        dict(data=dict(cache_dir="elsewhere")),
    ],
    ids=str,
)
def test_fields_without_influence_on_training_may_change(sections):
    assert resume(make_config(**sections)) == []


def test_changed_training_fields_are_logged():
    assert resume(make_config(train=dict(steps=80), optimizer=dict(learning_rate=1e-3))) == [
        f"optimizer.learning_rate = 0.001 (was {make_config().optimizer.learning_rate!r})",
        "train.steps = 80 (was 40)",
    ]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            dict(model=dict(n_layers=3)),
            r"has model\.n_layers = 3, but .*step_10 was trained with model\.n_layers = 2; .*--restart",
        ),
        (dict(train=dict(batch_size=16)), r"train\.batch_size = 16, but .* train\.batch_size = 8"),
        (dict(optimizer=dict(name="lion")), r'optimizer\.name = "lion", but .* optimizer\.name = "adamw"'),
        (dict(model=dict(experts=dict(n_experts=4))), r"has model\.experts\.\w+ = .*, but .* no model\.experts; "),
    ],
    ids=str,
)
def test_fields_that_determine_the_run_must_not_change(sections, message):
    with pytest.raises(ConfigError, match=message):
        resume(make_config(**sections))
