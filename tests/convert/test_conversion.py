# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""scripts/reshard_checkpoint.py: verified, resumable and bounded in memory; a failure leaves no result."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from reference_models import make_model_folder
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.checkpoint.store import find_checkpoint
from mesh_transformer.config import ModelConfig, parse_model
from mesh_transformer.config.presets import LLAMA, PRESETS
from mesh_transformer.convert import library_logits
from mesh_transformer.convert.bit_check import verify_bits
from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.convert.destination import check_destination
from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.reader import find_family, pack_tensors
from mesh_transformer.convert.huggingface.tensor_files import TensorSpec, create_safetensors
from mesh_transformer.convert.lazy_arrays import full_index
from mesh_transformer.convert.progress import no_progress
from mesh_transformer.convert.readers import open_checkpoint
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import count_params, describe_params
from mesh_transformer.storage.resume_log import LOG_FILE, open_staging_log

ROOT = Path(__file__).parents[2]
V1 = ROOT.parent / "shared" / "fixtures" / "gptj_v1_4shards"
CONFIG = ModelConfig(**LLAMA | dict(n_layers=3, d_model=48, n_heads=4, n_kv_heads=2, n_vocab=264, seq_len=32, d_ff=80))


@pytest.fixture(scope="module")
def external(tmp_path_factory) -> Path:
    """A model folder with random weights and no tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "external"
    folder.mkdir()
    kind, table = find_family(CONFIG)
    (folder / "config.json").write_text(json.dumps(table))
    rng = np.random.default_rng(0)
    block = dict(embed=48, ff=80, heads=48, kv=24)
    shapes = {"model.embed_tokens": (264, 48), "lm_head": (264, 48), "model.norm": (48,)}
    for i in range(3):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}_layernorm": (48,) for norm in ("input", "post_attention")}
        shapes |= {
            f"{layer}.self_attn.{x}_proj": (block[rows], 48) for x, rows in dict(q="heads", k="kv", v="kv").items()
        }
        shapes |= {f"{layer}.self_attn.o_proj": (48, 48), f"{layer}.mlp.down_proj": (48, 80)}
        shapes |= {f"{layer}.mlp.{x}_proj": (80, 48) for x in ("gate", "up")}
    weights = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) / 7 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    assert kind == "llama"
    return folder


def call(*arguments, expect: int = 0, **options) -> SimpleNamespace:
    """Run the program as a user does."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "scripts/reshard_checkpoint.py", "--verify", "own", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **options)
    assert done.returncode == expect, done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr)


def values(path: Path) -> dict[str, np.ndarray]:
    arrays = open_checkpoint(path).plan.values
    return {name: array.read(full_index(array)) for name, array in arrays.items()}


def test_round_trip_of_a_model_that_samples(external, tmp_path):
    report = json.loads(call(external, tmp_path / "native", "--tokenizer", "bytes", "--json").out)
    assert 0 < report["max_logit_difference"] < 1e-5, "both sides ran the same implementation"
    assert report["arrays"] == len(report["digests"]) == len(values(tmp_path / "native"))
    assert json.loads((tmp_path / "native" / "conversion.json").read_text()) == report
    sample = [sys.executable, "device_sample.py", tmp_path / "native", "--prompt", "a", "--max-tokens", "3", "--json"]
    drawn = subprocess.run(sample, cwd=ROOT, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    assert len(json.loads(drawn.stdout)["tokens"]) == 3
    text = call(tmp_path / "native", tmp_path / "again", "--format", "huggingface").out
    assert re.search(r"largest logit difference \d\.?\d*e-0[67] on 64 random tokens", text)
    before, after = (load_file(folder / "model.safetensors") for folder in (external, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert not list(tmp_path.glob("*.partial"))


def make_tokenizer(size: int) -> Tokenizer:
    """Return a byte-level tokenizer with an end-of-text token and unused entries."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", *map(str, range(100, size - 157))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return tokenizer


def test_tokenizer_and_small_files_are_carried_along(external, tmp_path):
    source = shutil.copytree(external, tmp_path / "external")
    texts = {
        "generation_config.json": '{"temperature": 0.6}',
        "chat_template.jinja": "{{ messages }} ü",
        "secret": "no",
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    settings = json.loads((source / "config.json").read_text()) | {"eos_token_id": [7, 8], "pad_token_id": 9}
    (source / "config.json").write_text(json.dumps(settings))
    tokenizer = make_tokenizer(257)
    tokenizer.save(str(source / "tokenizer.json"))
    call(source, tmp_path / "native")
    call(tmp_path / "native", tmp_path / "again", "--format", "huggingface")
    again = {path.name: path for path in (tmp_path / "again").iterdir()}
    assert again["generation_config.json"].read_text() == texts["generation_config.json"]
    assert again["chat_template.jinja"].read_text() == texts["chat_template.jinja"]
    assert "secret" not in again
    found = json.loads(again["config.json"].read_text())
    assert (found["eos_token_id"], found["pad_token_id"], "bos_token_id" in found) == ([7, 8], 9, False)
    assert Tokenizer.from_file(str(again["tokenizer.json"])).get_vocab() == tokenizer.get_vocab()
    make_tokenizer(301).save(str(source / "tokenizer.json"))
    refused = call(source, tmp_path / "more", expect=2).err
    assert "the tokenizer has 301 tokens, but the model has embeddings of only 264" in refused


def test_cast_is_reported(external, tmp_path):
    report = json.loads(call(external, tmp_path / "half", "--dtype", "bfloat16", "--json").out)
    assert 0 < report["max_logit_difference"] < 0.3
    assert all(array.dtype.name == "bfloat16" for array in values(tmp_path / "half").values())
    refused = call(tmp_path / "half", tmp_path / "out", "--max-memory", "lots", expect=2).err
    assert "--max-memory lots: expected a size such as 256M" in refused


def test_destination_is_kept_unless_overwritten(external, tmp_path):
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "precious").write_text("")
    assert "--overwrite" in call(external, tmp_path / "native", expect=1).err
    assert (tmp_path / "native" / "precious").exists()
    call(external, tmp_path / "native", "--overwrite")
    assert not (tmp_path / "native" / "precious").exists()
    assert find_checkpoint(tmp_path / "native")[1] == 0


def test_full_disk_is_refused_at_the_start(external, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="1,000 bytes are free"):
        check_destination(tmp_path / "native", False, 10**9)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_killed_conversion_resumes(external, tmp_path, form):
    program = f"""
import os, signal, sys
sys.path.insert(0, "scripts")
import reshard_checkpoint
from mesh_transformer.storage.resume_log import ResumeLog
add, seen = ResumeLog.add, []
def counted(log, key, value):
    add(log, key, value)
    seen.append(key)
    if len(seen) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
ResumeLog.add = counted
reshard_checkpoint.main([{str(external)!r}, {str(tmp_path / "native")!r}, "--format", {form!r}])
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "native").exists()
    log_file = tmp_path / "native.partial" / LOG_FILE
    done = log_file.read_text().splitlines()
    assert len(done) == 6
    with open(log_file, "a") as file:
        file.write('["half a li')
    blocks = {path.relative_to(log_file.parent).as_posix().split(".tmp-blocks/")[-1]: path.stat().st_mtime_ns
              for path in log_file.parent.rglob("c.*")}  # fmt: skip
    call(external, tmp_path / "native", "--format", form)
    expected, found = values(external), values(tmp_path / "native")
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    if form == "native":  # a finished block was not written again
        logged = {f"arrays/{name}/{key}" for line in done[1:] for name, key, *_ in json.loads(line)[1]}
        assert len(logged) == 5
        again = {
            path.as_posix().split("/step_0/")[-1]: path.stat().st_mtime_ns
            for path in (tmp_path / "native").rglob("c.*")
        }
        assert all(again[path] == blocks[path] for path in logged)


def test_log_of_another_conversion_is_discarded(tmp_path):
    staging = tmp_path / "x.partial"
    with open_staging_log(staging, {"source": "a"}) as log:
        log.add("block", 1)
    (staging / "data").write_text("of a")
    with open_staging_log(staging, {"source": "a"}) as log:
        assert log.done == {"block": 1}
    with open_staging_log(staging, {"source": "b"}) as log:
        assert log.done == {}
    assert not (staging / "data").exists()


def test_result_with_a_flipped_bit_is_refused(external, tmp_path):
    shutil.copytree(external, tmp_path / "copy")
    source, result = open_checkpoint(external), open_checkpoint(tmp_path / "copy")
    assert len(verify_bits(source.plan, result.plan, None, no_progress)) == len(source.plan.arrays)
    path = tmp_path / "copy" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="the result differs from the source"):
        verify_bits(source.plan, result.plan, None, no_progress)


def test_damaged_source_leaves_no_result(external, tmp_path):
    call(external, tmp_path / "native")
    victim = next((tmp_path / "native").rglob("w_tokens/c.0.0"))
    data = bytearray(victim.read_bytes())
    data[1000] ^= 1
    victim.write_bytes(data)
    assert "w_tokens" in call(tmp_path / "native", tmp_path / "out", expect=1).err
    assert not (tmp_path / "out").exists()


def test_other_folders_are_refused(tmp_path):
    assert "no such folder" in call(tmp_path / "nowhere", tmp_path / "out", expect=1).err
    (tmp_path / "empty").mkdir()
    assert "contains no checkpoint" in call(tmp_path / "empty", tmp_path / "out", expect=1).err
    (tmp_path / "old" / "step_1" / "shard_0").mkdir(parents=True)
    assert "--source-config" in call(tmp_path / "old", tmp_path / "out", expect=1).err


def test_wrong_tensor_map_is_found_by_the_logits(external, tmp_path):
    """Names that are swapped for reading and writing pass every comparison of arrays, but change the logits."""
    program = """
import sys
sys.path.insert(0, "scripts")
import reshard_checkpoint
from mesh_transformer.convert.huggingface import tensor_map
up, gate = (tensor_map.LLAMA[f"feed_forward/w_{x}"] for x in ("in", "gate"))
tensor_map.LLAMA |= {"feed_forward/w_in": gate, "feed_forward/w_gate": up}
sys.exit(reshard_checkpoint.run_command(reshard_checkpoint.main))
"""
    command = [sys.executable, "-c", program, external, tmp_path / "native"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"logits of .* and of the result differ by .*the result was deleted", done.stderr)
    assert not list(tmp_path.iterdir())


class Unread(NamedTuple):
    """An array whose values must not be read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_local: bool = True

    @property
    def read_granularity(self) -> tuple[int, ...]:
        return (1,) * len(self.shape)

    def read(self, index):
        raise AssertionError("a plan read values")


def test_plan_of_6b_parameters_reads_no_weights(tmp_path):
    config = parse_model(PRESETS["gptj-6b"], where="test")
    kind, table = find_family(config)
    weights = flatten_names(describe_params(config))
    arrays = {f"params/{name}": Unread(info.shape, np.dtype("float16")) for name, info in weights.items()}
    tensors = pack_tensors(config, arrays, FAMILIES[kind])
    folder = tmp_path / "gptj"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(table))
    # The file is sparse: its values take no space on the disk.
    create_safetensors(
        folder / "model.safetensors", {name: TensorSpec(t.shape, t.dtype) for name, t in tensors.items()}
    )
    report = json.loads(call(folder, tmp_path / "native", "--max-memory", "2G", "--plan", "--json").out)
    assert report["bytes"] == 2 * 6_050_882_784 == 2 * count_params(config)
    text = call(folder, tmp_path / "v1", "--max-memory", "256M", "--plan", "--format", "gptj-v1").out
    assert "12,101,765,568 bytes to write" in text
    assert not [path for path in tmp_path.iterdir() if path != folder]
    refused = call(folder, tmp_path / "v1", "--plan", "--format", "gptj-v1", "--shards", 3, expect=1).err
    assert "n_heads = 16 is not a multiple of 3 shards" in refused


def run_here(source, destination, **options) -> dict:
    """Convert in this process."""
    return convert(ConversionOptions(**dict(source=str(source), destination=str(destination), verify="own") | options))


@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_values_that_float16_lacks_are_refused(external, tmp_path, form):
    shutil.copytree(external, tmp_path / "source")
    weights = load_file(external / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, tmp_path / "source" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"norm.*: the value 1e\+06 is too large for float16; pass --dtype bfloat16"
    ):
        run_here(tmp_path / "source", tmp_path / "out", format=form, dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_destination_must_be_a_folder_of_its_own(external, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    for destination, reason in (
        (".", "the current folder or contains it"),
        ("..", "the current"),
        ("file", "is a file"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            run_here(external, destination, overwrite=True)
    assert (tmp_path / "file").read_text() == "kept"


def test_decoder_start_is_kept(tmp_path):
    make_model_folder(tmp_path / "source", "t5")
    table = json.loads((tmp_path / "source" / "config.json").read_text()) | {
        "decoder_start_token_id": 7,
        "pad_token_id": 3,
    }
    (tmp_path / "source" / "config.json").write_text(json.dumps(table))
    run_here(tmp_path / "source", tmp_path / "native")
    store, step = find_checkpoint(tmp_path / "native")
    assert store.read_meta(step)["special_ids"]["decoder_start_token_id"] == 7
    for start in ("source", "native"):
        run_here(tmp_path / start, tmp_path / "back", format="huggingface", overwrite=True)
        table = json.loads((tmp_path / "back" / "config.json").read_text())
        assert (table["decoder_start_token_id"], table["pad_token_id"]) == (7, 3)


@pytest.mark.skipif(not V1.exists(), reason="the mesh-transformer-jax fixtures are not available (../shared/fixtures)")
def test_v1_checkpoint_with_its_optimizer_is_imported(tmp_path):
    run_here(V1 / "full", tmp_path / "native", source_config=str(V1 / "config.json"))
    arrays = values(tmp_path / "native")
    moments = [name for name in arrays if not name.startswith("params/")]
    assert any(arrays[name].shape == () and arrays[name].dtype == np.int32 and arrays[name] > 0 for name in moments)
    assert any(arrays[name].size > 1 for name in moments)


@pytest.mark.slow
def test_transformers_finds_what_both_readings_share(external, tmp_path, monkeypatch):
    """A misreading of config.json by the importer and the NumPy reimplementation is revealed by transformers."""
    pytest.importorskip("transformers", reason="needs pip install transformers torch")
    pytest.importorskip("torch", reason="needs pip install transformers torch")
    monkeypatch.setattr(library_logits, "subprocess", subprocess)  # a process of its own, as users run it
    report = run_here(external, tmp_path / "out", verify="transformers")
    assert re.match(
        r"source: transformers \d.*, LlamaForCausalLM; result: the Mesh Transformer model$", report["logits_compared"]
    )
    assert report["max_logit_difference"] < 1e-4
    misread = HFConfig.rope_parameters
    monkeypatch.setattr(HFConfig, "rope_parameters", lambda self: misread(self) | {"rope_theta": 100.0})
    assert "both belong to this project" in run_here(external, tmp_path / "own")["logits_compared"]
    with pytest.raises(CheckpointError, match=r"the logits of .* differ by"):
        run_here(external, tmp_path / "wrong", verify="transformers")


def test_without_transformers_the_own_reading_is_said(external, tmp_path, monkeypatch):
    monkeypatch.setattr(library_logits, "unavailable_reason", lambda *_: "transformers is not installed")
    report = run_here(external, tmp_path / "out", verify="auto")
    assert "both belong to this project" in report["logits_compared"]
    assert report["notes"] == ["the logits were not compared with those of transformers: transformers is not installed"]
    with pytest.raises(
        CheckpointError, match="--verify transformers: transformers is not installed; pass --verify own"
    ):
        run_here(external, tmp_path / "more", verify="transformers")
    monkeypatch.setitem(FAMILIES, "llama", FAMILIES["llama"]._replace(reference=None))
    report = run_here(external, tmp_path / "neither", verify="own")
    assert report["logits_compared"].startswith("no: transformers is the only other implementation")
    assert "max_logit_difference" not in report
