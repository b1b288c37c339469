# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A model of another format is converted once, found again, and converted again when it changes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mesh_transformer.config import parse_model
from mesh_transformer.convert import logit_check
from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.convert.huggingface.reader import find_family
from mesh_transformer.convert.import_plan import make_model_config
from mesh_transformer.convert.model_cache import CACHE, find_model
from mesh_transformer.storage.errors import CheckpointError

MODEL = dict(n_layers=1, d_model=8, n_heads=2, n_vocab=264, seq_len=16)


@pytest.fixture
def external(tmp_path, monkeypatch):
    """A GPT-2 folder of random weights; the cache is in the folder of the test."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    config = make_model_config(MODEL, "test")
    folder = tmp_path / "tiny-gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(find_family(config)[1]))
    shapes = {"wte": (264, 8), "wpe": (16, 8), "h.0.attn.c_attn": (8, 24), "h.0.attn.c_proj": (8, 8)}
    shapes |= {"h.0.mlp.c_fc": (8, 32), "h.0.mlp.c_proj": (32, 8)}
    shapes |= dict.fromkeys(("h.0.ln_1", "h.0.ln_2", "ln_f"), (8,))
    biases = {"h.0.attn.c_attn": 24, "h.0.attn.c_proj": 8, "h.0.mlp.c_fc": 32, "h.0.mlp.c_proj": 8}
    biases |= dict.fromkeys(("h.0.ln_1", "h.0.ln_2", "ln_f"), 8)
    rng = np.random.default_rng(0)
    weights = {
        f"transformer.{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    weights |= {f"transformer.{name}.bias": np.zeros(size, np.float32) for name, size in biases.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_folder_is_converted_once_and_again_when_it_changes(external):
    lines: list[str] = []
    store, step = find_model(external, log=lines.append)
    assert parse_model(store.read_meta(step)["config"]["model"], where="test").d_model == 8
    assert "converting to a native checkpoint, once, in" in lines[0]
    again, _ = find_model(str(external), log=lines.append)
    assert str(again.root) == str(store.root)
    assert "using the converted checkpoint in" in lines[-1]
    weights = load_file(external / "model.safetensors")
    weights["transformer.wte.weight"] += 1
    save_file(weights, external / "model.safetensors")
    changed, _ = find_model(external)
    assert str(changed.root) != str(store.root)
    assert find_model(store.root)[0].root == store.root, "a native checkpoint is used as it is"


def test_a_folder_named_like_a_step_is_converted(external):
    folder = external.rename(external.with_name("step_1000"))
    store, step = find_model(folder)
    assert parse_model(store.read_meta(step)["config"]["model"], where="test").d_model == 8


def test_a_conversion_into_the_cache_does_not_start_transformers(external, monkeypatch):
    ran: list[str] = []

    def run_library(*_):
        ran.append("transformers")
        raise CheckpointError("not run")

    monkeypatch.setattr(logit_check.library_logits, "unavailable_reason", lambda *_: "")
    monkeypatch.setattr(logit_check, "run_library", run_library)
    convert(ConversionOptions(source=external, destination=external.parent / "explicit"))
    assert ran, "a conversion by the command compares with transformers"
    ran.clear()
    find_model(external)
    assert not ran


def test_a_failed_conversion_leaves_nothing_that_is_used(external):
    table = json.loads((external / "config.json").read_text())
    (external / "config.json").write_text(json.dumps(table | {"n_layer": 2}))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"missing: transformer\.h\.1"):
            find_model(external)
