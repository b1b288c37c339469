# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Import plan of a checkpoint: each native array with its lazy values and its logical axes.

A reader computes the plan when it opens a checkpoint; writers and checks receive it. The reader of an external format
supplies a function from `WeightSpec` to lazy array, with which `assemble` builds the native arrays.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter, ValidationError

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.lazy_arrays import Index, LazyArray, Stack, to_dtype
from mesh_transformer.model.params import STACK, ParamInfo, flatten_names, split_scan
from mesh_transformer.model.shapes import describe_params

PREFIX = "params/"  # of the names of weights among the arrays of a checkpoint
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
MAX_PROBLEMS = 50  # listed in one error message


class PlannedArray(NamedTuple):
    """One native array of the result."""

    array: LazyArray
    axes: tuple[str, ...]  # logical axis of each dimension


class ImportPlan(NamedTuple):
    """A checkpoint of any format as native configuration and native arrays, whose values have not been read."""

    config: ModelConfig
    model: dict[str, Any]  # keys of [model] in a configuration file
    arrays: Mapping[str, PlannedArray]  # "params/transformer/..." and, if present, optimizer state
    step: int
    tokenizer: str | None = None  # value for data.tokenizer
    notes: tuple[str, ...] = ()  # shown to the user after the conversion
    is_rounded: bool = False  # whether weights were dequantized and rounded to the model's dtype

    @property
    def values(self) -> dict[str, LazyArray]:
        """Return the arrays by name, without their axes."""
        return {name: planned.array for name, planned in self.arrays.items()}

    def weights_only(self) -> "ImportPlan":
        """Return the plan without optimizer state and counters."""
        return self._replace(arrays={name: a for name, a in self.arrays.items() if name.startswith(PREFIX)})

    def weight_dtype(self) -> str:
        """Return the dtype that all weights share; if they differ, float32, which represents the values of all."""
        dtypes = {array.dtype.name for name, array in self.values.items() if name.startswith(PREFIX)}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def nbytes(self, dtype: str | None) -> int:
        """Return the size of all values in bytes, after the weights are cast to `dtype` unless it is None."""
        return sum(math.prod(a.shape) * target_dtype(a, name, dtype).itemsize for name, a in self.values.items())


class WeightSpec(NamedTuple):
    """A native weight that a reader has to find: an array, or one layer of a stacked array."""

    name: str  # without the stack and the layer, for example "attention/w_q", "w_tokens" or "encoder/attention/w_q"
    layer: int | None
    axes: tuple[str, ...]  # without "layers"
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name} of layer {self.layer}"

    def expert(self) -> "WeightSpec":
        """Return the specification of a single expert of a weight with a leading expert dimension."""
        return self._replace(axes=self.axes[1:], shape=self.shape[1:])


def target_dtype(array: LazyArray, name: str, dtype: str | None) -> np.dtype:
    """Return the dtype of an array in the result: weights are cast to `dtype`, everything else is unchanged."""
    return to_dtype(dtype) if dtype and name.startswith(PREFIX) else array.dtype


def make_model_config(model: Mapping[str, Any], where: object) -> ModelConfig:
    """Return the configuration of a model. Raise CheckpointError with the reasons if it is invalid."""
    try:
        return TypeAdapter(ModelConfig).validate_json(json.dumps(dict(model)))
    except ValidationError as error:
        reasons = "; ".join(
            ": ".join(filter(None, [".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")]))
            for e in error.errors()
        )
        raise CheckpointError(f"{where}: describes a model that is not supported: {reasons}") from None


def describe_weights(config: ModelConfig) -> dict[str, list[WeightSpec]]:
    """Return {array name: its weights}: a single weight, or the weight of each layer in the order of the first dimension."""
    return {
        PREFIX + name: _split_layers(name, info, config)
        for name, info in flatten_names(describe_params(config)).items()
    }


def list_weights(config: ModelConfig, arrays: Mapping[str, LazyArray]) -> list[tuple[WeightSpec, LazyArray]]:
    """Return every weight of a model with its values; a layer of a stacked array is an `Index` of this array.

    Raises KeyError if an array is missing.
    """
    weights: list[tuple[WeightSpec, LazyArray]] = []
    for name, specs in describe_weights(config).items():
        for i, spec in enumerate(specs):
            weights.append((spec, arrays[name] if spec.layer is None else Index(arrays[name], i)))
    return weights


def assemble(config: ModelConfig, find: Callable[[WeightSpec], LazyArray], where: object) -> dict[str, PlannedArray]:
    """Build the native arrays of a model from the weights that `find` returns.

    `find` raises KeyError for a missing weight and ValueError for a wrong shape. Raises CheckpointError with all weights
    that are missing, have a wrong shape or are not floating point.
    """
    axes = {PREFIX + name: info.axes for name, info in flatten_names(describe_params(config)).items()}
    arrays: dict[str, PlannedArray] = {}
    problems: list[str] = []
    for name, specs in describe_weights(config).items():
        weights: list[LazyArray] = []
        for spec in specs:
            try:
                weights.append(_check_weight(find(spec), spec))
            except KeyError as error:
                problems.append(f"missing: {error.args[0]}")
            except ValueError as error:
                problems.append(f"wrong shape: {error}")
            except TypeError as error:
                problems.append(f"wrong type: {error}")
        if len(weights) == len(specs):
            arrays[name] = PlannedArray(weights[0] if specs[0].layer is None else Stack(weights), axes[name])
    raise_problems(_mismatch(where), problems)
    return arrays


def _mismatch(where: object) -> str:
    return f"{where}: the tensors do not match the configuration; use the tensors and configuration of the same model"


def _check_weight(array: LazyArray, spec: WeightSpec) -> LazyArray:
    if array.dtype.name not in WEIGHT_DTYPES:
        raise TypeError(f"{spec} is {array.dtype.name}, but must be one of {', '.join(WEIGHT_DTYPES)}")
    if array.shape != spec.shape:
        raise ValueError(f"{spec}: shape {array.shape}, but the configuration requires {spec.shape}")
    return array


def raise_problems(heading: object, problems: Iterable[str]) -> None:
    """Raise CheckpointError with the first MAX_PROBLEMS distinct problems. Do nothing if there are none."""
    distinct = list(dict.fromkeys(problems))
    if distinct:
        more = [f"and {len(distinct) - MAX_PROBLEMS} more"] if len(distinct) > MAX_PROBLEMS else []
        raise CheckpointError(f"{heading}:\n  " + "\n  ".join([*distinct[:MAX_PROBLEMS], *more]))


def check_all_used(names: set[str], used: set[str], ignored: Callable[[str], bool], where: object) -> None:
    """Raise CheckpointError with the external `names` that no native array uses, except names that `ignored` accepts."""
    unexpected = [f"unexpected: {name}" for name in sorted(names - used) if not ignored(name)]
    raise_problems(_mismatch(where), unexpected)


def _split_layers(name: str, info: ParamInfo, config: ModelConfig) -> list[WeightSpec]:
    short = name.removeprefix("transformer/")
    if info.axes[:1] != (STACK,):
        return [WeightSpec(short, None, info.axes, info.shape)]
    outer, scan, inside = split_scan(name)
    encoder = f"{outer}/".removeprefix("transformer/")  # "encoder/" or ""
    block, inner = inside.split("/", 1)
    stacks = {stack.name: stack for stack in config.layer_stacks}
    period = len(stacks[scan].pattern)
    first = stacks[scan].first + int(block.removeprefix("block_"))
    layers = range(first, first + info.shape[0] * period, period)
    return [WeightSpec(encoder + inner, layer, info.axes[1:], info.shape[1:]) for layer in layers]
