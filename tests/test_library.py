# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The Python library: what the programs do, from Python, with equal results."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mesh_transformer as mt

ROOT = Path(__file__).parents[1]
SMALL = [
    "model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.seq_len=64", "train.steps=6", "train.batch_size=8",
    "optimizer.warmup_steps=1", "train.evaluate_every=0", "train.evaluate_batches=1", "checkpoint.every=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"the {number}th text of a library that trains a small model\n" * 20)
    overrides = [
        f'run.dir="{folder / "run"}"',
        f'data.train={{texts={{path="{texts}"}}}}',
        f'data.cache_dir="{folder / "cache"}"',
    ]
    return mt.train_model("quickstart", [*SMALL, "data.holdout_one_in=5", *overrides])


def test_importing_does_not_import_jax():
    program = """
import sys, mesh_transformer as mt
assert "load_model" in dir(mt)
assert not {"jax", "pydantic"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_an_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'lode_model'; public names: .*load_model"):
        mt.lode_model  # noqa: B018


def test_train_resumes_and_returns_the_run_folder(run_dir):
    assert (Path(run_dir) / "report.html").is_file()
    config = mt.load_config(Path(run_dir) / "config.toml")
    assert mt.train_model(config) == run_dir
    with pytest.raises(mt.ConfigError, match=r"overrides=.* need a configuration file, but `config` is a Config"):
        mt.train_model(config, ["train.steps=7"])


def test_generate_equals_the_program(run_dir):
    model = mt.load_model(run_dir)
    assert model.step == 6
    assert repr(model).startswith("Model(")
    program = [
        sys.executable,
        "device_sample.py",
        run_dir,
        "--prompt",
        "the ",
        "--max-tokens",
        "12",
        "--seed",
        "3",
        "--json",
    ]
    out = json.loads(subprocess.check_output(program, cwd=ROOT, text=True))
    assert model.generate("the ", max_tokens=12, seed=3) == out["text"]
    assert "".join(model.stream("the ", max_tokens=12, seed=3)) == out["text"]
    several = model.generate(["the ", "a "], n=2, max_tokens=5)
    assert [completion.prompt for completion in several] == ["the ", "the ", "a ", "a "]
    assert all(len(completion.tokens) <= 5 for completion in several)


def test_closing_a_stream_ends_its_sample(run_dir):
    model = mt.load_model(run_dir)
    stream = model.stream("the ", max_tokens=40)
    next(stream)
    stream.close()
    assert model.generate("the ", max_tokens=3, seed=1) == mt.load_model(run_dir).generate("the ", max_tokens=3, seed=1)
    assert model._loaded.engine.idle  # the closed stream is not decoded any more


def test_logits_are_those_that_are_sampled_from(run_dir):
    model = mt.load_model(run_dir)
    text = "the 3th text"
    logits = model.logits(text)
    assert logits.shape == (len(model.tokenizer.encode(text)), model.config.model.n_vocab)
    (completion,) = model.generate([text], max_tokens=1, temperature=0.0)
    assert completion.tokens == [int(np.argmax(logits[-1]))]
    assert model.logits(model.tokenizer.encode(text)) == pytest.approx(logits)


def test_mistakes_are_explained(run_dir):
    model = mt.load_model(run_dir)
    with pytest.raises(mt.ConfigError, match="temprature is not a sampling parameter; expected one of: max_tokens"):
        model.generate("the ", temprature=1.0)
    with pytest.raises(ValueError, match="logits need at least 1 token"):
        model.logits("")
    with pytest.raises(mt.ConfigError, match="shard is not an option of reshard"):
        mt.reshard(run_dir, "out", shard=1)


def test_reshard_gives_a_model_with_the_same_logits(run_dir, tmp_path):
    report = mt.reshard(run_dir, tmp_path / "copy", weights_only=True)
    assert report["format"] == "native"
    assert mt.load_model(tmp_path / "copy").logits("the ") == pytest.approx(mt.load_model(run_dir).logits("the "))


def test_make_mesh():
    layout = mt.make_mesh(fsdp=2, tensor=2)
    assert dict(layout.mesh.shape) == {"data": 2, "pipeline": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    with pytest.raises(mt.ConfigError, match="devices"):
        mt.make_mesh(fsdp=3)
