# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of another program, seen as arrays of ours; how each of them is put together, and that none is left over."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.lazy_arrays import Lazy, Stack
from mesh_transformer.model.params import STACK, ParamInfo, flatten_names
from mesh_transformer.model.transformer import describe_params

PREFIX = "params/"  # of weights among a checkpoint's arrays
FLOATS = ("float32", "bfloat16", "float16")  # what weights can be


class Foreign(NamedTuple):
    """What another program's checkpoint holds, nothing of it read yet."""

    model: dict[str, Any]  # keys of [model] in our configuration
    arrays: Mapping[str, Lazy]  # "params/transformer/..." and, where there is one, optimizer state
    step: int
    tokenizer: str | None  # what data.tokenizer would be
    notes: tuple[str, ...] = ()  # what a person should know of the conversion


class Leaf(NamedTuple):
    """One of our arrays, or one layer of it, that a format has to find."""

    name: str  # "attention/w_q", "w_tokens", "encoder/attention/w_q": without the stack and the layer
    layer: int | None
    axes: tuple[str, ...]  # without "layers"
    shape: tuple[int, ...]


def make_model_config(model: Mapping[str, Any], where: object) -> ModelConfig:
    """The configuration of a model; CheckpointError with the reason if there can be none."""
    try:
        return TypeAdapter(ModelConfig).validate_json(json.dumps(dict(model)))
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{where}: not a model of ours: {reasons}") from None


def describe_leaves(config: ModelConfig) -> dict[str, list[Leaf]]:
    """The leaves that make up each of our arrays, in the order of its first dim."""
    return {
        PREFIX + name: _split_layers(name, info, config)
        for name, info in flatten_names(describe_params(config)).items()
    }


def assemble(config: ModelConfig, find: Callable[[Leaf], Lazy], where: object) -> dict[str, Lazy]:
    """Our arrays, each leaf as `find` gives it (KeyError: not there; ValueError: not of that shape).

    CheckpointError lists everything that is missing, misshapen or no floats.
    """
    arrays: dict[str, Lazy] = {}
    problems: list[str] = []
    for name, leaves in describe_leaves(config).items():
        rows: list[Lazy] = []
        for leaf in leaves:
            try:
                row = find(leaf)
                if row.dtype.name not in FLOATS:
                    raise TypeError(f"{leaf.name} is {row.dtype.name}, where weights are {', '.join(FLOATS)}")
                if row.shape != leaf.shape:
                    raise ValueError(f"{leaf.name}: shape {row.shape}, where the configuration says {leaf.shape}")
                rows.append(row)
            except KeyError as error:
                problems.append(f"missing: {error.args[0]}")
            except ValueError as error:
                problems.append(f"misshapen: {error}")
            except TypeError as error:
                problems.append(f"of a wrong type: {error}")
        if len(rows) == len(leaves):
            arrays[name] = rows[0] if leaves[0].layer is None else Stack(rows)
    check(problems, where)
    return arrays


def check(problems: Sequence[str], where: object) -> None:
    """CheckpointError with all problems, each once; nothing if there are none."""
    if problems:
        raise CheckpointError(f"{where} does not fit its configuration:\n  " + "\n  ".join(dict.fromkeys(problems)))


def check_all_used(found: set[str], used: set[str], ignored: Callable[[str], bool], where: object) -> None:
    """CheckpointError with every array of the other program that no array of ours was made of."""
    check([f"unexpected: {name}" for name in sorted(found - used) if not ignored(name)], where)


def _split_layers(name: str, info: ParamInfo, config: ModelConfig) -> list[Leaf]:
    short = name.removeprefix("transformer/")
    if info.axes[:1] != (STACK,):
        return [Leaf(short, None, info.axes, info.shape)]
    encoder, _, inside = short.rpartition(f"{STACK}/")  # "encoder/", or nothing
    block, inner = inside.split("/", 1)
    first, period = int(block.removeprefix("block_")), len(config.pattern)
    layers = info.shape[0] * period
    return [Leaf(encoder + inner, i, info.axes[1:], info.shape[1:]) for i in range(first, layers, period)]
