# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights of GPTQ (arXiv 2210.17323) and AWQ (2306.00978): integers packed in 32-bit words, with a scale and a zero point for
each output and group of inputs: w = (q - zero) * scale. The files have the transpose [inputs, outputs] of torch.nn.Linear.
"""

import json
from collections.abc import Callable

import numpy as np

from mesh_transformer.checkpoint.zarr_sharding import Slices
from mesh_transformer.convert.huggingface.quantized.decoding import (
    WORD,
    Stored,
    ceil_div,
    check_groups,
    decode_lazily,
    unpack_words,
    values_per_period,
)
from mesh_transformer.convert.lazy_arrays import LazyArray

GPTQ_BITS = (2, 3, 4, 8)
GPTQ_FORMATS = ("gptq", "gptq_v2")
AWQ_BITS = 4
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word, for the kernel "gemm"
AWQ_VERSIONS = ("gemm",)


def decode_gptq(stored: Stored) -> LazyArray:
    """Return a weight [outputs, inputs] of GPTQ, whose inputs may be in groups in any order (desc_act).

    Files of the format "gptq" hold zero points minus 1; files of "gptq_v2" hold the zero points. As in GPTQModel, the 1 is
    added to whole words, with carries between zero points; for 3 bits, to each zero point. Raises ValueError if the tensors
    do not belong together.
    """
    table = stored.table
    checkpoint_format = table.get("checkpoint_format", table.get("format")) or "gptq"
    if checkpoint_format not in GPTQ_FORMATS:
        raise ValueError(f"checkpoint_format is {json.dumps(checkpoint_format)}, supported: {', '.join(GPTQ_FORMATS)}")
    words, outputs = stored.parts["qweight"].shape
    n_groups = stored.parts["scales"].shape[0]
    bits = _gptq_bits(stored, outputs)
    inputs = words * WORD // bits
    stored.require_shape("scales", n_groups, outputs)
    stored.require_shape("qzeros", n_groups, ceil_div(outputs * bits, WORD))
    size = _group_size(stored, inputs)
    if "g_idx" in stored.parts:
        stored.require_shape("g_idx", inputs)
    elif n_groups != ceil_div(inputs, size):
        raise ValueError(f"scales of {n_groups} groups, expected {ceil_div(inputs, size)} of {size} inputs")

    def read_zeros(groups: slice, columns: slice) -> np.ndarray:
        raw = stored.parts["qzeros"].read(
            (groups, slice(columns.start * bits // WORD, ceil_div(columns.stop * bits, WORD)))
        )
        if checkpoint_format == "gptq" and WORD % bits == 0:
            raw = raw.view(np.uint32) + np.uint32(sum(1 << shift for shift in range(0, WORD, bits)))
        zeros = unpack_words(raw, bits, 1)
        return (zeros + 1) % (1 << bits) if checkpoint_format == "gptq" and WORD % bits else zeros

    return _decode_grouped(stored, bits, size, read_zeros, packed_dim=0)


def decode_awq(stored: Stored) -> LazyArray:
    """Return a weight [outputs, inputs] of AWQ. Raises ValueError if the tensors do not belong together."""
    version = str(stored.table.get("version", "gemm")).lower()
    if version not in AWQ_VERSIONS:
        raise ValueError(f"version is {json.dumps(version)}, supported: {', '.join(AWQ_VERSIONS)}")
    bits = stored.table.get("bits", stored.table.get("w_bit"))
    if bits != AWQ_BITS:
        raise ValueError(f"{bits} bits, supported: {AWQ_BITS}")
    inputs, words = stored.parts["qweight"].shape
    outputs = words * WORD // AWQ_BITS
    size = _group_size(stored, inputs)
    stored.require_shape("scales", ceil_div(inputs, size), outputs)
    stored.require_shape("qzeros", ceil_div(inputs, size), words)

    def read_zeros(groups: slice, columns: slice) -> np.ndarray:
        raw = stored.parts["qzeros"].read((groups, slice(columns.start * bits // WORD, columns.stop * bits // WORD)))
        return unpack_words(raw, bits, 1, AWQ_ORDER)

    return _decode_grouped(stored, bits, size, read_zeros, packed_dim=1)


def _gptq_bits(stored: Stored, outputs: int) -> int:
    """Return the bits per value of a weight, which rules for some modules (`dynamic`) may change."""
    bits = stored.table.get("bits")
    if stored.table.get("dynamic"):
        words = stored.parts["qzeros"].shape[1]
        bits = next((bits for bits in GPTQ_BITS if ceil_div(outputs * bits, WORD) == words), bits)
    if bits not in GPTQ_BITS:
        raise ValueError(f"{bits} bits, supported: {', '.join(map(str, GPTQ_BITS))}")
    return bits


def _group_size(stored: Stored, inputs: int) -> int:
    """Return the number of inputs that share a scale; -1 in quantization_config stands for all inputs."""
    size = stored.table.get("group_size", stored.table.get("q_group_size"))
    if type(size) is not int or not (size == -1 or size > 0):
        raise ValueError(f"group_size is {json.dumps(size)}, expected a number of inputs, or -1 for all")
    return inputs if size == -1 else size


def _decode_grouped(
    stored: Stored,
    bits: int,
    size: int,
    read_zeros: Callable[[slice, slice], np.ndarray],
    packed_dim: int,
) -> LazyArray:
    """Return the transpose of a weight [inputs, outputs], whose integers are packed along one of its dimensions.

    `size` is the number of consecutive inputs of a group; g_idx, where a weight has it, names the group of each input instead.
    """
    qweight, scales = stored.parts["qweight"], stored.parts["scales"]
    period = values_per_period(bits)
    shape = list(qweight.shape)
    shape[packed_dim] = shape[packed_dim] * WORD // bits

    def decode(index: Slices) -> np.ndarray:
        columns, rows = index
        inner = [rows, columns]
        inner[packed_dim] = slice(inner[packed_dim].start * bits // WORD, inner[packed_dim].stop * bits // WORD)
        values = unpack_words(qweight.read(tuple(inner)), bits, packed_dim, AWQ_ORDER if packed_dim else None)
        if "g_idx" in stored.parts:
            groups = check_groups(stored.parts["g_idx"].read((rows,)), scales.shape[0], stored)
        else:
            groups = np.arange(rows.start, rows.stop) // size
        first, last = int(groups.min()), int(groups.max()) + 1
        n = columns.stop - columns.start
        values -= read_zeros(slice(first, last), columns)[:, :n][groups - first]
        values *= scales.read((slice(first, last), columns)).astype(np.float32)[groups - first]
        return values.T

    # zero points are packed along the outputs
    return decode_lazily(stored, (shape[1], shape[0]), (period, 1 if packed_dim else period), decode, (1, 0))
