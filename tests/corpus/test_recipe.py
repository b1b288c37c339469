# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Recipes are read strictly: errors name the field and the closest valid name, renamed keys are rejected."""

from pathlib import Path

import pytest

from mesh_transformer.config import ConfigError
from mesh_transformer.corpus.recipe import filters_for, load_recipe, resolve_epochs

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "corpus").glob("*.toml"))
GOOD = """
[corpus]
name = "x"
[components.a]
kind = "text"
paths = ["a"]
license = "MIT"
[components.b-2]
kind = "man"
paths = ["b"]
license = "MIT"
[[filters]]
kind = "length"
exclude_components = ["b-2"]
[[filters]]
kind = "gopher-quality"
components = ["b-2"]
"""


def load(tmp_path, text, overrides=()):
    path = tmp_path / "corpus.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    recipe = load_recipe(path)
    assert len(recipe.components) >= 8
    assert all(component.license and component.consent and component.origin for component in recipe.components.values())


def test_filters_run_on_their_components(tmp_path):
    recipe = load(tmp_path, GOOD)
    assert [config.kind for _, config in filters_for(recipe, "a")] == ["length"]
    assert [(number, config.kind) for number, config in filters_for(recipe, "b-2")] == [(1, "gopher-quality")]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "text"', 'kind = "txet"', "components.a.kind = .*did you mean 'text'"),
        (
            'exclude_components = ["b-2"]',
            'exclude_componnets = ["b-2"]',
            "exclude_componnets is not a field; did you mean 'exclude_comp",
        ),
        ('kind = "gopher-quality"', 'kind = "gofer-quality"', "filters.1.kind = .*did you mean 'gopher-quality'"),
        ('kind = "length"', "", "filters.0.kind is missing"),
        (
            'exclude_components = ["b-2"]',
            'exclude_components = ["b"]',
            "filters.0.exclude_.*: 'b' is not declared; declared: a, b-2",
        ),
        ('license = "MIT"\n[[filters]]', "[[filters]]", "components.b-2.license is missing"),
        ("[components.a]", '[components."a/b"]', "components.a/b: invalid name; use letters"),
        ('paths = ["a"]', 'paths = ["a"]\nweight = 1.0', "components.b-2 has no weight, but components.a has"),
        ('paths = ["a"]', 'paths = ["a"]\nepochs = 0.0', "components.a.epochs = 0.0"),
    ],
)
def test_invalid_fields_are_reported(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, GOOD.replace(old, new, 1))


def test_weights_need_the_size_of_the_mixture(tmp_path):
    text = GOOD.replace('paths = ["a"]', 'paths = ["a"]\nweight = 1.0').replace(
        'paths = ["b"]', 'paths = ["b"]\nweight = 3.0'
    )
    with pytest.raises(ConfigError, match="set both, or neither"):
        load(tmp_path, text)
    recipe = load(tmp_path, text, ["mixture.bytes=4000"])
    assert resolve_epochs(recipe, {"a": 1000, "b-2": 1000}) == {"a": 1.0, "b-2": 3.0}
    with pytest.raises(ConfigError, match=r"components.b-2.weight = 3.0 requires 0.0 MB.*6.0 epochs.*max_epochs = 4.0"):
        resolve_epochs(recipe, {"a": 1000, "b-2": 500})


@pytest.mark.parametrize(
    ("new", "old", "message"),
    [
        ("[[filters]]", "[[steps]]", "steps was renamed: use filters"),
        ('license = "MIT"', 'licence = "MIT"', "components.a.licence was renamed: use components.a.license"),
        ('kind = "text"', 'kind = "source"', 'components.a.kind = "source" was renamed: use "code"'),
        (
            'paths = ["b"]',
            'paths = ["b"]\npieces_kb = 1',
            "components.b-2.pieces_kb was renamed: use components.b-2.chunk_kb",
        ),
        ("exclude_components", "without", "filters.0.without was renamed: use filters.0.exclude_components"),
    ],
)
def test_renamed_keys_are_refused_with_the_new_name(tmp_path, new, old, message):
    assert new in GOOD
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, GOOD.replace(new, old))
