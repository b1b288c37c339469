# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A small run folder to sample from, and the program that does."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.config import config_to_dict, parse_config
from mesh_transformer.data.tokenizers import load_tokenizer
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.loading import load_model

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="session")
def save_run(tmp_path_factory):
    """A function that writes a run folder with one checkpoint of a random model, and returns it."""

    def save(**changes):
        folder = tmp_path_factory.mktemp("run")
        table = dict(
            model=dict(n_layers=1, d_model=16, n_heads=2, n_vocab=257, seq_len=2048) | changes,
            train=dict(steps=1, batch_size=1),
            data=dict(train=dict(a=dict(path="a"))),
            sample=dict(max_tokens=12),
        )
        config = parse_config(table, where="test")
        params = jax.jit(make_model(config.model).init)(jax.random.key(0))
        arrays = {f"params/{name}": array for name, array in flatten_names(params).items()}
        axes = {f"params/{name}": info.axes for name, info in flatten_names(describe_params(config.model)).items()}
        store = Store(folder / "checkpoints")
        meta = {"config": config_to_dict(config), "tokenizer": load_tokenizer("bytes").to_json(), "step": 1}
        store.save(1, arrays, axes=axes, meta=meta)
        store.wait()
        return folder

    return save


@pytest.fixture(scope="session")
def run(save_run):
    return save_run()


@pytest.fixture(scope="session")
def model(run):
    return load_model(run)


@pytest.fixture(scope="session")
def device_sample():
    """A function that runs device_sample.py with the given arguments."""

    def call(*arguments):
        command = [sys.executable, str(ROOT / "device_sample.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)

    return call
