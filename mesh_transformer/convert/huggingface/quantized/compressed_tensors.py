# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights stored by compressed-tensors (llm-compressor, vLLM): FP8, int8 and packed integers, with scales of several kinds.

Formats and names are those of the compressors `naive_quantized` and `pack_quantized` in that library: w = (q - zero) * scale.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.huggingface.quantized.decoding import (
    WORD,
    Stored,
    ceil_div,
    check_groups,
    decode_lazily,
    each_block,
    read_all,
    read_block_rows,
    unpack_words,
    values_per_period,
)
from mesh_transformer.convert.huggingface.quantized.scaled import decode_blocks, reshape_scales
from mesh_transformer.convert.lazy_arrays import FileArray, LazyArray

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
NAIVE_BITS = 8
PACKED_BITS = range(1, 9)
DENSE = (None, "dense")  # formats of weights without sparsity


def decode_naive(stored: Stored) -> LazyArray:
    """Return a weight of FP8 or int8 values. Raises ValueError if the tensors do not belong together."""
    scheme = _find_scheme(stored)
    if scheme["num_bits"] != NAIVE_BITS:
        raise ValueError(f"{scheme['num_bits']} bits, supported in this format: {NAIVE_BITS}")
    shape = stored.parts["weight"].shape
    scale, block = _find_blocks(stored, scheme, shape)
    zero = stored.parts.get("zero_point")
    if zero is not None:
        zero = zero.with_shape(*scale.shape)
    return decode_blocks(stored, scale, block, zero)


def decode_packed(stored: Stored) -> LazyArray:
    """Return a weight of 1 to 8 bits, packed along the inputs; zero points are packed along the outputs.

    Files store signed integers plus half of the range, as unsigned integers. Raises ValueError if the tensors do not belong
    together.
    """
    scheme = _find_scheme(stored)
    bits = scheme["num_bits"]
    if bits not in PACKED_BITS:
        raise ValueError(f"{bits} bits, supported: 1 to 8")
    shape = tuple(int(dim) for dim in read_all(stored.parts["shape"]))
    if len(shape) != 2:
        raise ValueError(f"weight_shape is {list(shape)}, expected a matrix")
    rows, columns = shape
    packed = stored.require_shape("packed", rows, ceil_div(columns * bits, WORD))
    scale, block = _find_blocks(stored, scheme, shape)
    has_zeros = "zero_point" in stored.parts and not scheme.get("symmetric", True)
    if has_zeros:
        stored.require_shape("zero_point", ceil_div(scale.shape[0] * bits, WORD), scale.shape[1])
    if "g_idx" in stored.parts:
        stored.require_shape("g_idx", columns)

    def read_factors(index: Slices) -> tuple[np.ndarray, np.ndarray]:
        """Return the zero points, as stored, and the scales, [rows, blocks]; with g_idx, of all groups of the inputs."""
        if "g_idx" in stored.parts:
            index = (index[0], slice(0, columns))
        scales = read_block_rows(scale, index, block)
        if not has_zeros:
            return np.full((1, scales.shape[1]), 1 << (bits - 1), np.float32), scales
        block_rows = np.arange(index[0].start, index[0].stop) // block[0]
        period = values_per_period(bits)
        first, last = int(block_rows[0]) // period, int(block_rows[-1]) // period + 1
        words = slice(
            first * period * bits // WORD, min(last * period * bits // WORD, stored.parts["zero_point"].shape[0])
        )
        blocks = slice(index[1].start // block[1], ceil_div(index[1].stop, block[1]))
        raw = stored.parts["zero_point"].read((words, blocks))
        return unpack_words(raw, bits, 0)[block_rows - first * period], scales

    def decode(index: Slices) -> np.ndarray:
        inner = slice(index[1].start * bits // WORD, ceil_div(index[1].stop * bits, WORD))
        values = unpack_words(packed.read((index[0], inner)), bits, 1)[:, : index[1].stop - index[1].start]
        zeros, scales = read_factors(index)
        if "g_idx" in stored.parts:
            groups = check_groups(stored.parts["g_idx"].read(index[1:]), scale.shape[1], stored)
            return (values - zeros[:, groups]) * scales[:, groups]
        each_block(values, zeros, block[1], np.subtract)
        each_block(values, scales, block[1], np.multiply)
        return values

    period = values_per_period(bits)
    return decode_lazily(stored, shape, (1, math.lcm(period, block[1]) if block[1] < columns else period), decode)


def _find_blocks(
    stored: Stored, scheme: Mapping[str, Any], shape: tuple[int, ...]
) -> tuple[FileArray, tuple[int, int]]:
    """Return the scales as [..., blocks of rows, blocks of columns] and the size of a block."""
    scale = stored.parts["scale"]
    match scheme.get("strategy"):
        case "tensor" | "channel" | None:
            return reshape_scales(scale, shape)
        case "group":
            block = (1, scheme["group_size"])
        case "block":
            block = (scheme["block_structure"][0], scheme["block_structure"][1])
        case other:
            raise ValueError(f"strategy is {json.dumps(other)}, supported: tensor, channel, group, block")
    expected = (*shape[:-2], ceil_div(shape[-2], block[0]), ceil_div(shape[-1], block[1]))
    if scale.shape != expected:
        raise ValueError(f"scales {list(scale.shape)}, expected {list(expected)} for blocks of {list(block)}")
    return scale, block


def _find_scheme(stored: Stored) -> Mapping[str, Any]:
    """Return the table `weights` of the group in config_groups whose targets match a module; ValueError if none matches."""
    table = stored.table
    if (table.get("sparsity_config") or {}).get("format") not in DENSE:
        raise ValueError(
            f"sparsity_config.format is {json.dumps(table['sparsity_config']['format'])}, supported: dense"
        )
    groups = list((table.get("config_groups") or {}).values())
    module = stored.name.removesuffix(".weight")
    for matches in (_is_named, _is_class):
        for group in groups:
            if any(matches(target, module) for target in group.get("targets", ())):
                name = group.get("format") or table.get("format")
                if name not in FORMATS:
                    raise ValueError(f"format is {json.dumps(name)}, supported: {', '.join(FORMATS)}")
                if not isinstance(group.get("weights"), Mapping) or type(group["weights"].get("num_bits")) is not int:
                    raise ValueError("its group of config_groups has no weights.num_bits")
                return group["weights"]
    raise ValueError("no target in config_groups matches it")


def _is_named(target: str, module: str) -> bool:
    """Return whether a target matches the name of a module; a target is a name, or "re:" and a regular expression."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module


def _is_class(target: str, module: str) -> bool:
    """Return whether a target is a class name, such as "Linear". It matches any module, as only this class is quantized."""
    return target.isidentifier() and target != module
