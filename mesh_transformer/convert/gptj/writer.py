# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Write native weights as a checkpoint of mesh-transformer-jax with any number of shards; reader.py has the format."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mesh_transformer.checkpoint.bounded_pool import run_side_by_side
from mesh_transformer.checkpoint.local_backend import write_synced
from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.gptj.reader import (
    DTYPES,
    NORMS,
    NPZ_FILES,
    POSITIONS,
    Leaf,
    indivisible_dims,
    list_leaves,
    read_model,
)
from mesh_transformer.convert.import_plan import (
    ImportPlan,
    WeightSpec,
    describe_weights,
    list_weights,
    make_model_config,
    raise_problems,
)
from mesh_transformer.convert.layout_views import Packed
from mesh_transformer.convert.lazy_arrays import InMemory, LazyArray, to_c_order, to_dtype
from mesh_transformer.convert.progress import ByteCounter, Progress, no_progress
from mesh_transformer.convert.slicing import SLICE_BYTES
from mesh_transformer.storage.direct_io import DirectFile


def make_external_config(config: ModelConfig, shards: int) -> dict[str, Any]:
    """Return the JSON configuration of a model for mesh-transformer-jax, without keys for training and storage.

    The configuration is read back and compared with the model. CheckpointError lists the fields in which they differ,
    so a field that the format cannot represent is never dropped silently.
    """
    raise_problems("the model cannot be divided into shards", indivisible_dims(config, shards))
    problems: list[str] = []
    pe = {native: external for external, native in POSITIONS.items()}.get(config.positions)
    norm = {native: external for external, native in NORMS.items()}.get((config.norm, config.norm_bias))
    compared = _describe(config)
    if pe is None:
        problems.append(f"positions = {config.positions!r}, supported: {list(POSITIONS.values())}")
    if norm is None:
        supported = sorted({native for native, _ in NORMS.values()})
        problems.append(f"norm = {config.norm!r} with norm_bias = {config.norm_bias}, supported: {supported}")
        compared -= {"norm", "norm_bias"}
    external = dict(
        layers=config.n_layers,
        d_model=config.d_model,
        n_heads=config.n_heads,
        n_vocab=config.n_vocab,
        norm=norm or "layernorm",
        pe=pe or "rotary",
    )
    return external
