# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: bit-exact round trips, and errors that list everything that is wrong."""

import dataclasses
import io
import json
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from reference_models import CASES, LIVE_CASES, make_model_folder, make_torch
from safetensors.numpy import load_file, save_file

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig, load_config
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.config.presets import LLAMA, T5
from mesh_transformer.convert import writers
from mesh_transformer.convert.bit_check import verify_bits
from mesh_transformer.convert.destination import publish, staging_folder
from mesh_transformer.convert.huggingface.config_map import HFConfig
from mesh_transformer.convert.huggingface.reader import find_family, open_huggingface, read_config
from mesh_transformer.convert.huggingface.tensor_files import LEGACY_NUMBER, read_safetensors, read_torch
from mesh_transformer.convert.import_plan import make_model_config
from mesh_transformer.convert.lazy_arrays import full_index
from mesh_transformer.convert.progress import no_progress
from mesh_transformer.convert.readers import open_checkpoint
from mesh_transformer.convert.writers import WriteOptions, write_huggingface
from mesh_transformer.storage.resume_log import open_staging_log


def edit_config(folder: Path, **changes) -> None:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | changes))


def export(source: Path, destination: Path, dtype: str | None = None) -> Path:
    """Convert a model folder to another one through the native layout."""
    plan = open_checkpoint(source).plan
    partial = staging_folder(destination)
    with open_staging_log(partial, {"test": 1}) as log:
        write_huggingface(partial, plan, log, WriteOptions(dtype))
    verify_bits(plan, open_checkpoint(partial).plan, dtype, no_progress)
    publish(partial, destination)
    return destination


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bit_exact(name, tmp_path):
    weights = make_model_folder(tmp_path / "external", name)
    plan = open_huggingface(tmp_path / "external")
    total = sum(np.prod(array.shape) for array in plan.values.values())
    assert total == sum(weight.size for weight in weights.values())
    again = load_file(export(tmp_path / "external", tmp_path / "again") / "model.safetensors")
    renamed = {key.replace("embed_out.", "lm_head."): value for key, value in again.items()}  # GPT-NeoX, since 5.0
    assert renamed.keys() == weights.keys()
    for key, value in renamed.items():
        np.testing.assert_array_equal(value, weights[key], err_msg=key)
    tables = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("external", "again")]
    assert tables[0] == {key: value for key, value in tables[1].items() if key != "torch_dtype"}


def test_slice_equals_slice_of_the_full_array(tmp_path):
    make_model_folder(tmp_path / "external", "gpt-neox")
    for name, array in open_huggingface(tmp_path / "external").values.items():
        everything = array.read(full_index(array))
        index = tuple(slice(dim // 3, max(dim - dim // 4, dim // 3 + 1)) for dim in array.shape)
        np.testing.assert_array_equal(array.read(index), everything[index], err_msg=name)


def test_cast_rounds_to_nearest(tmp_path):
    weights = make_model_folder(tmp_path / "external", "gpt2")
    export(tmp_path / "external", tmp_path / "half", "bfloat16")
    found = read_safetensors(tmp_path / "half" / "model.safetensors")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for key, array in found.items():
        np.testing.assert_array_equal(array.read(full_index(array)), weights[key].astype(ml_dtypes.bfloat16))


def test_bare_names_buffers_and_stored_tied_head(tmp_path):
    weights = make_model_folder(tmp_path / "external", "gpt2")
    bare = {key.removeprefix("transformer."): value for key, value in weights.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "lm_head.weight": weights["transformer.wte.weight"]}
    save_file(bare, tmp_path / "external" / "model.safetensors")
    plan = open_huggingface(tmp_path / "external")
    assert plan.notes == ("lm_head.weight equals wte.weight and is stored once",)
    bare["lm_head.weight"] = bare["lm_head.weight"] + 1
    save_file(bare, tmp_path / "external" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from wte\.weight"):
        open_huggingface(tmp_path / "external")


def test_all_wrong_tensors_are_listed(tmp_path):
    weights = make_model_folder(tmp_path / "external", "llama-gqa")
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][:-1]
    weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
    save_file(weights, tmp_path / "external" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_huggingface(tmp_path / "external")
    assert "missing: model.norm.weight" in str(caught.value)
    assert "wrong shape: " in str(caught.value)
    weights = make_model_folder(tmp_path / "more", "llama-gqa")
    weights |= {"model.extra": np.zeros(3, np.float32), "model.layers.9.mlp.up_proj.weight": np.zeros(3, np.float32)}
    save_file(weights, tmp_path / "more" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: model\.extra\n  unexpected: model\.layers\.9\."):
        open_huggingface(tmp_path / "more")


def test_integers_are_refused_and_mixed_types_become_float32(tmp_path):
    weights = make_model_folder(tmp_path / "external", "llama-gqa")
    path = tmp_path / "external" / "model.safetensors"
    up = "model.layers.1.mlp.up_proj.weight"
    save_file(
        weights | {up: weights[up].astype(np.int8), "lm_head.weight": weights["lm_head.weight"].astype(float)}, path
    )
    with pytest.raises(
        CheckpointError, match=r"(?s)wrong type: w_head is float64.*feed_forward/w_in of layer 1 is int8"
    ):
        open_huggingface(tmp_path / "external")
    save_file(weights | {up: weights[up].astype(np.float16)}, path)
    arrays = open_huggingface(tmp_path / "external").values
    stack = arrays["params/transformer/layers/block_0/feed_forward/w_in"]
    assert stack.dtype == np.float32
    for layer in range(2):
        wanted = weights[up.replace("1", str(layer))].T
        part = (slice(layer, layer + 1), *(slice(0, dim) for dim in stack.shape[1:]))
        np.testing.assert_array_equal(stack.read(part)[0], wanted.astype(np.float16) if layer else wanted)


def test_missing_expert_is_named(tmp_path):
    weights = make_model_folder(tmp_path / "external", "mixtral")
    del weights["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(weights, tmp_path / "external" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight$"):
        open_huggingface(tmp_path / "external")


def test_wrong_number_of_layers_is_refused(tmp_path):
    make_model_folder(tmp_path / "external", "gpt2")
    edit_config(tmp_path / "external", n_layer=1)
    with pytest.raises(CheckpointError, match=r"unexpected: transformer\.h\.1\."):
        open_huggingface(tmp_path / "external")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt2", dict(model_type="vit"), '"vit" is not supported; supported: gpt2, gpt_neo'),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = true"),
        ("gpt2", dict(activation_function="mish"), 'activation_function = "mish"'),
        ("gpt2", dict(n_head=None), "n_head = null has the type null, but must have the type int"),
        (
            "gpt2",
            dict(n_head=5),
            r"d_model=12 is not a multiple of n_heads=5; set d_head \(config.json has n_embd = 12, n_head = 5\)",
        ),
        ("llama-gqa", dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), 'type "yarn" need factor'),
        ("llama-gqa", dict(mlp_bias=True), r"missing: model\.layers\.0\.mlp\.up_proj\.bias"),
        ("llama-gqa", dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
        ("mixtral", dict(num_local_experts=8), "8 experts, the files have 4 per layer; correct num_local_experts if"),
        ("mixtral", dict(num_local_experts=3), "3 experts, the files have 4 per layer"),
        ("mixtral", dict(num_experts_per_tok=5), "n_experts_per_token=5 exceeds n_experts=4"),
    ],
)
def test_unsupported_config_values_are_refused(tmp_path, name, changes, reason):
    make_model_folder(tmp_path / "external", name)
    edit_config(tmp_path / "external", **changes)
    with pytest.raises(CheckpointError, match=reason):
        open_huggingface(tmp_path / "external")


def test_sliding_window_layers_match_transformers(tmp_path):
    make_model_folder(tmp_path / "external", "llama-gqa")
    for changes, pattern, window in (
        (dict(model_type="mistral", sliding_window=None), ("global",), 256),  # null: no window
        (dict(model_type="mistral", sliding_window=3), ("local",), 3),
        (dict(model_type="mixtral", sliding_window=3), ("local",), 3),
        (dict(model_type="llama", use_sliding_window=True), ("global",), 256),
        (dict(model_type="qwen3", use_sliding_window=True, max_window_layers=1), ("global", "local"), 3),
        (dict(layer_types=["sliding_attention", "full_attention"]), ("local", "global"), 3),
        (dict(use_sliding_window=False, layer_types=None), ("global",), 256),
    ):
        edit_config(tmp_path / "external", **changes)
        config_json, family = read_config(tmp_path / "external")
        config = make_model_config(family.read_config(config_json), "test")
        assert (config.attention_pattern, config.attention_window) == (pattern, window), changes
    config_json.table.pop("sliding_window")
    absent = family.read_config(HFConfig(config_json.table | {"model_type": "mistral"}, "test"))
    assert (absent["attention_pattern"], absent["attention_window"]) == (["local"], 4096), "its configuration's default"
    edit_config(tmp_path / "external", use_sliding_window=False, layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(CheckpointError, match="layer_types has sliding_attention, but sliding_window is not in use"):
        open_huggingface(tmp_path / "external")
    edit_config(tmp_path / "external", use_sliding_window=True, layer_types=["sliding_attention"])
    with pytest.raises(CheckpointError, match=r"layer_types must be .* for each of 2 layers"):
        open_huggingface(tmp_path / "external")


def test_model_without_a_family_is_refused():
    fields = dict(LLAMA, n_layers=1, d_model=8, n_heads=2, n_vocab=9, seq_len=8)
    find_family(ModelConfig(**fields))
    with pytest.raises(CheckpointError, match=r'the nearest, llama, does not support: positions = "alibi"'):
        find_family(ModelConfig(**fields | {"positions": "alibi"}))
    assert find_family(ModelConfig(**fields | {"gated_ffn": False, "activation": "relu"}))[0] == "arcee"
    experts = ExpertsConfig(n_experts=4, n_experts_per_token=2)
    assert find_family(ModelConfig(**fields, experts=experts))[0] == "mixtral"
    for changes in (
        dict(layer_interval=2),
        dict(shared_expert=True),
        dict(eval_capacity_factor=2.0),
        dict(n_experts_per_token=1),
    ):
        config = ModelConfig(**fields | {"n_layers": 2}, experts=dataclasses.replace(experts, **changes))
        with pytest.raises(CheckpointError, match=r"does not support: .*experts = "):
            find_family(config)


# Files
@pytest.mark.parametrize("length", [4, 20, -1])
def test_truncated_safetensors_file_is_refused(tmp_path, length):
    make_model_folder(tmp_path / "external", "gpt2")
    path = tmp_path / "external" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*(truncated|tensors end)"):
        read_safetensors(path)


def test_invalid_headers_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"

    def write(header: str, values: bytes) -> Path:
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + values)
        return path

    one = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    assert read_safetensors(write("{" + one + "}", bytes(8)))["a"].shape == (2,)
    with pytest.raises(CheckpointError, match="occurs twice"):
        read_safetensors(write("{" + one + "," + one + "}", bytes(8)))
    with pytest.raises(CheckpointError, match="b starts at byte"):
        read_safetensors(write("{" + one + "," + one.replace('"a"', '"b"') + "}", bytes(8)))
    with pytest.raises(CheckpointError, match=r"a tensor F32\[.*\] has 8 bytes, expected"):
        read_safetensors(write("{" + one.replace("[2]", "[3]") + "}", bytes(8)))
    with pytest.raises(CheckpointError, match="is not a tensor"):
        read_safetensors(write("{" + one.replace("F32", "Q9") + "}", bytes(8)))


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": Evil()}, 2))
    with pytest.raises(CheckpointError, match=r"pickle calls .*open.* was not run"):
        read_torch(path)
    assert not (tmp_path / "evil").exists()
    legacy = [pickle.dumps(each, 2) for each in (LEGACY_NUMBER, 1001, {"little_endian": True}, {"a": Evil()}, [])]
    path.write_bytes(b"".join(legacy))
    with pytest.raises(CheckpointError, match=r"pickle calls .*open.* was not run"):
        read_torch(path)
    assert not (tmp_path / "evil").exists()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": Evil()}, 2))
    buffer = io.BytesIO(path.read_bytes()[:40])
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="not a checkpoint that contains only tensors"):
        read_torch(path)


def test_index_must_match_the_files(tmp_path):
    weights = make_model_folder(tmp_path / "external", "gpt2")
    folder = tmp_path / "external"
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    index = folder / "model.safetensors.index.json"

    def check(table: dict[str, str], reason: str | None) -> None:
        index.write_text(json.dumps({"weight_map": table}))
        if reason is None:
            assert len(open_huggingface(folder).arrays) > 0
            return
        with pytest.raises(CheckpointError, match=reason):
            open_huggingface(folder)

    check(weight_map, None)
    check(weight_map | {names[0]: "../../secret"}, "not the name of a file in the same folder")
    check(weight_map | {names[0]: "c.safetensors"}, r"c\.safetensors is missing")
    check({key: file for key, file in weight_map.items() if key != names[0]}, "not according to the index")
    save_file({key: weights[key] for key in names[4:]}, folder / "b.safetensors")
    check(weight_map, f"{names[4]} is in b.safetensors and in another file")


# With torch
@pytest.mark.parametrize("name", [*CASES, *LIVE_CASES])
def test_round_trip_from_transformers(name, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "MAX_FILE_BYTES", 6_000)  # several files and an index on both sides
    case = (CASES | LIVE_CASES)[name]
    model, _ = make_torch(case)
    import torch

    model.save_pretrained(tmp_path / "external", max_shard_size="6KB")
    export(tmp_path / "external", tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("model-*-of-*.safetensors"))) > 1
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_bin_files_are_read_without_torch(tmp_path):
    model, _ = make_torch(CASES["gpt-j"])
    import torch

    state = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = read_torch(tmp_path / "pytorch_model.bin")
    assert found.keys() == state.keys()
    for key, array in found.items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array.read(full_index(array)).astype(np.float32), state[key].float().numpy())
    torch.save(state, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)  # as before PyTorch 1.6
    legacy = read_torch(tmp_path / "legacy.bin")
    assert legacy.keys() == found.keys()
    for key, array in legacy.items():
        np.testing.assert_array_equal(array.read(full_index(array)), found[key].read(full_index(found[key])))
    (tmp_path / "short.bin").write_bytes((tmp_path / "legacy.bin").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"its tensors end at .*; copy or download it again"):
        read_torch(tmp_path / "short.bin")
    torch.save({"a": torch.ones(3, 4).T}, tmp_path / "transposed.bin")
    with pytest.raises(CheckpointError, match="a is not contiguous"):
        read_torch(tmp_path / "transposed.bin")


def test_config_of_encoder_decoder_models(tmp_path):
    make_model_folder(tmp_path / "switch", "switch")
    edit_config(tmp_path / "switch", num_sparse_decoder_layers=2)
    with pytest.raises(
        CheckpointError,
        match=r"with N = 2 in the encoder and N = 1 in the decoder .*supported: N = 1 or 2, the same in both",
    ):
        open_huggingface(tmp_path / "switch")
    edit_config(tmp_path / "switch", num_sparse_decoder_layers=1, num_experts=5)
    with pytest.raises(CheckpointError, match="5 experts, the files have 4 per layer; correct num_experts if"):
        open_huggingface(tmp_path / "switch")
    for key, value in (("router_bias", True), ("router_dtype", "bfloat16"), ("is_gated_act", True)):
        make_model_folder(tmp_path / key, "switch")
        edit_config(tmp_path / key, **{key: value})
        with pytest.raises(CheckpointError, match=f"{key} = {json.dumps(value)} is not supported"):
            open_huggingface(tmp_path / key)
    weights = make_model_folder(tmp_path / "t5", "t5-v1.1")
    # transformers 5 writes tie_word_embeddings = true although the head differs; old files store the embedding three times.
    edit_config(tmp_path / "t5", tie_word_embeddings=True, scale_decoder_outputs=False)
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    weights["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros((32, 2), np.float32)
    save_file(weights, tmp_path / "t5" / "model.safetensors")
    plan = open_huggingface(tmp_path / "t5")
    assert not plan.model["tied_embeddings"]
    assert plan.notes == ("encoder.embed_tokens.weight equals shared.weight and is stored once",)
    save_file(
        weights | {"encoder.embed_tokens.weight": weights["shared.weight"] + 1}, tmp_path / "t5" / "model.safetensors"
    )
    with pytest.raises(
        CheckpointError,
        match=r"encoder\.embed_tokens\.weight differs from shared\.weight, but the model has one array for both",
    ):
        open_huggingface(tmp_path / "t5")
    alone = ModelConfig(**T5 | dict(n_layers=2, d_model=8, n_heads=2, n_vocab=9, seq_len=8))
    with pytest.raises(CheckpointError, match="no Hugging Face family computes the function of this model"):
        find_family(alone)


def test_export_keeps_the_family_and_writes_only_its_keys(tmp_path):
    make_model_folder(tmp_path / "mistral", "llama-gqa")
    edit_config(tmp_path / "mistral", model_type="mistral", sliding_window=None)
    plan = open_huggingface(tmp_path / "mistral")
    assert find_family(plan.config)[0] == "llama", "the first of the families with this function"
    kind, table = find_family(plan.config, "mistral")
    assert kind == "mistral"
    assert not table.keys() & {"attention_bias", "mlp_bias", "use_sliding_window", "max_window_layers"}
    assert "sliding_window" not in find_family(plan.config)[1]
    windows = ("global", "local", "local")
    qwen = ModelConfig(**LLAMA | dict(n_layers=3, d_model=8, n_heads=2, n_vocab=9, seq_len=8, qkv_bias=True))
    _, table = find_family(dataclasses.replace(qwen, attention_pattern=windows, attention_window=4), "qwen2")
    assert (table["max_window_layers"], table["sliding_window"]) == (1, 4)
    assert "mlp_bias" not in table


def test_the_quickstart_model_has_a_family():
    config = load_config(Path(__file__).parents[3] / "configs" / "quickstart.toml").model
    assert find_family(config)[0] == "arcee"
