# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Random quantized weights in each format, and what the libraries that define the formats make of them.

tests/golden/quantized.npz holds the libraries' float32 values of every case, written by

    python tests/quantized_tensors.py tests/golden/quantized.npz

which needs torch, transformers, compressed-tensors, bitsandbytes, and the sources of GPTQModel and AutoAWQ on the path. The
stored tensors come from a seed, so that a golden file needs no packing code.
"""

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "quantized.npz"
Tensors = dict[str, np.ndarray]
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)
WORD = 32


class Case(NamedTuple):
    """A format with its options."""

    table: dict[str, Any]  # quantization_config
    make: Callable[
        ..., Tensors
    ]  # (rng, outputs, inputs, **options) -> tensors by the end of their names after the module
    library: Callable[..., Any]  # (tensors, table, shape) -> float32 values [outputs, inputs], by the library
    shape: tuple[int, int] = (32, 64)
    options: Mapping[str, Any] = {}

    def tensors(self, seed: int = 0, shape: tuple[int, int] | None = None) -> Tensors:
        """Return stored tensors of a weight [outputs, inputs] whose values are of the size of a weight's."""
        return self.make(np.random.default_rng(seed), *(shape or self.shape), **self.options)


def _words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-(1 << 31), 1 << 31, shape).astype(np.int32)


def _fp8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * 30).astype(ml_dtypes.float8_e4m3fn)


def _scales(rng: np.random.Generator, size: float, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return (rng.uniform(0.5, 1.5, shape) * size).astype(dtype)


def make_fp8(
    rng: np.random.Generator, outputs: int, inputs: int, block: tuple[int, int] | None = None, end: str = "_scale_inv"
) -> Tensors:
    """FP8 with scales of blocks, or one."""
    grid = () if block is None else (math.ceil(outputs / block[0]), math.ceil(inputs / block[1]))
    return {".weight": _fp8(rng, outputs, inputs), f".weight{end}": _scales(rng, 3e-3, *grid)}


def make_mxfp4(rng: np.random.Generator, outputs: int, inputs: int, n_experts: int = 3) -> Tensors:
    """MXFP4 experts."""
    blocks = rng.integers(0, 256, (n_experts, outputs, inputs // 32, 16)).astype(np.uint8)
    return {"_blocks": blocks, "_scales": rng.integers(120, 125, blocks.shape[:-1]).astype(np.uint8)}


def make_gptq(rng: np.random.Generator, outputs: int, inputs: int, bits: int, size: int, *, act_order: bool) -> Tensors:
    """GPTQ with random zero points, none of which is 0: the first format cannot represent that."""
    n_groups = 1 if size == -1 else math.ceil(inputs / size)
    groups = np.arange(inputs) // (inputs if size == -1 else size)
    zeros = rng.integers(1, 1 << bits, (n_groups, outputs)) - 1
    return {
        ".qweight": _words(rng, inputs * bits // WORD, outputs),
        ".qzeros": pack_rows(zeros, bits),
        ".scales": _scales(rng, 0.3 / (1 << bits), n_groups, outputs, dtype=np.float16),
        ".g_idx": (rng.permutation(groups) if act_order else groups).astype(np.int32),
    }


def pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """Return integers [R, n] as words [R, ceil(n bits / 32)], the first in the lowest bits."""
    stream = (values[..., None] >> np.arange(bits) & 1).reshape(len(values), -1).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % WORD)))
    return np.packbits(stream, axis=1, bitorder="little").view(np.int32)


def make_awq(rng: np.random.Generator, outputs: int, inputs: int, size: int = 32) -> Tensors:
    """AWQ for the kernel "gemm"."""
    return {
        ".qweight": _words(rng, inputs, outputs // 8),
        ".qzeros": _words(rng, inputs // size, outputs // 8),
        ".scales": _scales(rng, 0.02, inputs // size, outputs, dtype=np.float16),
    }


def make_packed(
    rng: np.random.Generator, outputs: int, inputs: int, bits: int, size: int | None, *, symmetric: bool = True
) -> Tensors:
    """compressed-tensors, packed, with scales of groups or of rows."""
    n_groups = math.ceil(inputs / size) if size else 1
    found = {
        ".weight_packed": pack_rows(rng.integers(0, 1 << bits, (outputs, inputs)), bits),
        ".weight_scale": _scales(rng, 0.3 / (1 << bits), outputs, n_groups),
        ".weight_shape": np.array([outputs, inputs], np.int64),
    }
    if not symmetric:
        found[".weight_zero_point"] = np.ascontiguousarray(
            pack_rows(rng.integers(0, 1 << bits, (n_groups, outputs)), bits).T
        )
    return found


def make_int8(
    rng: np.random.Generator, outputs: int, inputs: int, size: int | None = None, *, symmetric: bool = True
) -> Tensors:
    """compressed-tensors, int8, with scales of groups or of rows."""
    grid = (outputs, inputs // size if size else 1)
    found = {".weight": rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)}
    found[".weight_scale"] = _scales(rng, 1e-3, *grid)
    if not symmetric:
        found[".weight_zero_point"] = rng.integers(-128, 128, grid).astype(np.int8)
    return found


def make_4bit(rng: np.random.Generator, outputs: int, inputs: int, kind: str, *, nested: bool) -> Tensors:
    """NF4 or FP4 of bitsandbytes, in blocks of 64."""
    n_blocks = math.ceil(outputs * inputs / 64)
    state = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": [outputs, inputs]}
    found = {
        ".weight": rng.integers(0, 256, (math.ceil(outputs * inputs / 2), 1)).astype(np.uint8),
        ".weight.quant_map": NF4 if kind == "nf4" else FP4,
        ".weight.absmax": _scales(rng, 0.2, n_blocks),
    }
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.15}
        found[".weight.absmax"] = rng.integers(0, 256, n_blocks).astype(np.uint8)
        found[".weight.nested_absmax"] = _scales(rng, 0.1, math.ceil(n_blocks / 256))
        found[".weight.nested_quant_map"] = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
    text = json.dumps(state).encode()
    return found | {f".weight.quant_state.bitsandbytes__{kind}": np.frombuffer(text, np.uint8)}


def make_llm_int8(rng: np.random.Generator, outputs: int, inputs: int) -> Tensors:
    """LLM.int8 of bitsandbytes."""
    return {
        ".weight": rng.integers(-127, 128, (outputs, inputs)).astype(np.int8),
        ".SCB": _scales(rng, 0.2, outputs),
        ".weight_format": np.zeros((), np.uint8),
    }


def to_torch(values: np.ndarray) -> Any:
    """Return an array as a tensor of PyTorch, FP8 too."""
    import torch

    if values.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(values.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.array(values))


def fp8_of_transformers(tensors: Tensors, table: dict[str, Any], shape: tuple[int, int]) -> Any:
    """Fp8Dequantize, which finds the size of blocks from the number of scales."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = map(to_torch, tensors.values())
    return Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)


def mxfp4_of_transformers(tensors: Tensors, table: dict[str, Any], shape: tuple[int, int]) -> Any:
    """convert_moe_packed_tensors, which transposes."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(*map(to_torch, tensors.values()), dtype=torch.float32)


def gptqmodel(tensors: Tensors, table: dict[str, Any], shape: tuple[int, int]) -> Any:
    """TorchLinear of GPTQModel, with scales in float32."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    outputs, inputs = shape
    size = inputs if table["group_size"] == -1 else table["group_size"]
    layer = TorchLinear(table["bits"], size, False, True, inputs, outputs, False)
    for name, values in tensors.items():
        setattr(layer, name.removeprefix("."), to_torch(values))
    layer.scales = layer.scales.float()
    if table.get("checkpoint_format") != "gptq_v2":
        convert_gptq_v1_to_v2_format_module(layer, table["bits"], torch.int32)
    return layer.dequantize_weight().T


def autoawq(tensors: Tensors, table: dict[str, Any], shape: tuple[int, int]) -> Any:
    """dequantize_gemm of AutoAWQ, with scales in float32."""
    found = next(Path(folder) / "awq/utils/packing_utils.py" for folder in sys.path if (Path(folder) / "awq").is_dir())
    spec = importlib.util.spec_from_file_location("packing_utils", found)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    qweight, qzeros, scales = map(to_torch, tensors.values())
    return module.dequantize_gemm(qweight, qzeros, scales.float(), table["bits"], table["group_size"]).T


def compressed_tensors(tensors: Tensors, table: dict[str, Any], shape: tuple[int, int]) -> Any:
    """The decompressors of compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**table["config_groups"]["group_0"]["weights"])
    )
    state = {name.removeprefix("."): to_torch(values) for name, values in tensors.items()}
    form = table["format"] if table["format"] == "pack-quantized" else "naive-quantized"
    return BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"]


def bitsandbytes(tensors: Tensors, table: dict[str, Any], shape: tuple[int, int]) -> Any:
    """dequantize_4bit and int8_vectorwise_dequant of bitsandbytes.

    A 4-bit weight is passed as a single row. With its own rows, the CPU kernel of bitsandbytes 0.50 starts a new block in
    each row if rows of 16 n values are not whole blocks; quantize_4bit and the other kernels do not.
    """
    from bitsandbytes import functional

    state = {name.removeprefix(".weight."): to_torch(values) for name, values in tensors.items()}
    if ".SCB" in state:
        return functional.int8_vectorwise_dequant(state[".weight"], state[".SCB"])
    weight = state.pop(".weight")
    import torch

    quantized = functional.QuantState.from_dict(state, torch.device("cpu"))
    quantized.shape = torch.Size((1, math.prod(shape)))
    return functional.dequantize_4bit(weight, quantized).reshape(shape)


def _fp8_case(block: tuple[int, int] | None, **more: Any) -> Case:
    table = {"quant_method": "fp8", "weight_block_size": block and list(block)}
    return Case(table, make_fp8, fp8_of_transformers, options={"block": block}, **more)


def _gptq_case(bits: int, size: int, *, act_order: bool = False, **table: Any) -> Case:
    table = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": act_order, **table}
    return Case(table, make_gptq, gptqmodel, options={"bits": bits, "size": size, "act_order": act_order})


def _compressed(
    form: str, make: Callable[..., Tensors], weights: dict[str, Any], shape: tuple[int, int] = (32, 64), **options: Any
) -> Case:
    table = {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}},
    }  # fmt: skip
    return Case(table, make, compressed_tensors, shape, options)


def _bitsandbytes(kind: str, *, nested: bool, shape: tuple[int, int] = (32, 64)) -> Case:
    table = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return Case(table, make_4bit, bitsandbytes, shape, {"kind": kind, "nested": nested})


GROUP = {"strategy": "group", "group_size": 16}
FLOAT, BLOCK = {"num_bits": 8, "type": "float"}, {"strategy": "block", "block_structure": [16, 32]}
CASES = {
    "fp8-blocks": _fp8_case((16, 32)),
    "fp8-tensor": _fp8_case(None),
    "mxfp4": Case({"quant_method": "mxfp4"}, make_mxfp4, mxfp4_of_transformers, (16, 64)),
    "gptq": _gptq_case(4, 32),
    "gptq-act-order": _gptq_case(4, 16, act_order=True),
    "gptq-one-group": _gptq_case(8, -1),
    "gptq-v2": _gptq_case(4, 32, checkpoint_format="gptq_v2"),
    "gptq-2-bits": _gptq_case(2, 32),
    "gptq-3-bits": _gptq_case(3, 32, act_order=True),
    "awq": Case({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, make_awq, autoawq),
    "packed-4-groups": _compressed("pack-quantized", make_packed, {"num_bits": 4, **GROUP}, bits=4, size=16),
    "packed-4-rows": _compressed(
        "pack-quantized", make_packed, {"num_bits": 4, "strategy": "channel", "symmetric": False}, (20, 37), bits=4, size=None,
        symmetric=False,
    ),
    "packed-8-groups": _compressed(
        "pack-quantized", make_packed, {"num_bits": 8, **GROUP, "group_size": 32, "symmetric": False}, bits=8, size=32,
        symmetric=False,
    ),
    "packed-3-groups": _compressed("pack-quantized", make_packed, {"num_bits": 3, **GROUP}, (8, 48), bits=3, size=16),
    "int8-rows": _compressed("int-quantized", make_int8, {"num_bits": 8, "strategy": "channel"}),
    "int8-groups": _compressed(
        "int-quantized", make_int8, {"num_bits": 8, **GROUP, "symmetric": False}, size=16, symmetric=False
    ),
    "float8-tensor": _compressed("float-quantized", make_fp8, {**FLOAT, "strategy": "tensor"}, end="_scale"),
    "float8-rows": _compressed("float-quantized", make_fp8, {**FLOAT, "strategy": "channel"}, end="_scale", block=(1, 64)),
    "float8-blocks": _compressed("float-quantized", make_fp8, {**FLOAT, **BLOCK}, end="_scale", block=(16, 32)),
    "nf4": _bitsandbytes("nf4", nested=False),
    "nf4-nested": _bitsandbytes("nf4", nested=True, shape=(32, 640)),
    "nf4-rows": _bitsandbytes("nf4", nested=True, shape=(16, 96)),
    "nf4-odd": _bitsandbytes("nf4", nested=False, shape=(15, 50)),
    "fp4": _bitsandbytes("fp4", nested=True),
    "llm-int8": Case({"quant_method": "bitsandbytes", "load_in_8bit": True}, make_llm_int8, bitsandbytes),
}  # fmt: skip


def library_values(case: Case, seed: int = 0, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Return the values that the library of a case computes."""
    return case.library(case.tensors(seed, shape), case.table, shape or case.shape).float().numpy()


if __name__ == "__main__":
    goldens: dict[str, Any] = {name: library_values(case) for name, case in CASES.items()}
    np.savez_compressed(sys.argv[1], **goldens)
