# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Renamed keys are rejected in files with the new name, and translated in what version 1.0 stored."""

import dataclasses
import tarfile
import tomllib
import typing
from pathlib import Path

import pytest

from mesh_transformer.config import Config, ConfigError, load_config, parse_config, parse_model, parse_stored
from mesh_transformer.config.renamed import RUN, find_renamed, translate_stored
from mesh_transformer.mesh import RULES

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "golden" / "version_1_0.tar.gz"


def stored_config(name: str) -> dict:
    with tarfile.open(STORED) as archive:
        member = archive.extractfile(f"./{name}/config.toml")
        assert member
        return tomllib.loads(member.read().decode())


def field_at(path: str):
    """Return true for a dotted path that is a field of the schema; keys of dictionaries are skipped."""
    kind: typing.Any = Config
    for part in path.split("."):
        if not dataclasses.is_dataclass(kind):
            return True
        hint = typing.get_type_hints(kind).get(part)
        if hint is None:
            return False
        kind = next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None)
    return True


@pytest.mark.parametrize("old", RUN.keys)
def test_new_names_are_fields_and_old_ones_are_not(old):
    parent = old.rpartition(".")[0]
    if parent == "mesh.rules":
        assert RUN.keys[old] in RULES
        assert old.rpartition(".")[2] not in RULES
    else:
        assert field_at(f"{parent}.{RUN.keys[old]}")
        assert not field_at(old)


@pytest.mark.parametrize("old", RUN.keys)
def test_an_old_key_is_refused_with_the_new_name(old):
    value = '""' if old.startswith("mesh.rules") else "1"
    with pytest.raises(ConfigError, match=rf"{old} was renamed: use {old.rpartition('.')[0]}\.{RUN.keys[old]}"):
        load_config(ROOT / "configs" / "tiny.toml", [f"{old}={value}"])


@pytest.mark.parametrize(("key", "values"), RUN.values.items())
def test_an_old_value_is_refused_with_the_new_one(key, values):
    for old, new in values.items():
        override = f'{key}="{old}"' if not key.endswith(".*") else f'{key.removesuffix(".*")}=["{old}"]'
        if "experts" in key:
            override = f'model.experts={{n_experts=2, {key.rpartition(".")[2]}="{old}"}}'
        with pytest.raises(ConfigError, match=f'"{old}" was renamed: use "{new}"'):
            load_config(ROOT / "configs" / "tiny.toml", [override])


@pytest.mark.parametrize("name", ["decoder", "encoder_decoder"])
def test_a_stored_config_of_version_1_0_is_read(name):
    table = stored_config(name)
    with pytest.raises(ConfigError, match="was renamed"):
        parse_config(table, where=name)
    config = parse_stored(table, where=name)
    assert not find_renamed(translate_stored(table), RUN)
    assert parse_model(table["model"], where=name) == config.model
    if name == "decoder":
        assert config.train.grad_accum_steps == 2
        assert config.model.positions == "rope-half"
        assert config.model.rope_scaling
        assert config.model.rope_scaling.original_seq_len == 16
        assert config.model.experts
        assert (config.model.experts.routing, config.model.experts.dropped_tokens) == ("token-choice", "gated-input")
        assert config.mesh.rules == {"activation_seq": "", "activation_embed": "fsdp", "router": ""}
        assert config.checkpoint.resume == "latest-valid"
        assert config.evaluate.num_fewshot_by_task == {"rte": 2}
    else:
        assert (config.data.noise_density, config.data.mean_noise_span_length) == (0.2, 2.0)
        assert config.model.n_encoder_layers == 1


def test_todays_config_is_not_changed():
    config = load_config(ROOT / "configs" / "quickstart.toml")
    table = tomllib.loads((ROOT / "configs" / "quickstart.toml").read_text())
    assert translate_stored(table) == table
    assert parse_stored(table, where="quickstart") == config
