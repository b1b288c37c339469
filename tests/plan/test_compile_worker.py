# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What is compiled is what trains, for devices that are here and for TPUs and GPUs that are not."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

import mesh_transformer
from mesh_transformer.config import Config, ConfigError, parse_config
from mesh_transformer.data.dataset import open_data
from mesh_transformer.mesh import make_layout
from mesh_transformer.plan.compile_jobs import compile_job
from mesh_transformer.plan.compile_worker import lower_training, make_topology_layout, measure, parse_refusal
from mesh_transformer.plan.estimate import LABEL, estimate_training
from mesh_transformer.plan.fit import make_plan
from mesh_transformer.plan.hardware.topologies import MissingCompilerError
from mesh_transformer.plan.job import CompileJob, CompiledStats, digest_code
from mesh_transformer.plan.report import format_plan, plan_to_json
from mesh_transformer.plan.suggestions import change_config, suggest_change, propose_changes
from mesh_transformer.train.run import open_run

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: .[plan]")
needs_cuda = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"), reason="the CUDA plugin is not installed: .[plan]"
)


def make_config(path: str = "made-up", **sections: dict) -> Config:
    table = {
        "model": dict(n_layers=2, d_model=64, n_heads=4, n_vocab=264, seq_len=64),
        "mesh": dict(fsdp=2, tensor=2),
        "data": {"train": {"texts": {"path": path}}},
        "train": dict(steps=10, batch_size=8),
    }
    for name, fields in sections.items():
        table[name] = {**table.get(name, {}), **fields}
    return parse_config(table, where="test")


def test_the_planned_program_is_the_trained_one(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the quick brown fox " * 400)
    folders = dict(run=dict(dir=str(tmp_path / "run")))
    config = make_config(str(tmp_path / "texts"), **folders)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=str(tmp_path / "cache")))
    data = open_data(config)
    run = open_run(config, data, make_layout(config.mesh), log=print)
    trained = run.train_step.lower(run.state, run.shard_batch(data.train.batch(0, 8), 8)).as_text()
    job = CompileJob(config=config, topology="cpu-8")
    planned, _ = lower_training(job, make_topology_layout(job))
    assert planned.as_text() == trained
    other = dataclasses.replace(job, config=change_config(config, ("optimizer.beta1=0.8",)))
    assert lower_training(other, make_topology_layout(other))[0].as_text() != trained


def test_what_a_cpu_program_needs():
    job = CompileJob(config=make_config(), topology="cpu-8")
    measured = measure(CompileJob.from_json(job.to_json()))
    assert CompiledStats.from_json(measured.to_json()) == measured
    assert measured.mesh == {**dict.fromkeys(measured.mesh, 1), "data": 2, "fsdp": 2, "tensor": 2}
    # Norms' scales, biases of the stream and the table of positions are cut by fsdp alone; all else by four.
    assert measured.parameters * 4 / 4 < measured.bytes_by_kind["parameters"] < measured.parameters * 4 / 2
    assert measured.state_bytes == pytest.approx(12 * measured.parameters, rel=0.01)
    assert measured.peak_bytes > sum(measured.bytes_by_kind.values())
    assert {row.kind for row in measured.traffic} >= {"all-gather", "all-reduce"}
    assert measured.hbm_bytes > measured.argument_bytes
    verdict = make_plan(job.config, measured)
    assert verdict.memory.fits is None
    assert sum(verdict.memory.bytes_by_kind.values()) == pytest.approx(measured.peak_bytes, rel=1e-3)
    assert json.loads(json.dumps(plan_to_json(verdict)))["estimated"] is False
    assert "not judged" in format_plan(verdict)


def test_digests_are_of_the_program():
    job = CompileJob(config=make_config(), topology="cpu-8")
    same = dataclasses.replace(job, config=make_config("elsewhere", run=dict(dir="there"), sample=dict(top_k=3)))
    assert job.digest() == same.digest()
    for change in ({"topology": "cpu-4"}, {"fast": True}, {"config": change_config(job.config, ("model.d_model=32",))}):
        assert dataclasses.replace(job, **change).digest() != job.digest()


def test_digests_are_of_the_code_too(tmp_path):
    package = tmp_path / "package"
    shutil.copytree(Path(mesh_transformer.__file__).parent, package)
    same, before = tmp_path / "same", digest_code(package)
    shutil.copytree(package, same)
    with (package / "model" / "moe.py").open("a") as file:
        file.write("# another program\n")
    (same / "corpus" / "build.py").unlink()  # which no program is made of
    digest_code.cache_clear()
    assert digest_code(package) != before == digest_code(same) == digest_code()


@needs_libtpu
def test_a_tpu_that_is_not_here_and_the_smallest_change_that_fits(tmp_path):
    """Eight cores of a v2: what eight layers keep is too much, what they begin with is not."""
    model = dict(n_layers=8, d_model=64, seq_len=128, dtype="bfloat16")
    config = make_config(model=model, mesh=dict(fsdp=8, tensor=1), train=dict(batch_size=32_768))
    job = CompileJob(config=config, topology="v2-8", low_effort=True)
    refused = compile_job(job, cache=tmp_path)
    verdict = make_plan(config, refused)
    assert verdict.memory.fits is False
    assert refused.needed_bytes > refused.limit_bytes == pytest.approx(7.48 * 2**30, rel=0.01)
    assert "exceeds available HBM" in format_plan(verdict)
    assert compile_job(job, cache=tmp_path) == refused  # kept: at once

    tried = []

    def compile_one(job: CompileJob) -> CompiledStats:
        tried.append(job.config)
        return compile_job(job)

    remedy = suggest_change(job, refused, compile_one)
    assert remedy is not None
    assert remedy.change.overrides[0].startswith("model.remat=")
    assert len(tried) == remedy.tried + 1
    fixed = make_plan(change_config(config, remedy.change.overrides), remedy.stats)
    assert fixed.memory.fits
    assert fixed.roofline is not None
    assert set(fixed.roofline.terms) >= {"products", "memory", "fsdp"}
    assert 0 < (fixed.mfu_no_overlap or 0) < (fixed.mfu or 0) < 1
    assert "MFU" in format_plan(fixed)


@needs_cuda
def test_a_gpu_that_is_not_here():
    job = CompileJob(config=make_config(mesh=dict(fsdp=2, tensor=1)), topology="2xH100")
    verdict = make_plan(job.config, compile_job(job))
    assert verdict.stats.platform == "gpu"
    assert verdict.memory.fits
    assert any("MEM_FRACTION" in note for note in verdict.notes)
    # XLA refuses nothing for a GPU; the comparison is ours.
    large = dataclasses.replace(verdict.stats, peak_bytes=10**12)
    assert make_plan(job.config, large).memory.fits is False


def test_without_a_compiler_there_is_an_estimate_that_says_so(monkeypatch):
    def fail(**_: object) -> None:
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    job = CompileJob(config=make_config(), topology="v5e-8")
    with pytest.raises(MissingCompilerError, match=r"pip install -e '\.\[plan\]'"):
        measure(job)
    verdict = make_plan(job.config, estimate_training(job.config, job.topology))
    assert LABEL in format_plan(verdict)
    assert plan_to_json(verdict)["estimated"] is True


def test_a_mesh_that_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="does not fit 4 device"):
        compile_job(CompileJob(config=make_config(mesh=dict(fsdp=8)), topology="cpu-4"))


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (64.89G) exceeds available HBM (30.75G).", 64.89),
        ("RESOURCE_EXHAUSTED: Used 17.49G of 15.75G hbm. Exceeded hbm capacity by 1.74G.", 17.49),
        ("something else", 0),
    ],
)  # fmt: skip
def test_refusals_are_read(text, needed):
    assert parse_refusal(text)[0] == pytest.approx(needed * 2**30, abs=1)


def test_changes_come_smallest_first_and_hold_together():
    config = make_config(train=dict(batch_size=64))
    changes = list(propose_changes(config, 8))
    words = [change.description for change in changes]
    assert words[0] == "the loss in 4 pieces"
    order = ("remat full", "2 microbatches instead of 1", "mesh fsdp=4", "first moments in bfloat16")
    assert [words.index(one) for one in order] == sorted(words.index(one) for one in order)
    together = [word.count(" and ") for word in words]
    assert together == sorted(together)
    assert all(change_config(config, change.overrides) != config for change in changes[:20])
    cut = make_config(train=dict(batch_size=64, grad_accum_steps=4))
    assert "the batch in one piece instead of 4 microbatches" in [change.description for change in propose_changes(cut, 8)]
