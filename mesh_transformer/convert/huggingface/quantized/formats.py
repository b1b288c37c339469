# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Table of the formats of quantized weights, by `quant_method` in config.json, and `open_tensors`, which reads any of them.

Each quantized weight becomes one lazy tensor with the name of an unquantized weight, so the readers of families need no
changes. Its dtype is that of the model in config.json, or bfloat16 if config.json has none. Tensors that are not quantized
are returned unchanged.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.huggingface.quantized.bitsandbytes import decode_4bit, decode_llm_int8
from mesh_transformer.convert.huggingface.quantized.compressed_tensors import decode_naive, decode_packed
from mesh_transformer.convert.huggingface.quantized.decoding import Stored
from mesh_transformer.convert.huggingface.quantized.mxfp4 import decode_mxfp4
from mesh_transformer.convert.huggingface.quantized.packed import decode_awq, decode_gptq
from mesh_transformer.convert.huggingface.quantized.scaled import decode_fp8, decode_rows
from mesh_transformer.convert.huggingface.tensor_files import find_tensors
from mesh_transformer.convert.import_plan import WEIGHT_DTYPES, raise_problems
from mesh_transformer.convert.lazy_arrays import Decoded, FileArray, LazyArray, to_dtype
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath

FP8 = ("float8_e4m3fn", "float8_e5m2")


class Format(NamedTuple):
    """The tensors in which files store one quantized weight. Their names have a common beginning and different suffixes."""

    parts: Mapping[str, str]  # required tensors: part -> suffix of the name; the first part has the values
    dtypes: tuple[str, ...]  # dtypes of the values of a quantized weight
    decode: Callable[[Stored], LazyArray]  # raises ValueError if the tensors do not belong together
    optional: Mapping[str, str] = {}  # optional tensors: part -> suffix of the name
    weight: str = ""  # suffix of the name of an unquantized weight

    def find(self, tensors: Mapping[str, LazyArray]) -> list[str]:
        """Return the common beginning of the tensor names of each quantized weight."""
        suffix = next(iter(self.parts.values()))
        named = ((name, array) for name, array in tensors.items() if name.endswith(suffix))
        return [name.removesuffix(suffix) for name, array in named if array.dtype.name in self.dtypes]


PACKED = {name: f".{name}" for name in ("qweight", "qzeros", "scales")}
# Suffixes that follow the name of the weight itself.
SCALE_INVERSE = {"weight": "", "scale": "_scale_inv"}
SCALE = {"weight": "", "scale": "_scale"}
NESTED = {name: f".{name}" for name in ("nested_absmax", "nested_quant_map")}
FORMATS: dict[str, list[Format]] = {
    "fp8": [Format(SCALE_INVERSE, FP8, decode_fp8), Format(SCALE, FP8, decode_fp8)],
    "fbgemm_fp8": [Format(SCALE, FP8, decode_rows)],
    "mxfp4": [Format({"blocks": "_blocks", "scales": "_scales"}, ("uint8",), decode_mxfp4)],
    "gptq": [Format(PACKED, ("int32", "uint32"), decode_gptq, {"g_idx": ".g_idx"}, ".weight")],
    "awq": [Format(PACKED, ("int32", "uint32"), decode_awq, weight=".weight")],
    "bitsandbytes": [
        *(
            Format(
                {"weight": "", "absmax": ".absmax", "quant_map": ".quant_map", "quant_state": f".quant_state.bitsandbytes__{kind}"},
                ("uint8",),
                decode_4bit,
                NESTED,
            )
            for kind in ("nf4", "fp4")
        ),
        Format(
            {"weight": ".weight", "SCB": ".SCB"}, ("int8",), decode_llm_int8, {"weight_format": ".weight_format"}, ".weight"
        ),
    ],
    "compressed-tensors": [
        Format(
            {"packed": "_packed", "scale": "_scale", "shape": "_shape"},
            ("int32",),
            decode_packed,
            {"zero_point": "_zero_point", "g_idx": "_g_idx"},
        ),
        Format(SCALE, ("int8", *FP8), decode_naive, {"zero_point": "_zero_point"}),
    ],
}  # fmt: skip
TABLES = ("quantization_config", "compression_config")  # in config.json; the second of older compressed-tensors
SIGNS = ("_blocks", ".qweight", ".SCB", ".absmax", "_packed", "_scale_inv", "weight_scale")  # suffixes in such files
# Scales of activations and of the KV cache, for computations with quantized activations.
ACTIVATIONS = tuple(
    f".{what}" for what in (
        "input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "activation_scale", "output_scale",
        "output_zero_point", "k_scale", "v_scale", "q_scale", "kv_scale", "k_zero_point", "v_zero_point", "prob_output_scale",
    )
)  # fmt: skip
TRANSPOSED = (
    "gpt2",
)  # families whose plain files have [inputs, outputs], but whose quantized modules are torch.nn.Linear


class OpenTensors(NamedTuple):
    """The tensors of a model folder, dequantized if necessary."""

    tensors: Mapping[str, LazyArray]
    is_quantized: bool = False
    notes: tuple[str, ...] = ()  # shown to the user


def open_tensors(folder: AnyPath, config: Mapping[str, Any]) -> OpenTensors:
    """Return the tensors of a model folder with this config.json, quantized weights as dequantized tensors.

    Raises CheckpointError if the files are damaged, or quantized in a way that is not supported.
    """
    tensors = find_tensors(folder)
    where = folder / "config.json"
    table = _find_table(config)
    if table is None:
        if signs := [name for name in tensors if name.endswith(SIGNS)]:
            raise CheckpointError(
                f"{folder}: {signs[0]} is part of a quantized weight, but {where.name} has no quantization_config; copy or "
                "download config.json again"
            )
        return OpenTensors(tensors)
    method = table.get("quant_method")
    if method is None and (table.get("load_in_4bit") or table.get("load_in_8bit")):
        method = "bitsandbytes"  # older versions of transformers did not write quant_method
    if method not in FORMATS:
        raise CheckpointError(
            f"{where}: quantization_config.quant_method = {json.dumps(method)} is not supported; supported: "
            f"{', '.join(FORMATS)}; use the model's version without quantization, or dequantize it with transformers "
            "(model.dequantize(), then model.save_pretrained) and convert that"
        )
    return _dequantize(tensors, config, table, method, where)


def _find_table(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantization_config of a config.json or of its text model."""
    for source in (config, config.get("text_config") or {}):
        for key in TABLES:
            if source.get(key):
                return source[key]
    return None


def _find_dtype(config: Mapping[str, Any]) -> np.dtype:
    """Return the dtype of the model's computations in a config.json, or bfloat16."""
    text = config.get("text_config") or {}
    for name in (config.get("dtype"), config.get("torch_dtype"), text.get("dtype"), text.get("torch_dtype")):
        if name in WEIGHT_DTYPES:
            return to_dtype(name)
    return to_dtype("bfloat16")


def _dequantize(
    tensors: Mapping[str, FileArray], config: Mapping[str, Any], table: Mapping[str, Any], method: str, where: AnyPath
) -> OpenTensors:
    result: dict[str, LazyArray] = dict(tensors)
    dtype = _find_dtype(config)
    problems: list[str] = []
    incomplete: dict[str, str] = {}
    n_weights = 0
    for entry in FORMATS[method]:
        for base in entry.find(tensors):
            names = {
                part: base + end for part, end in {**entry.parts, **entry.optional}.items() if base + end in tensors
            }
            values, plain = base + next(iter(entry.parts.values())), base + entry.weight
            if missing := [base + end for part, end in entry.parts.items() if part not in names]:
                reason = f"{values} is {tensors[values].dtype.name}, but there is no {', '.join(missing)}"
                incomplete.setdefault(values, reason)
                continue
            for full in names.values():
                del result[full]
            if plain in result:
                problems.append(f"both {plain} and {values} are in the files")
            stored = Stored(plain, {part: tensors[full] for part, full in names.items()}, table, dtype)
            try:
                result[plain] = _as_stored(entry.decode(stored), config)
            except KeyError as error:
                problems.append(f"{plain}: quantization_config has no {error}")
            except ValueError as error:
                problems.append(f"{plain}: {error}")
            n_weights += 1
    problems += [problem for name, problem in incomplete.items() if result.get(name) is tensors[name]]
    raise_problems(f"{where.parent}: its tensors do not match quantization_config ({method}) of {where.name}", problems)
    notes = [f"weights dequantized from {method} to {dtype.name}: {n_weights}; activations are not quantized here"]
    if scales := [name for name in result if name.endswith(ACTIVATIONS)]:
        notes.append(f"scales of activations that are left out: {len(scales)}, such as {scales[0]}")
    return OpenTensors(
        {name: array for name, array in result.items() if not name.endswith(ACTIVATIONS)}, True, tuple(notes)
    )


def _as_stored(weight: LazyArray, config: Mapping[str, Any]) -> LazyArray:
    """Return a weight [outputs, inputs] in the layout of the family's plain files."""
    if config.get("model_type") not in TRANSPOSED:
        return weight

    def decode(index: Slices) -> np.ndarray:
        return weight.read(index[::-1]).T

    return Decoded(weight.shape[::-1], weight.dtype, weight.read_granularity[::-1], weight.is_local, decode)
