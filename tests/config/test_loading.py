# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Configurations are read strictly, explained when wrong, and printed so that they load again."""

import copy
import dataclasses
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

import mesh_transformer.config as config_package
from mesh_transformer.config import (
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
    config_to_dict,
    config_to_toml,
    find_preset_changes,
    load_config,
    parse_config,
)
from mesh_transformer.config.presets import PRESETS

ROOT = Path(__file__).parents[2]
TINY = """
[model]
n_layers = 2
d_model = 16
n_heads = 4
n_vocab = 50
seq_len = 8
[data.train.Books]
path = "books"
[train]
steps = 10
batch_size = 4
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


# override -> what the message must contain: path, value, and what would be right
BAD_VALUES = {
    "model.n_layer=2": ["model.n_layer is not a field", "did you mean 'n_layers'?"],
    "modle.n_layers=2": ["modle is not a field", "did you mean 'model'?"],
    "train.stpes=2": ["train.stpes is not a field", "'steps'"],
    "train.xyzzy=2": ["train.xyzzy is not a field", "expected one of: steps, batch_size"],
    "data.train.Books.wieght=2.0": ["data.train.Books.wieght is not a field", "'weight'"],
    "data.train.Books.weight=-1.0": ["data.train.Books.weight = -1.0", "greater than 0"],
    "data.train.str.path=3": ["data.train.str.path = 3", "valid string"],
    "data.train.web.weight=2.0": ["data.train.web.path is missing"],
    "data.train=5": ["data.train = 5", "a table"],
    "run=5": ["run = 5", "a table"],
    "model.n_layers='two'": ['model.n_layers = "two"', "valid integer"],
    "model.n_layers=2.0": ["model.n_layers = 2.0", "valid integer"],
    "model.n_layers=true": ["model.n_layers = true", "valid integer"],
    "model.n_layers=0": ["model.n_layers = 0", "greater than 0"],
    "model.n_layers=-3": ["model.n_layers = -3", "greater than 0"],
    "optimizer.learning_rate='1e-4'": ['optimizer.learning_rate = "1e-4"', "valid number"],
    "optimizer.learning_rate=-1e-4": ["optimizer.learning_rate = -0.0001", "greater than 0"],
    "optimizer.learning_rate=nan": ["optimizer.learning_rate = nan", "not supported; use a finite number"],
    "optimizer.clip_norm=inf": ["optimizer.clip_norm = inf", "not supported; use a finite number"],
    "optimizer.beta1=1.0": ["optimizer.beta1 = 1.0", "less than 1"],
    "optimizer.name='adamW'": [
        'optimizer.name = "adamW"',
        "'adamw', 'adafactor', 'lion', 'muon' or 'sgd'",
        "did you mean 'adamw'?",
    ],
    "run.seed=2020-01-01": ["run.seed = 2020-01-01", "dates"],
    "run.seed=-1": ["run.seed = -1", "greater than or equal to 0"],
    "model.norm='layer_norm'": [
        'model.norm = "layer_norm"',
        "'layernorm', 'rmsnorm', 'gemma-rmsnorm', 'scalenorm',",
        "did you mean 'layernorm'?",
    ],
    "model.tied_embeddings='no'": ['model.tied_embeddings = "no"', "valid boolean"],
    "model.tied_embeddings=0": ["model.tied_embeddings = 0", "valid boolean"],
    "model.attention_pattern=['global', 'locale']": ['model.attention_pattern.1 = "locale"', "did you mean 'local'?"],
    "model.attention_pattern='global'": ['model.attention_pattern = "global"', "a list"],
    "model.attention_pattern=[]": ["model: attention_pattern=[]", "at least one element"],
    "model.n_heads=3": ["model: d_model=16 is not a multiple of n_heads=3", "set d_head"],
    "model.n_kv_heads=3": ["model: n_heads=4 is not a multiple of n_kv_heads=3"],
    "model.rope_dims=4": ["model: rope_dims=4 has no effect", 'positions="learned"', "remove it"],
    "model.preset='gpt-j-6b'": ['model.preset = "gpt-j-6b"', "did you mean 'gptj-6b'?", "presets: gpt2,"],
    "model.preset='zzz'": ['model.preset = "zzz"', "presets: gpt2,"],
    "model.experts={n_experts=4, n_experts_per_token=5}": [
        "model.experts: n_experts_per_token=5 exceeds n_experts=4",
        "lower it",
    ],
    "model.experts={n_experts=4, capacity_factor=0.0}": ["model.experts: capacity_factor=0", "remove it"],
    "model.experts={n_experts=4, capacity_factor=-1.0}": [
        "model.experts.capacity_factor = -1.0",
        "greater than or equal",
    ],
    "model.experts={n_experts=4, layer_interval=3}": [
        "model: n_layers=2 is not a multiple of 3",
        "experts.layer_interval=3",
    ],
    'model.experts={n_experts=4, routing="expert-choice"}': [
        "is not causal",
        "set allow_noncausal=true",
        'routing="token-choice"',
    ],
    'model.experts={n_experts=4, routing="expert-choice", allow_noncausal=true}': [
        "requires capacity_factor and eval_capacity_factor"
    ],
    "model.experts={n_experts=4, allow_noncausal=true}": [
        'allow_noncausal=true has no effect with routing="token-choice"; remove it'
    ],
    'model.experts={n_experts=4, dropped_tokens="skip"}': ["model.experts.dropped_tokens", "'zero' or 'gated-input'"],
    "model.experts={n_experts_per_token=1}": ["model.experts.n_experts is missing"],
    "model.experts={n_experts=4, top_k=2}": ["model.experts.top_k is not a field"],
    "mesh.data=0": ["mesh: data=0", "-1 for all"],
    "mesh.data=-2": ["mesh.data = -2", "greater than or equal to -1"],
    "mesh.fsdp=0": ["mesh.fsdp = 0", "greater than 0"],
    "mesh.rules.embed=3": ["mesh.rules.embed = 3: must be the name of a mesh axis or a list of names"],
    "train.grad_accum_steps=3": ["train: batch_size=4 is not a multiple of grad_accum_steps=3"],
    "train.batch_ramp_from=2": ["train: batch_ramp_from=2 requires batch_ramp_steps of at least 1, not 0"],
    "train.batch_ramp_steps=5": ["train: batch_ramp_steps=5 requires batch_ramp_from; set it"],
    "optimizer.warmup_steps=10": ["optimizer.warmup_steps=10 must be less than train.steps=10"],
    "optimizer.end_learning_rate=1.0": ["optimizer.end_learning_rate=1.0 exceeds optimizer.learning_rate=0.0006"],
    "data.train={}": ["data.train is empty", "[data.train.NAME]"],
    "sample.prompts='hello'": ['sample.prompts = "hello"', "a list"],
    "sample.top_p=0.0": ["sample.top_p = 0.0", "greater than 0"],
    "model.d_model.x=1": ["--set model.d_model.x", "model.d_model = 16 is not a section"],
    "train.steps": ["--set train.steps: expected section.field=value"],
    "run.dir=runs/one": ["--set run.dir=runs/one", "strings need quotes", "'run.dir=\"runs/one\"'"],
    "train.steps=5\nrun.seed=7": ["not a TOML value"],
    "model.n_layers=[" + "1," * 5000 + "]": ["model.n_layers = [1, 1", "..."],
}


@pytest.mark.parametrize("override", BAD_VALUES, ids=lambda override: override[:40])
def test_bad_value_is_explained(tiny, override):
    assert load_config(tiny).train.steps == 10
    with pytest.raises(ConfigError) as caught:
        load_config(tiny, [override])
    message = str(caught.value)
    for part in BAD_VALUES[override]:
        assert part in message
    assert "\n" in override or len(message.splitlines()) == 1
    assert len(message) < 1200
    assert str(tiny) in message or message.startswith("--set ")


BAD_FILES = {
    "[model\nn_layers = 2": ["not valid TOML", "line 1"],
    "[train]\nsteps = 1\nsteps = 2": ["not valid TOML", "overwrite"],
    "[model]\nn_layers = 2\n[data.train.a]\npath = 'x'\n[train]\nbatch_size = 1": [
        "model.d_model is missing",
        "train.steps is missing",
    ],
    "": ["model is missing", "data is missing", "train is missing"],
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_file_is_explained(tmp_path, text):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert all(part in str(caught.value) for part in BAD_FILES[text])
    assert all(line.startswith(str(path)) for line in str(caught.value).splitlines())


def test_file_that_is_none(tiny):
    with pytest.raises(ConfigError, match=r"tiiny\.toml: no such file; did you mean .*tiny\.toml\?"):
        load_config(tiny.with_name("tiiny.toml"))
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tiny.parent)
    tiny.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tiny)


def test_same_name_for_validation_and_held_out_part(tiny):
    with pytest.raises(
        ConfigError, match=r"data\.validation\.Books has the same name as the held-out part of data\.train\.Books"
    ):
        load_config(tiny, ["data.holdout_one_in=10", "data.validation.Books.path='b'"])


def test_overrides_are_merged_before_validation(tiny):
    config = load_config(
        tiny,
        ["model.n_heads=5", "model.d_model=25", "train.steps=20", "mesh.rules.embed=''", "data.train.web.path='w'"],
    )
    assert (config.model.n_heads, config.model.head_dim, config.train.steps) == (5, 5, 20)
    assert dict(config.mesh.rules) == {"embed": ""}
    assert set(config.data.train) == {"Books", "web"}
    assert load_config(tiny, ["train.steps=20", "train.steps=30"]).train.steps == 30


def test_run_folder_follows_the_file_name(tiny):
    assert load_config(tiny).run.dir == "runs/tiny"
    assert load_config(tiny, ["run.dir='elsewhere'"]).run.dir == "elsewhere"


def test_config_is_frozen_and_its_model_hashable(tiny):
    config = load_config(tiny)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3  # pyright: ignore
    assert hash(config.model) == hash(load_config(tiny).model)


def test_parsing_leaves_its_input_alone(tiny):
    table = {
        "model": {"preset": "gpt2"},
        "data": {"train": {"a": {"path": "x"}}},
        "train": {"steps": 1, "batch_size": 1},
        "run": {},
    }
    before = copy.deepcopy(table)
    parse_config(table, where="here")
    assert table == before


def make_preset_run(name: str, **changes) -> Config:
    model = {"preset": name, **changes}
    table = {"model": model, "data": {"train": {"a": {"path": "x"}}}, "train": {"steps": 1, "batch_size": 1}}
    return parse_config(table, where=name)


def load_text(tmp_path, text: str) -> Config:
    path = tmp_path / "again.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_round_trips(tmp_path, name):
    run = make_preset_run(name)
    assert find_preset_changes(run.model) == {}
    assert load_text(tmp_path, config_to_toml(run)) == run
    assert load_text(tmp_path, config_to_toml(run, mark_changes=True)) == run


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_file_in_configs_round_trips(tmp_path, path):
    run = load_config(path)
    assert load_text(tmp_path, config_to_toml(run)) == run
    assert load_text(tmp_path, config_to_toml(run, mark_changes=True)) == run


def test_awkward_text_round_trips(tiny, tmp_path):
    prompts = ['quote " and \\ and # = [x]', "two\nlines\ttab\r", "\x7f\x00\x1b", "naïve 漢字 🙂", "'''", '"""']
    table = config_to_dict(load_config(tiny))
    table["sample"]["prompts"] = prompts
    table["data"]["train"] = {"a b.c": {"path": "x"}, "ü": {"path": ""}, "plain-name_1": {"path": "C:\\data"}}
    table["mesh"]["rules"] = {"embed": ["fsdp", "tensor"], "odd key": ""}
    table["optimizer"] |= {"learning_rate": 1e22, "eps": 5e-324, "end_learning_rate": 1e-5}
    run = parse_config(table, where="here")
    assert list(run.sample.prompts) == prompts
    assert load_text(tmp_path, config_to_toml(run)) == run


def test_printing_marks_what_differs_from_the_defaults(tiny):
    lines = config_to_toml(
        load_config(tiny, ["train.log_every=3", "model.n_kv_heads=2", "optimizer.beta1=0.9"]), mark_changes=True
    ).splitlines()
    marked = {line.split(" =")[0]: line.split("# default: ")[1] for line in lines if "# default: " in line}
    assert marked == {"log_every": "10", "n_kv_heads": "unset", "dir": '""'}
    assert "beta1 = 0.9" in lines


def test_dict_of_a_section_leaves_out_what_is_unset(tiny):
    model = config_to_dict(load_config(tiny).model)
    assert model["n_layers"] == 2
    assert "d_ff" not in model
    assert model["attention_pattern"] == ["global"]


def test_preset_changes_are_found():
    model = ModelConfig(
        **{
            **{k: tuple(v) if isinstance(v, list) else v for k, v in PRESETS["gpt3-small"].items()},
            "preset": "gpt3-small",
            "n_layers": 2,
        }
    )
    assert find_preset_changes(model) == {"n_layers": 2}
    few = make_preset_run("mixtral-8x7b", experts={"n_experts": 4, "capacity_factor": 1.0})
    assert find_preset_changes(few.model) == {"experts": {"n_experts": 4, "n_experts_per_token": 2}}


def allowed(kind) -> bool:
    """int float bool str Literal, X | None, tuple[X, ...], dict[str, X], and sections."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in (int, float, bool, str, types.NoneType):
        return True
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return all(allowed(hints[field.name]) for field in dataclasses.fields(kind))
    if origin is typing.Literal:
        return all(isinstance(choice, str) for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return all(allowed(argument) for argument in arguments)
    if origin is tuple:
        return len(arguments) == 2 and arguments[1] is Ellipsis and allowed(arguments[0])
    if origin is dict:
        return arguments[0] is str and (allowed(arguments[1]) or arguments[1] == str | list[str])
    return False


def test_fields_have_types_that_a_file_can_hold():
    assert allowed(Config)
    assert not allowed(complex)
    assert not allowed(dict[int, str])


def test_all_names_of_the_package_exist():
    assert all(hasattr(config_package, name) for name in config_package.__all__)
    assert issubclass(ConfigError, ValueError)


def test_a_shipped_config_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.toml", "configs/quickstart.toml"):
        assert load_config(name) == load_config(ROOT / "configs" / "quickstart.toml")
    with pytest.raises(ConfigError, match="quickstar: no such file"):
        load_config("quickstar")
    Path("quickstart.toml").write_text("[model]\npreset = 1\n")
    with pytest.raises(ConfigError, match=r"model\.preset"):
        load_config("quickstart.toml")  # a file in the working directory comes first


def test_reading_a_config_does_not_import_jax(tiny):
    """A mistake is reported before any device is touched."""
    load = f"from mesh_transformer.config import load_config; load_config({str(tiny)!r})"
    program = f"import sys; {load}; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_mesh_rules_take_text_or_lists():
    assert MeshConfig(rules={"embed": "", "batch": ["data", "fsdp"]}).rules == {"embed": "", "batch": ["data", "fsdp"]}
