# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Conversions as they are called: proved, resumable, in bounded memory, and leaving nothing that looks complete."""

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
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.checkpoint.store import find_checkpoint
from mesh_transformer.config import ModelConfig, parse_model
from mesh_transformer.config.presets import LLAMA, PRESETS
from mesh_transformer.convert import reshard
from mesh_transformer.convert.huggingface.reader import pack_tensors, find_family
from mesh_transformer.convert.huggingface.tensor_files import TensorSpec, create_safetensors
from mesh_transformer.convert.huggingface.tensor_map import FAMILIES
from mesh_transformer.convert.lazy_arrays import full_index
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import count_params, describe_params

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(**LLAMA | dict(n_layers=3, d_model=48, n_heads=4, n_kv_heads=2, n_vocab=264, seq_len=32, d_ff=80))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A model folder with random weights and no tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "theirs"
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
    """The program, as a user runs it."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "scripts/reshard_checkpoint.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **options)
    assert done.returncode == expect, done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr)


def values(path: Path) -> dict[str, np.ndarray]:
    arrays = reshard.open_source(path).foreign.arrays
    return {name: array.read(full_index(array)) for name, array in arrays.items()}


def test_a_model_becomes_ours_samples_and_goes_back(theirs, tmp_path):
    report = json.loads(call(theirs, tmp_path / "ours", "--tokenizer", "bytes", "--json").out)
    assert 0 < report["max_logit_difference"] < 1e-5, "two programs, one function"
    assert report["arrays"] == len(report["digests"]) == len(values(tmp_path / "ours"))
    assert json.loads((tmp_path / "ours" / "conversion.json").read_text()) == report
    sample = [sys.executable, "device_sample.py", tmp_path / "ours", "--prompt", "a", "--max-tokens", "3", "--json"]
    drawn = subprocess.run(sample, cwd=ROOT, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    assert len(json.loads(drawn.stdout)["tokens"]) == 3
    text = call(tmp_path / "ours", tmp_path / "again", "--format", "huggingface").out
    assert re.search(r"largest logit difference \d\.?\d*e-0[67] of 64 random tokens", text)
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert not list(tmp_path.glob("*.partial"))


def make_tokenizer(size: int) -> Tokenizer:
    """Bytes, an end of text, and entries that no text uses."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", *map(str, range(100, size - 157))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return tokenizer


def test_what_came_with_the_weights_goes_with_them(theirs, tmp_path):
    source = shutil.copytree(theirs, tmp_path / "theirs")
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
    call(source, tmp_path / "ours")
    call(tmp_path / "ours", tmp_path / "again", "--format", "huggingface")
    again = {path.name: path for path in (tmp_path / "again").iterdir()}
    assert again["generation_config.json"].read_text() == texts["generation_config.json"]
    assert again["chat_template.jinja"].read_text() == texts["chat_template.jinja"]
    assert "secret" not in again
    found = json.loads(again["config.json"].read_text())
    assert (found["eos_token_id"], found["pad_token_id"], "bos_token_id" in found) == ([7, 8], 9, False)
    assert Tokenizer.from_file(str(again["tokenizer.json"])).get_vocab() == tokenizer.get_vocab()
    make_tokenizer(301).save(str(source / "tokenizer.json"))
    refused = call(source, tmp_path / "more", expect=2).err
    assert "the tokenizer has 301 entries, the model has rows for 264" in refused


def test_a_cast_is_named_and_bounded(theirs, tmp_path):
    report = json.loads(call(theirs, tmp_path / "half", "--dtype", "bfloat16", "--json").out)
    assert 0 < report["max_logit_difference"] < 0.3
    assert all(array.dtype.name == "bfloat16" for array in values(tmp_path / "half").values())
    refused = call(tmp_path / "half", tmp_path / "out", "--max-memory", "lots", expect=2).err
    assert "--max-memory lots: expected a size such as 256M" in refused


def test_what_exists_stays_unless_overwritten(theirs, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").write_text("")
    assert "--overwrite" in call(theirs, tmp_path / "ours", expect=1).err
    assert (tmp_path / "ours" / "precious").exists()
    call(theirs, tmp_path / "ours", "--overwrite")
    assert not (tmp_path / "ours" / "precious").exists()
    assert find_checkpoint(tmp_path / "ours")[1] == 0


def test_a_full_disk_is_seen_before_the_start(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="1,000 bytes are free"):
        reshard.check_destination(tmp_path / "ours", False, 10**9)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_a_killed_conversion_goes_on(theirs, tmp_path, form):
    program = f"""
import os, signal, sys
sys.path.insert(0, "scripts")
import reshard_checkpoint
from mesh_transformer.convert import reshard
add, seen = reshard.Journal.add, []
def counted(journal, key, value):
    add(journal, key, value)
    seen.append(key)
    if len(seen) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
reshard.Journal.add = counted
reshard_checkpoint.main([{str(theirs)!r}, {str(tmp_path / "ours")!r}, "--format", {form!r}])
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "ours").exists()
    journal = tmp_path / "ours.partial" / "journal.jsonl"
    done = journal.read_text().splitlines()
    assert len(done) == 6
    with open(journal, "a") as file:
        file.write('["half a li')
    blocks = {path.relative_to(journal.parent).as_posix().split(".tmp-blocks/")[-1]: path.stat().st_mtime_ns
              for path in journal.parent.rglob("c.*")}  # fmt: skip
    call(theirs, tmp_path / "ours", "--format", form)
    expected, found = values(theirs), values(tmp_path / "ours")
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    if form == "native":  # a block that was done was not written again
        logged = {f"arrays/{name}/{key}" for line in done[1:] for name, key, *_ in json.loads(line)[1]}
        assert len(logged) == 5
        again = {
            path.as_posix().split("/step_0/")[-1]: path.stat().st_mtime_ns for path in (tmp_path / "ours").rglob("c.*")
        }
        assert all(again[path] == blocks[path] for path in logged)


def test_a_conversion_of_something_else_starts_anew(tmp_path):
    first = reshard.Journal(tmp_path / "x.partial", {"source": "a"})
    first.add("block", 1)
    (tmp_path / "x.partial" / "data").write_text("of a")
    assert reshard.Journal(tmp_path / "x.partial", {"source": "a"}).done == {"block": 1}
    assert reshard.Journal(tmp_path / "x.partial", {"source": "b"}).done == {}
    assert not (tmp_path / "x.partial" / "data").exists()


def test_a_result_that_differs_in_a_bit_is_not_proved(theirs, tmp_path):
    shutil.copytree(theirs, tmp_path / "copy")
    source, result = reshard.open_source(theirs), reshard.open_source(tmp_path / "copy")
    assert len(reshard.prove(source.foreign, result.foreign, None, lambda *_: None)) == len(source.foreign.arrays)
    path = tmp_path / "copy" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="the result differs from the source"):
        reshard.prove(source.foreign, result.foreign, None, lambda *_: None)


def test_a_damaged_source_is_refused_and_nothing_looks_complete(theirs, tmp_path):
    call(theirs, tmp_path / "ours")
    victim = next((tmp_path / "ours").rglob("w_tokens/c.0.0"))
    data = bytearray(victim.read_bytes())
    data[1000] ^= 1
    victim.write_bytes(data)
    assert "w_tokens" in call(tmp_path / "ours", tmp_path / "out", expect=1).err
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_said(tmp_path):
    assert "no such folder" in call(tmp_path / "nowhere", tmp_path / "out", expect=1).err
    (tmp_path / "empty").mkdir()
    assert "contains no checkpoint" in call(tmp_path / "empty", tmp_path / "out", expect=1).err
    (tmp_path / "old" / "step_1" / "shard_0").mkdir(parents=True)
    assert "--source-config" in call(tmp_path / "old", tmp_path / "out", expect=1).err


def test_a_wrong_conversion_is_seen_and_nothing_is_kept(theirs, tmp_path):
    """Names that are exchanged both ways pass every comparison of arrays; what the model computes does not."""
    program = """
import sys
sys.path.insert(0, "scripts")
import reshard_checkpoint
from mesh_transformer.convert.huggingface.reader import tensor_map
up, gate = (tensor_map.LLAMA[f"feed_forward/w_{x}"] for x in ("in", "gate"))
tensor_map.LLAMA |= {"feed_forward/w_in": gate, "feed_forward/w_gate": up}
sys.exit(reshard_checkpoint.run_command(reshard_checkpoint.main))
"""
    command = [sys.executable, "-c", program, theirs, tmp_path / "ours"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"logits of .* and of the result differ by .*nothing was kept", done.stderr)
    assert not list(tmp_path.iterdir())


class Unread(NamedTuple):
    """An array that must not be read."""

    shape: tuple[int, ...]
    dtype: np.dtype


def test_six_billion_parameters_are_planned_without_reading_them(tmp_path):
    config = parse_model(PRESETS["gptj-6b"], where="test")
    kind, table = find_family(config)
    weights = flatten_names(describe_params(config))
    arrays = {f"params/{name}": Unread(info.shape, np.dtype("float16")) for name, info in weights.items()}
    tensors = pack_tensors(config, arrays, FAMILIES[kind])
    folder = tmp_path / "gptj"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(table))
    # A file with a hole where the values would be takes no room on the disk.
    create_safetensors(
        folder / "model.safetensors", {name: TensorSpec(t.shape, t.dtype) for name, t in tensors.items()}
    )
    report = json.loads(call(folder, tmp_path / "ours", "--max-memory", "2G", "--plan", "--json").out)
    assert report["bytes"] == 2 * 6_050_882_784 == 2 * count_params(config)
    text = call(folder, tmp_path / "v1", "--max-memory", "256M", "--plan", "--format", "gptj-v1").out
    assert "12,101,765,568 bytes to write" in text
    assert not [path for path in tmp_path.iterdir() if path != folder]
    refused = call(folder, tmp_path / "v1", "--plan", "--format", "gptj-v1", "--shards", 3, expect=1).err
    assert "n_heads = 16 is not a multiple of 3 shards" in refused
