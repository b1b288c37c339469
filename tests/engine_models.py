# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Random models and prompts for tests of the generation engines."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.shapes import describe_params

BASE = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_vocab=97, seq_len=96)
DEVIATIONS = {"scale": 0.1, "table": 1.0, "w_tokens": 0.4, "w_head": 0.4, "w_positions": 0.4}


def make_model_and_params(seed=0, **changes):
    """Return a config and params with large weights, so that the most probable token depends on the whole context."""
    config = dataclasses.replace(BASE, **changes)
    rng = np.random.default_rng(seed)

    def random_array(name, shape):
        return jnp.asarray(rng.normal(name == "scale", DEVIATIONS.get(name, 0.25), shape).astype(np.float32))

    return config, {
        module: {name: random_array(name, info.shape) for name, info in arrays.items()}
        for module, arrays in describe_params(config).items()
    }


def random_prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, BASE.n_vocab, length).tolist() for length in lengths]
