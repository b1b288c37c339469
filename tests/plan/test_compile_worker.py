# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The compiled program is the one that trains, for local devices and for absent TPUs and GPUs."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mesh_transformer
from mesh_transformer.config import Config, ConfigError, parse_config
from mesh_transformer.data.dataset import open_data
from mesh_transformer.mesh import make_layout
from mesh_transformer.plan.compile_jobs import compile_job
from mesh_transformer.plan.compile_worker import (
    locate_traffic,
    lower_training,
    make_topology_layout,
    measure,
    parse_out_of_memory,
)
from mesh_transformer.plan.estimate import LABEL, estimate_training
from mesh_transformer.plan.fit import make_plan
from mesh_transformer.plan.hardware.topologies import MissingCompilerError, parse_topology
from mesh_transformer.plan.hlo.collectives import Collective
from mesh_transformer.plan.job import CompiledStats, CompileJob, digest_code
from mesh_transformer.plan.report import format_plan, plan_to_json
from mesh_transformer.plan.suggestions import change_config, propose_changes, suggest_change
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


def test_statistics_of_a_cpu_program():
    job = CompileJob(config=make_config(), topology="cpu-8")
    stats = measure(CompileJob.from_json(job.to_json()))
    assert CompiledStats.from_json(stats.to_json()) == stats
    assert stats.mesh == {**dict.fromkeys(stats.mesh, 1), "data": 2, "fsdp": 2, "tensor": 2}
    # Norm scales, residual biases and position embeddings are sharded over fsdp only; all other arrays over four devices.
    assert stats.parameters * 4 / 4 < stats.bytes_by_kind["parameters"] < stats.parameters * 4 / 2
    assert stats.state_bytes == pytest.approx(12 * stats.parameters, rel=0.01)
    assert stats.peak_bytes > sum(stats.bytes_by_kind.values())
    assert {traffic.kind for traffic in stats.traffic} >= {"all-gather", "all-reduce"}
    assert stats.hbm_bytes > stats.argument_bytes
    plan = make_plan(job.config, stats)
    assert plan.memory.fits is None
    assert sum(plan.memory.bytes_by_kind.values()) == pytest.approx(stats.peak_bytes, rel=1e-3)
    assert json.loads(json.dumps(plan_to_json(plan)))["estimated"] is False
    assert "unknown" in format_plan(plan)


def test_digests_identify_the_program():
    job = CompileJob(config=make_config(), topology="cpu-8")
    same = dataclasses.replace(job, config=make_config("elsewhere", run=dict(dir="there"), sample=dict(top_k=3)))
    assert job.digest() == same.digest()
    for change in (
        {"topology": "cpu-4"},
        {"low_effort": True},
        {"config": change_config(job.config, ("model.d_model=32",))},
    ):
        assert dataclasses.replace(job, **change).digest() != job.digest()


def test_digests_include_the_code(tmp_path):
    package = tmp_path / "package"
    shutil.copytree(Path(mesh_transformer.__file__).parent, package)
    same, before = tmp_path / "same", digest_code(package)
    shutil.copytree(package, same)
    with (package / "model" / "moe" / "layer.py").open("a") as file:
        file.write("# another program\n")
    (same / "corpus" / "build.py").unlink()  # not part of any program
    digest_code.cache_clear()
    assert digest_code(package) != before == digest_code(same) == digest_code()


@needs_libtpu
def test_an_absent_tpu_and_the_smallest_change_that_fits(tmp_path):
    """On eight cores of a v2 the activations of eight layers do not fit; full remat does."""
    model = dict(n_layers=8, d_model=64, seq_len=128, dtype="bfloat16")
    config = make_config(model=model, mesh=dict(fsdp=8, tensor=1), train=dict(batch_size=32_768))
    job = CompileJob(config=config, topology="v2-8", low_effort=True)
    rejected = compile_job(job, cache=tmp_path)
    plan = make_plan(config, rejected)
    assert plan.memory.fits is False
    assert rejected.needed_bytes > rejected.limit_bytes == pytest.approx(7.48 * 2**30, rel=0.01)
    assert "exceeds available HBM" in format_plan(plan)
    assert compile_job(job, cache=tmp_path) == rejected  # from the cache

    tried = []

    def compile_one(job: CompileJob) -> CompiledStats:
        tried.append(job.config)
        return compile_job(job)

    suggestion = suggest_change(job, rejected, compile_one)
    assert suggestion is not None
    assert suggestion.change.overrides[0].startswith("model.remat=")
    assert len(tried) == suggestion.tried + 1
    fixed = make_plan(change_config(config, suggestion.change.overrides), suggestion.stats)
    assert fixed.memory.fits
    assert fixed.roofline is not None
    assert set(fixed.roofline.terms) >= {"matmul", "memory", "fsdp"}
    assert 0 < (fixed.mfu_no_overlap or 0) < (fixed.mfu or 0) < 1
    assert "MFU" in format_plan(fixed)


@needs_cuda
def test_an_absent_gpu():
    job = CompileJob(config=make_config(mesh=dict(fsdp=2, tensor=1)), topology="2xH100")
    plan = make_plan(job.config, compile_job(job))
    assert plan.stats.platform == "gpu"
    assert plan.memory.fits
    assert any("MEM_FRACTION" in note for note in plan.notes)
    # XLA rejects no program for a GPU; the planner compares.
    large = dataclasses.replace(plan.stats, peak_bytes=10**12)
    assert make_plan(job.config, large).memory.fits is False


@pytest.mark.parametrize(
    ("topology", "axis", "spanned", "torus_dims"),
    [("2xv5e-4", "data", 2, 0), ("2xv5e-4", "fsdp", 1, 2), ("2x4xH100", "data", 2, 1), ("2x4xH100", "fsdp", 1, 1)],
)
def test_traffic_is_located_on_slices_and_hosts(topology, axis, spanned, torus_dims):
    """`data` has one device in each of the two slices or hosts, and `fsdp` the four devices of one of them."""
    devices = [
        SimpleNamespace(process_index=i // 4, slice_index=i // 4, coords=(i % 2, i // 2 % 2, 0)) for i in range(8)
    ]
    mesh = SimpleNamespace(axis_names=("data", "fsdp"), devices=np.array(devices, object).reshape(2, 4))
    layout: Any = SimpleNamespace(mesh=mesh)
    collective = Collective((axis,), "all-gather", 2 if axis == "data" else 4, 1, 8.0)
    traffic = locate_traffic(collective, layout, parse_topology(topology))
    assert (traffic.groups_spanned, traffic.torus_dims, traffic.sent) == (spanned, torus_dims, 8.0)


def test_without_a_compiler_the_plan_is_marked_as_an_estimate(monkeypatch):
    def fail(**_: object) -> None:
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    job = CompileJob(config=make_config(), topology="v5e-8")
    with pytest.raises(MissingCompilerError, match=r"pip install 'mesh-transformer\[plan\]'"):
        measure(job)
    plan = make_plan(job.config, estimate_training(job.config, job.topology))
    assert LABEL in format_plan(plan)
    assert plan_to_json(plan)["estimated"] is True


def test_a_mesh_larger_than_the_topology_is_named():
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
def test_parse_out_of_memory(text, needed):
    assert parse_out_of_memory(text)[0] == pytest.approx(needed * 2**30, abs=1)


def test_changes_are_ordered_and_combined():
    config = make_config(train=dict(batch_size=64))
    changes = list(propose_changes(config, 8))
    descriptions = [change.description for change in changes]
    assert descriptions[0] == "loss in 4 chunks"
    order = ("remat full", "2 microbatches instead of 1", "mesh fsdp=4", "first moments in bfloat16")
    assert [descriptions.index(one) for one in order] == sorted(descriptions.index(one) for one in order)
    combined = [text.count(" and ") for text in descriptions]
    assert combined == sorted(combined)
    assert all(change_config(config, change.overrides) != config for change in changes[:20])
    cut = make_config(train=dict(batch_size=64, grad_accum_steps=4))
    assert "one batch instead of 4 microbatches" in [change.description for change in propose_changes(cut, 8)]
