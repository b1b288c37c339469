# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Quantized weights have the values that the libraries of their formats compute, whole and by slices, and errors name the fault."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from quantized_tensors import CASES, GOLDEN, Case, Tensors, library_values, make_gptq, pack_rows
from reference_models import make_model_folder

from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.convert.huggingface.quantized.formats import FORMATS, open_tensors
from mesh_transformer.convert.huggingface.tensor_files import DTYPES, TensorSpec, create_safetensors, write_values
from mesh_transformer.convert.lazy_arrays import LazyArray, full_index, to_dtype
from mesh_transformer.convert.logit_check import run_native
from mesh_transformer.convert.readers import open_checkpoint
from mesh_transformer.storage.errors import CheckpointError

MODULE = "model.layers.0.mlp.up_proj"
LIBRARIES = {
    "gptqmodel": "gptqmodel",
    "autoawq": "awq",
    "compressed_tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
}


def write_folder(folder: Path, tensors: Tensors, table: dict | None, **config: Any) -> Path:
    """Write a folder with these tensors and a config.json with this quantization_config."""
    specs = {name: TensorSpec(values.shape, values.dtype) for name, values in tensors.items()}
    folder.mkdir(exist_ok=True)
    for name, target in create_safetensors(folder / "model.safetensors", specs).items():
        write_values(target, 0, tensors[name])
    found = {"model_type": "llama", "dtype": "float32", **config} | ({"quantization_config": table} if table else {})
    (folder / "config.json").write_text(json.dumps(found))
    return folder


def open_folder(folder: Path) -> dict[str, LazyArray]:
    return dict(open_tensors(folder, json.loads((folder / "config.json").read_text())).tensors)


def open_case(
    folder: Path, case: Case, seed: int = 0, shape: tuple[int, int] | None = None, **config: Any
) -> LazyArray:
    """Return the only weight of a folder in the format of a case."""
    tensors = {MODULE + end: values for end, values in case.tensors(seed, shape).items()}
    (weight,) = open_folder(write_folder(folder, tensors, case.table, **config)).items()
    assert weight[0] == (MODULE if case.table["quant_method"] == "mxfp4" else f"{MODULE}.weight")
    return weight[1]


def read(array: LazyArray) -> np.ndarray:
    return array.read(full_index(array))


def check_slices(array: LazyArray, rng: np.random.Generator) -> None:
    """Assert that slices, also empty ones, are those of the whole."""
    whole = read(array)
    for _ in range(20):
        index = tuple(slice(*sorted(rng.integers(0, dim + 1, 2).tolist())) for dim in array.shape)
        np.testing.assert_array_equal(array.read(index), whole[index], err_msg=str(index))


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_library(name, tmp_path):
    with np.load(GOLDEN) as golden:
        expected = golden[name]
    array = open_case(tmp_path / "model", CASES[name])
    assert array.dtype == np.float32
    assert array.shape == expected.shape
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(read(array), expected, rtol=2e-7, atol=1e-9)
    check_slices(array, np.random.default_rng(0))
    half = open_case(tmp_path / "half", CASES[name], dtype="bfloat16")
    assert half.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read(half), read(array).astype(ml_dtypes.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_goldens_are_those_of_the_library(name):
    require_library(CASES[name])
    with np.load(GOLDEN) as golden:
        np.testing.assert_array_equal(library_values(CASES[name]), golden[name])


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
def test_4bit_blocks_continue_in_the_next_row(nested, tmp_path):
    """A weight of bitsandbytes whose rows are no multiple of its blocks has the values that were quantized."""
    require_library(CASES["nf4-rows"])
    import torch
    from bitsandbytes import functional

    size = 1.0 + np.arange(16)[:, None] % 4 * 2  # of each row, so that the scale of another block gives other values
    weight = (np.random.default_rng(0).uniform(0.5, 1, (16, 96)) * size).astype(np.float32)
    packed, state = functional.quantize_4bit(torch.from_numpy(weight), compress_statistics=nested, quant_type="nf4")
    tensors = {".weight": packed, **{f".weight.{name}": values for name, values in state.as_dict(packed=True).items()}}
    case = CASES["nf4-rows"]._replace(
        make=lambda *_: {name: values.numpy() for name, values in tensors.items()}, options={}
    )
    largest = np.abs(weight.reshape(-1, 64)).max(axis=1).repeat(64).reshape(16, 96)
    error = np.abs(read(open_case(tmp_path / "model", case)) - weight)
    # half of the largest gap between values of NF4, and half of the largest gap between scales of 8 bits
    assert (error < 0.16 * largest + (0.01 * largest.max() if nested else 0)).all()


# Sizes that are no multiples of the tile, block or group, where the format allows them.
ODD = {
    "fp8-blocks": (33, 71), "fp8-tensor": (7, 5), "mxfp4": (5, 96), "gptq": (40, 96), "gptq-3-bits": (32, 96), "awq": (8, 96),
    "packed-4-groups": (3, 80), "packed-4-rows": (9, 11), "packed-8-groups": (5, 96), "packed-3-groups": (5, 80),
    "int8-rows": (5, 3), "int8-groups": (3, 48), "float8-blocks": (17, 33), "nf4": (3, 43), "nf4-nested": (70, 300),
    "nf4-odd": (1, 129), "llm-int8": (3, 7),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("tile", [1, 100, 1 << 18])
def test_odd_shapes_and_tiles(name, tile, tmp_path, monkeypatch):
    """The values do not depend on how many are decoded at once, and each number of a small matrix follows the formula."""
    whole = read(open_case(tmp_path / "model", CASES[name], 1, ODD[name]))
    monkeypatch.setattr("mesh_transformer.convert.huggingface.quantized.decoding.TILE", tile)
    array = open_case(tmp_path / "model", CASES[name], 1, ODD[name])
    np.testing.assert_array_equal(read(array), whole)
    check_slices(array, np.random.default_rng(1))
    tensors = CASES[name].tensors(1, ODD[name])
    if name in ("fp8-blocks", "float8-blocks"):
        weight, scale = (values.astype(np.float32) for values in tensors.values())
        expected = weight * scale.repeat(16, 0)[: len(weight)].repeat(32, 1)[:, : weight.shape[1]]
        np.testing.assert_array_equal(whole, expected)


def test_every_fp8_value(tmp_path):
    """All 256 bytes of e4m3, with subnormal values and NaN, and of e5m2."""
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        values = np.arange(256, dtype=np.uint8).view(dtype).reshape(16, 16)
        folder = tmp_path / np.dtype(dtype).name
        scale = np.ones((), np.float32)
        write_folder(folder, {"a.weight": values, "a.weight_scale_inv": scale}, {"quant_method": "fp8"})
        np.testing.assert_array_equal(read(open_folder(folder)["a.weight"]), values.astype(np.float32))


def test_scales_that_are_powers_of_two(tmp_path):
    values = np.ones((4, 4), ml_dtypes.float8_e4m3fn)
    table = {"quant_method": "fp8", "weight_block_size": [2, 4]}
    for dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
        scale = np.array([[126], [130]], np.uint8).view(dtype)
        folder = write_folder(tmp_path / np.dtype(dtype).name, {"a.weight": values, "a.weight_scale_inv": scale}, table)
        np.testing.assert_array_equal(read(open_folder(folder)["a.weight"])[:, 0], [0.5, 0.5, 8, 8])


def test_zero_points_of_the_first_gptq_format(tmp_path):
    """A zero point of 0 becomes -1, which borrows from the next one in the word."""
    rng = np.random.default_rng(0)
    tensors = make_gptq(rng, 32, 32, 4, 32, act_order=False)
    zeros = rng.integers(0, 16, (1, 32))
    assert (zeros == 0).any()
    tensors[".qzeros"] = (pack_rows(zeros, 4).view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    table = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    first = open_folder(write_folder(tmp_path / "1", {f"a{end}": v for end, v in tensors.items()}, table))
    tensors[".qzeros"] = pack_rows(zeros, 4)
    table["checkpoint_format"] = "gptq_v2"
    second = open_folder(write_folder(tmp_path / "2", {f"a{end}": v for end, v in tensors.items()}, table))
    np.testing.assert_array_equal(read(first["a.weight"]), read(second["a.weight"]))


def test_inputs_in_the_order_of_their_activations(tmp_path):
    """compressed-tensors with actorder "group" stores the group of each input."""
    case = CASES["packed-8-groups"]
    tensors = case.tensors()
    groups = np.random.default_rng(0).permutation(np.arange(64) // 32).astype(np.int32)
    plain = read(open_case(tmp_path / "plain", case))
    order = np.argsort(groups, kind="stable")
    words = tensors[".weight_packed"].view(np.uint8)[:, np.argsort(order)].copy().view(np.int32)
    tensors |= {".weight_packed": words, ".weight_g_idx": groups}
    found = open_folder(write_folder(tmp_path / "g", {f"a{end}": v for end, v in tensors.items()}, case.table))[
        "a.weight"
    ]
    assert not np.array_equal(order, np.arange(64))
    np.testing.assert_array_equal(read(found)[:, order], plain)
    check_slices(found, np.random.default_rng(0))
    groups[3] = 2
    tensors[".weight_g_idx"] = groups
    found = open_folder(write_folder(tmp_path / "g", {f"a{end}": v for end, v in tensors.items()}, case.table))[
        "a.weight"
    ]
    with pytest.raises(CheckpointError, match=r"a\.weight: g_idx has groups from 0 to 2, but there are scales of 2"):
        read(found)


def test_groups_of_compressed_tensors(tmp_path):
    """A module has the scheme of the target that names it, and otherwise that of its class."""
    rows, groups = CASES["int8-rows"], CASES["int8-groups"]
    schemes = [case.table["config_groups"]["group_0"]["weights"] for case in (rows, groups)]
    table = rows.table | {
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": schemes[0]},
            "group_1": {"targets": [r"re:.*\.b$"], "weights": schemes[1]},
        }
    }
    tensors = {f"a{end}": v for end, v in rows.tensors().items()} | {
        f"x.b{end}": v for end, v in groups.tensors().items()
    }
    found = open_folder(write_folder(tmp_path / "model", tensors, table))
    np.testing.assert_array_equal(read(found["a.weight"]), read(open_case(tmp_path / "rows", rows)))
    np.testing.assert_array_equal(read(found["x.b.weight"]), read(open_case(tmp_path / "groups", groups)))


def test_plain_tensors_stay_and_scales_of_activations_are_left_out(tmp_path):
    tensors = {MODULE + end: values for end, values in CASES["fp8-tensor"].tensors().items()}
    tensors |= {f"{MODULE}.input_scale": np.ones((), np.float32), "lm_head.weight": np.ones((2, 3), np.float16)}
    folder = write_folder(tmp_path / "model", tensors, CASES["fp8-tensor"].table)
    found = open_tensors(folder, json.loads((folder / "config.json").read_text()))
    assert set(found.tensors) == {f"{MODULE}.weight", "lm_head.weight"}
    assert found.tensors["lm_head.weight"].dtype == np.float16
    assert found.is_quantized
    assert found.notes == (
        "weights dequantized from fp8 to float32: 1; activations are not quantized here",
        f"scales of activations that are left out: 1, such as {MODULE}.input_scale",
    )


def test_matrices_of_conv1d_are_transposed(tmp_path):
    """GPT-2's own files have [inputs, outputs]; its quantized modules have those of torch.nn.Linear."""
    array = open_case(tmp_path / "gpt2", CASES["llm-int8"], model_type="gpt2")
    np.testing.assert_array_equal(read(array), read(open_case(tmp_path / "llama", CASES["llm-int8"])).T)
    check_slices(array, np.random.default_rng(0))


def test_dtype_is_that_of_the_model(tmp_path):
    case = CASES["fp8-tensor"]
    configs: dict[str, Any] = {"float16": {"dtype": None, "torch_dtype": "float16"}, "bfloat16": {"dtype": None}}
    for name, config in configs.items():
        assert open_case(tmp_path / name, case, **config).dtype == to_dtype(name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fp8-blocks", {".weight_scale_inv": None}, r"up_proj\.weight is float8_e4m3fn, but there is no .*weight_scale_inv"),
        ("fp8-blocks", {".weight_scale_inv": np.ones((3, 2), np.float32)}, r"scales \[3, 2\], expected \[2, 2\]"),
        ("fp8-tensor", {".weight_scale_inv": np.ones(5, np.float32)}, "expected one, or one for each of 32 rows"),
        ("mxfp4", {"_scales": np.ones((3, 16, 1), np.uint8)}, r"scales has shape \[3, 16, 1\], expected \[3, 16, 2\]"),
        ("mxfp4", {"_scales": None}, "_blocks is uint8, but there is no .*_scales"),
        ("gptq", {".scales": None}, "qweight is int32, but there is no .*scales"),
        ("gptq", {".g_idx": np.zeros(3, np.int32)}, r"g_idx has shape \[3\], expected \[64\]"),
        ("gptq", {".weight": np.ones((32, 64), np.float32)}, r"both .*\.weight and .*qweight are in the files"),
        ("awq", {".qzeros": np.zeros((1, 4), np.int32)}, r"qzeros has shape \[1, 4\], expected \[2, 4\]"),
        ("packed-4-groups", {".weight_shape": np.array([32, 65])}, r"packed has shape \[32, 8\], expected \[32, 9\]"),
        ("packed-4-groups", {".weight_scale": np.ones((32, 3), np.float32)}, r"scales \[32, 3\], expected \[32, 4\]"),
        ("nf4", {".weight.absmax": np.ones(3, np.float32)}, r"absmax has shape \[3\], expected \[32\]"),
        ("nf4", {".weight.quant_state.bitsandbytes__nf4": np.array([123], np.uint8)}, "quant_state is not valid: JSONDecodeError"),
        ("llm-int8", {".weight_format": np.array(1, np.uint8)}, r"weight_format is 1, expected 0 \(row\)"),
        ("llm-int8", {".SCB": None}, r"weight is int8, but there is no .*SCB"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_belong_together(name, change, message, tmp_path):
    tensors = {end: values for end, values in (CASES[name].tensors() | change).items() if values is not None}
    folder = write_folder(tmp_path / "model", {MODULE + end: v for end, v in tensors.items()}, CASES[name].table)
    with pytest.raises(CheckpointError, match=message) as error:
        open_folder(folder)
    assert str(folder) in str(error.value)
    assert MODULE in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq", {"bits": 5}, "5 bits, supported: 2, 3, 4, 8"),
        ("gptq", {"group_size": None}, "group_size is null"),
        ("gptq", {"checkpoint_format": "marlin"}, 'checkpoint_format is "marlin", supported: gptq, gptq_v2'),
        ("awq", {"version": "gemv"}, 'version is "gemv", supported: gemm'),
        ("fp8-blocks", {"weight_block_size": [16]}, r"weight_block_size is \[16\], expected two sizes"),
        ("packed-4-groups", {"config_groups": {}}, "no target in config_groups matches it"),
        ("packed-4-groups", {"format": "marlin-24"}, 'format is "marlin-24", supported: pack-quantized, int-quantized'),
        ("int8-rows", {"sparsity_config": {"format": "sparse-24-bitmask"}}, 'sparsity_config.format is "sparse-24-bitmask"'),
        ("awq", {"quant_method": "aqlm"}, 'quant_method = "aqlm" is not supported; supported: fp8, .*use the model.s version'),
    ],
)  # fmt: skip
def test_options_that_are_not_supported(name, change, message, tmp_path):
    tensors = {MODULE + end: v for end, v in CASES[name].tensors().items()}
    with pytest.raises(CheckpointError, match=message):
        open_folder(write_folder(tmp_path / "model", tensors, CASES[name].table | change))


@pytest.mark.parametrize("name", ["fp8-blocks", "gptq", "mxfp4", "packed-4-groups", "nf4", "llm-int8"])
def test_quantized_files_without_quantization_config(name, tmp_path):
    tensors = {MODULE + end: v for end, v in CASES[name].tensors().items()}
    with pytest.raises(
        CheckpointError, match=r"part of a quantized weight, but config\.json has no quantization_config"
    ):
        open_folder(write_folder(tmp_path / "model", tensors, None))


def test_every_format_has_a_case():
    assert {case.table["quant_method"] for case in CASES.values()} == set(FORMATS) - {"fbgemm_fp8"}
    assert {"F8_E4M3", "F8_E5M2", "F8_E8M0"} <= set(DTYPES)


def test_fp8_model_becomes_a_checkpoint_in_bfloat16(tmp_path):
    """The default dtype is that of the model, the arrays are the dequantized ones, and the report says what happened."""
    weights = make_model_folder(tmp_path / "plain", "llama-gqa")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    table = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    tensors: Tensors = {}
    for name, values in weights.items():
        if not name.endswith("_proj.weight"):
            tensors[name] = values.astype(ml_dtypes.bfloat16)
            continue
        scale = np.full([-(-dim // 16) for dim in values.shape], np.abs(values).max() / 448, np.float32)
        tensors[name] = (values.astype(np.float32) / scale[0, 0]).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    folder = write_folder(tmp_path / "fp8", tensors, table, **config | {"dtype": "bfloat16"})
    decoded = {name: read(array) for name, array in open_folder(folder).items()}
    plain = write_folder(tmp_path / "decoded", decoded, None, **config | {"dtype": "bfloat16"})
    up = "model.layers.0.mlp.up_proj.weight"
    assert (
        0
        < np.abs(decoded[up].astype(np.float32) - weights[up].astype(np.float32)).max()
        < 0.07 * np.abs(weights[up]).max()
    )
    for form in ("native", "huggingface"):
        result = tmp_path / form
        report = convert(ConversionOptions(source=folder, destination=result, format=form, verify="own"))
        assert "dequantized from fp8 to bfloat16" in " ".join(report["notes"])
        assert report["max_logit_difference"] < 1e-5
        converted, expected = open_checkpoint(result).plan.values, open_checkpoint(plain).plan.values
        assert {array.dtype.name for array in converted.values()} == {"bfloat16"}
        for name, array in expected.items():
            np.testing.assert_array_equal(read(converted[name]), read(array), err_msg=name)
    assert "quantization_config" not in json.loads((tmp_path / "huggingface" / "config.json").read_text())


def test_zero_biases_of_gptq_are_left_out(tmp_path):
    """AutoGPTQ wrote a bias of zeros for every module; one that is not zero is refused as before."""
    weights = make_model_folder(tmp_path / "plain", "llama-gqa")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    bias = {"model.layers.0.mlp.up_proj.bias": np.zeros(20, np.float16)}
    folder = write_folder(tmp_path / "model", dict(weights) | bias, None, **config)
    assert any(
        "biases that the model does not have, zero and left out: 1" in note
        for note in open_checkpoint(folder).plan.notes
    )
    bias["model.layers.0.mlp.up_proj.bias"][3] = 1
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.0\.mlp\.up_proj\.bias"):
        open_checkpoint(write_folder(tmp_path / "model", dict(weights) | bias, None, **config))


WHOLE = [
    "fp8-blocks",
    "gptq",
    "gptq-act-order",
    "awq",
    "packed-4-groups",
    "int8-groups",
    "llm-int8",
    "gpt2-llm-int8",
    "mxfp4",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_logits_of_a_whole_model(name, tmp_path):
    """Every matrix of a layer is quantized; transformers runs the model with the library's values of them."""
    case = CASES[name.removeprefix("gpt2-")]
    require_library(case)
    torch = pytest.importorskip("torch", reason="the comparison needs pip install transformers torch")
    model = make_model(name)
    stored: Tensors = {}
    state = model.state_dict()
    for i, (key, plain) in enumerate(state.items()):
        end = "" if name == "mxfp4" else ".weight"
        if not is_quantized(key, name):
            stored[key] = plain.float().numpy()
            continue
        outputs, inputs = plain.shape[:-3:-1] if name in ("mxfp4", "gpt2-llm-int8") else plain.shape
        values = library_values(case, i, (outputs, inputs))
        plain.copy_(torch.from_numpy(values.T.copy() if name == "gpt2-llm-int8" else values))
        stored |= {
            key.removesuffix(end) + part: part_values
            for part, part_values in case.tensors(i, (outputs, inputs)).items()
        }
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    folder = write_folder(tmp_path / "quantized", stored, case.table, **config | {"dtype": "float32"})
    tokens = np.random.default_rng(0).integers(0, 60, (2, 12))
    expected = model(torch.from_numpy(tokens)).logits.detach().numpy()
    plan = open_checkpoint(folder).plan
    found = run_native(plan.config, plan.values, tokens)
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(np.abs(expected).max(), 1))


def require_library(case: Case) -> None:
    package = LIBRARIES.get(case.library.__name__, "transformers")
    if importlib.util.find_spec(package) is None or importlib.util.find_spec("torch") is None:
        pytest.skip(f"the comparison needs {package} and torch")


def make_model(name: str) -> Any:
    """Return a random model of transformers: GPT-2, gpt-oss for MXFP4, or else a Llama."""
    transformers = pytest.importorskip("transformers", reason="the comparison needs pip install transformers torch")
    sizes = dict(vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    if name == "gpt2-llm-int8":
        config = transformers.GPT2Config(vocab_size=60, n_embd=64, n_layer=2, n_head=4, n_positions=32)
        return transformers.GPT2LMHeadModel(config).eval()
    if name == "mxfp4":
        sizes |= dict(num_local_experts=3, num_experts_per_tok=2, head_dim=16)
        config = transformers.GptOssConfig(**sizes, num_key_value_heads=2, attn_implementation="eager")
        return transformers.GptOssForCausalLM(config).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)).eval()


def is_quantized(key: str, name: str) -> bool:
    if name == "mxfp4":
        return key.endswith(("gate_up_proj", "down_proj"))
    if name == "gpt2-llm-int8":
        return ".c_" in key and key.endswith(".weight")
    return key.endswith("_proj.weight")
