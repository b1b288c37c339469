# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of scripts/import_config.py: configurations of other projects are translated with a note on each key, or rejected."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mesh_transformer.config import Config, parse_config, parse_model
from mesh_transformer.config.presets import PRESETS

ROOT = Path(__file__).parents[2]
GPT_J = dict(
    layers=28, d_model=4096, n_heads=16, n_vocab=50400, norm="layernorm", pe="rotary", pe_rotary_dims=64, seq=2048,
    cores_per_replica=8, per_replica_batch=1, gradient_accumulation_steps=16, warmup_steps=3000, anneal_steps=300000,
    lr=1.2e-4, end_lr=1.2e-5, weight_decay=0.1, total_steps=350000, tpu_size=256, bucket="b", model_dir="gptj",
    train_set="pile.train.index", val_set={"pile": "pile.val.index"}, val_batches=100, val_every=500, ckpt_every=500,
    keep_every=10000, name="GPT-J", comment="",
)  # fmt: skip
NEO = dict(
    n_head=20, n_vocab=50257, embed_dropout=0, lr=1.6e-4, lr_decay="cosine", warmup_steps=3000, beta1=0.9, beta2=0.95,
    epsilon=1e-8, opt_name="adam", weight_decay=0.1, train_batch_size=512, attn_dropout=0, train_steps=400000,
    eval_steps=10, res_dropout=0, n_embd=2560, datasets=[["pile", 25, "documents_random", 1.0]], n_ctx=2048, n_layer=32,
    model_path="gs://b/neo", scale_by_depth=True, attention_types=[[["global", "local"], 16]], mesh_shape="x:64,y:4",
    activation_function="gelu", recompute_grad=True, gradient_clipping=1.0, precision="bfloat16", moe_layers=[],
)  # fmt: skip
NEOX = """# GPT-NeoX's files are YAML in JSON style
{
  "num-layers": 44, "hidden-size": 6144, "num-attention-heads": 64, "seq-length": 2048, # a "comment" { here
  "max-position-embeddings": 2048, "norm": "layernorm", "pos-emb": "rotary", "rotary_pct": 0.25, "no-weight-tying": true,
  "gpt_j_residual": true, "bias-gelu-fusion": true, "init_method": "small_init", "output_layer_init_method": "wang_init",
  "model-parallel-size": 2, "pipe-parallel-size": 4, "train_micro_batch_size_per_gpu": 4, "weight-decay": 0.01,
  "optimizer": {"type": "Adam", "params": {"lr": 0.97e-4, "betas": [0.9, 0.95], "eps": 1.0e-8, }},
  "min_lr": 0.97e-5, "gradient_accumulation_steps": 32, "zero_optimization": {"stage": 1, "allgather": True, },
  "hidden-dropout": 0, "attention-dropout": 0, "train-iters": 150000, "lr-decay-iters": 150000, "warmup": 0.01,
  "lr-decay-style": "cosine", "tokenizer_type": "HFTokenizer", "vocab-file": "20B_tokenizer.json", "mystery": 3,
}
"""


def call(*arguments, expect: int = 0) -> tuple[str, str]:
    command = [sys.executable, str(ROOT / "scripts/import_config.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done.stdout, done.stderr


def write(folder: Path, table, name="old.json") -> Path:
    path = folder / name
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


def output_fields(preset: str) -> dict:
    """Return the model fields that determine the outputs of a preset, except n_vocab, which programs pad."""
    fields = parse_model(PRESETS[preset], where=preset).effective_fields()
    return {key: value for key, value in fields.items() if key != "n_vocab"}


def parse_and_compare(toml: str, preset: str) -> Config:
    """Return the parsed configuration, whose model must compute what the preset does."""
    config = parse_config(tomllib.loads(toml), where="test")
    found = config.model.effective_fields()
    assert {key: found[key] for key in output_fields(preset)} == output_fields(preset)
    return config


def test_gpt_j(tmp_path):
    toml, report = call(write(tmp_path, GPT_J))
    config = parse_and_compare(toml, "gptj-6b")
    assert (config.train.batch_size, config.train.grad_accum_steps) == (512, 16)
    assert (config.optimizer.schedule, config.optimizer.beta2, config.train.z_loss) == ("gptj", 0.999, 1e-4)
    for key in GPT_J:
        assert f"\n{key} " in f"\n{report}", key
    assert "1,048,576 tokens per step" in report
    assert "learning rate at the last step: 1.2e-05" in report
    assert "7 DANGEROUS, 0 UNKNOWN" in report
    half, _ = call(write(tmp_path, GPT_J), "--devices", 128)
    assert parse_and_compare(half, "gptj-6b").train.batch_size == 256


def test_gpt_neo(tmp_path):
    toml, report = call(write(tmp_path, NEO))
    expected = output_fields("gpt-neo-2.7b") | {
        "attention_scale": 128**-0.5  # d_head is 128
    }  # for training from scratch; the notes say so
    config = parse_config(tomllib.loads(toml), where="test")
    found = config.model.effective_fields()
    assert {key: found[key] for key in expected} == expected
    assert config.train.batch_size * config.model.seq_len == 2**20
    assert 'weights trained with GPT-Neo need "none"' in report
    assert "moe_layers" in report
    assert "ignored because it is disabled" in report


def test_gpt_neox_in_two_files(tmp_path):
    files = write(tmp_path, NEOX, "20B.yml"), write(tmp_path, '{"data-path": "data/pile"}', "local.yml")
    toml, report = call(*files, "--devices", 96)
    config = parse_and_compare(toml, "gpt-neox-20b")
    assert config.train.batch_size == 4 * 32 * 12
    assert (config.optimizer.warmup_steps, config.model.n_vocab) == (1500, 50432)
    assert "1 UNKNOWN" in report
    assert "pass it as --devices N" in call(*files, expect=2)[1]


def test_block_yaml_and_json_with_tabs_are_equivalent(tmp_path):
    import yaml

    table = yaml.safe_load(NEOX)
    table["optimizer"]["params"]["lr"] = "1e-4"  # YAML 1.1 parses this as a string, because it has no dot
    blocks = yaml.safe_dump(table | {"min_lr": 1e-5}).replace("'1e-4'", "1e-4") + "data-path: data/pile\n"
    assert "num-layers: 44\n" in blocks
    toml, report = call(write(tmp_path, blocks, "20B.yml"), "--devices", 96)
    config = parse_and_compare(toml, "gpt-neox-20b")
    assert config.optimizer.learning_rate == 1e-4
    assert "1 UNKNOWN" in report
    toml, _ = call(write(tmp_path, json.dumps(GPT_J, indent="\t")))
    parse_and_compare(toml, "gptj-6b")


REJECTED = {
    "null": ({**GPT_J, "lr": None}, "optimizer.learning_rate = null: must be a valid number"),
    "unknown": ({"a": 1, "layers": 2}, "not a configuration of mesh-transformer-jax, GPT-Neo, GPT-NeoX"),
    "duplicate key": ('{"layers": 1, "layers": 2}', "the key layers occurs twice"),
    "neither JSON nor YAML": ("num-layers: [3\n", "old.json:2: neither JSON nor YAML"),
    "list": ("[1]", "expected a mapping of keys to values at the top level, but it is a list"),
    "cores": ({**GPT_J, "tpu_size": 12}, "tpu_size = 12 is not a multiple of cores_per_replica = 8; set --devices"),
    "norm": ({**GPT_J, "norm": "batchnorm"}, 'norm = "batchnorm" or pe = "rotary" is not supported'),
    "heads": ({**GPT_J, "n_heads": 3}, "d_model=4096 is not a multiple of n_heads=3"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_errors_are_one_line(name, tmp_path):
    table, message = REJECTED[name]
    out, err = call(write(tmp_path, table), expect=2)
    assert not out
    assert message in err


def test_missing_keys_are_named_and_files_are_not_overwritten(tmp_path):
    table = {key: value for key, value in GPT_J.items() if key not in ("lr", "norm")}
    assert "these keys are missing: norm, lr" in call(write(tmp_path, table), expect=2)[1]
    old = write(tmp_path, GPT_J)
    assert call(old, "--output", tmp_path / "new.toml")[0] == ""
    parse_and_compare((tmp_path / "new.toml").read_text(), "gptj-6b")
    assert "exists" in call(old, "--output", tmp_path / "new.toml", expect=2)[1]
