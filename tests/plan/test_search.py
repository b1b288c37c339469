# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Search considers all configurations that divide, compiles the best, and plots the result."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import pytest

from mesh_transformer.config import ConfigError, parse_config
from mesh_transformer.plan.compile_worker import measure
from mesh_transformer.plan.estimate import estimate_training
from mesh_transformer.plan.fit import make_plan
from mesh_transformer.plan.hardware.chips import CPU, TPUS
from mesh_transformer.plan.job import CompileJob
from mesh_transformer.plan.roofline import make_roofline
from mesh_transformer.plan.search import find_frontier, format_search, list_candidates, list_meshes, search
from mesh_transformer.plan.search_plot import draw_search


def make_job(topology: str = "cpu-8", **model: object) -> CompileJob:
    table = {
        "model": dict(n_layers=2, d_model=64, n_heads=4, n_vocab=264, seq_len=32) | model,
        "data": {"train": {"numbers": {"path": "made-up"}}},
        "train": dict(steps=10, batch_size=16),
    }
    return CompileJob(config=parse_config(table, where="test"), topology=topology)


def test_meshes_divide_the_model():
    job = make_job()
    meshes = list(list_meshes(job.config, 8))
    sizes = {(mesh["data"], mesh["fsdp"], mesh["tensor"]) for mesh in meshes}
    assert sizes == {(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (2, 1, 4), (1, 2, 4)}
    remats = {one.remat for one in list_candidates(job, CPU)}
    assert {"none", "full", "dots"} <= remats


def test_the_best_of_eight_cpu_devices():
    job = make_job()
    logged: list[str] = []
    result = search(job, measure, chip=CPU, count=2, log=logged.append)
    assert len(result.compiled) == 2
    assert len(result.considered) > 20
    assert [line for line in logged if line.startswith("compiling")] == logged
    table = format_search(result, CPU)
    assert "--set mesh.fsdp=" in table
    assert table.splitlines()[1].rstrip().endswith("*")
    picture = ElementTree.fromstring(draw_search(result, CPU, "a <small> model"))
    circles = [node.get("class") for node in picture.iter("{http://www.w3.org/2000/svg}circle")]
    assert circles.count("fits") == 2 * 2  # in the plot and in the list next to it
    assert circles.count("estimate") == len(result.considered)


def test_a_batch_that_never_divides_is_an_error():
    job = make_job()
    train = dataclasses.replace(job.config.train, batch_size=7)
    odd = dataclasses.replace(job, config=dataclasses.replace(job.config, train=train))
    with pytest.raises(ConfigError, match="batch_size=7"):
        search(odd, measure, chip=TPUS["v5e"])


def test_frontier():
    assert find_frontier([(1.0, 9.0), (2.0, 5.0), (3.0, 5.0), (4.0, 1.0), (5.0, 2.0)]) == [0, 1, 3]


def test_decoding_is_planned_with_the_engines_program():
    job = dataclasses.replace(make_job(n_heads=4, n_kv_heads=2), batch=8, context=16)
    stats = measure(job)
    cache_of_all = (
        2 * 8 * 2 * 16 * 16 * 2 * 4
    )  # layers, sequences, KV heads, positions, head channels, k and v, float32
    assert stats.bytes_by_kind["cache"] * 8 == cache_of_all
    assert stats.hbm_bytes > stats.bytes_by_kind["weights"]  # every token reads every weight
    assert make_plan(job.config, stats).checkpoint_bytes == 0
    with pytest.raises(ConfigError, match="use a multiple of 8"):
        measure(dataclasses.replace(job, batch=3))
    with pytest.raises(ConfigError, match="seq_len = 32"):
        measure(dataclasses.replace(job, context=64))


def test_the_roofline_of_known_work():
    """Ten times the peak FLOP/s take ten seconds; the lower bound is less than the upper bound."""
    chip, job = TPUS["v5e"], make_job("v5e-8")
    stats = dataclasses.replace(estimate_training(job.config, job.topology), hardware_flops=8 * chip.flops * 10)
    roofline = make_roofline(stats, chip)
    assert roofline.terms["matmul"] == pytest.approx(10)
    assert roofline.bound == "matmul"
    assert roofline.lower_bound == roofline.terms["matmul"] < roofline.upper_bound


@pytest.mark.parametrize("experts", [dict(n_experts_per_token=2), dict(layer_interval=2, capacity_factor=1.5)], ids=str)
def test_formulas_count_active_experts(experts):
    """The estimate agrees with the traced training step and with decoding."""
    job = make_job(experts=dict(n_experts=8, **experts), ff_bias=False)
    estimate, traced = estimate_training(job.config, "cpu-1"), measure(dataclasses.replace(job, topology="cpu-1"))
    assert estimate.flops == pytest.approx(traced.flops, rel=0.03)
    dense = measure(
        make_job(ff_bias=False),
    )
    assert estimate.parameters == traced.parameters > 2 * dense.parameters
    drawn, plain = (measure(dataclasses.replace(each, batch=8, context=16)) for each in (job, make_job(ff_bias=False)))
    layer, router = 4 * 64 * 256, 64 * 8 * 2
    layers, more = (2, layer) if "n_experts_per_token" in experts else (1, 0)
    assert drawn.flops - plain.flops == 8 * layers * (more + router)


LATENT = dict(kv_rank=24, q_rank=16, d_unrotated=12, d_rotated=8, d_value=12)
GROUPS = dict(n_experts=8, n_experts_per_token=2, d_ff=96, shared_expert=True, shared_d_ff=64, dense_layers=[0])


def test_formulas_count_latent_attention_and_experts_of_their_own_width():
    model = dict(latent_attention=LATENT, positions="rope-half", gated_ffn=True, ff_bias=False, norm="rmsnorm")
    job = make_job(**model, experts=GROUPS)
    estimate, traced = estimate_training(job.config, "cpu-1"), measure(dataclasses.replace(job, topology="cpu-1"))
    assert estimate.flops == pytest.approx(traced.flops, rel=0.03)
    assert estimate.parameters == traced.parameters
    ordinary = estimate_training(make_job(**model | dict(latent_attention=None)).config, "cpu-1")
    assert estimate.flops != pytest.approx(ordinary.flops, rel=0.05)
    decoding = measure(dataclasses.replace(job, topology="cpu-1", batch=8, context=32))
    assert decoding.bytes_by_kind["cache"] == 2 * 8 * 32 * (24 + 8) * 4  # layers, sequences, tokens, channels, bytes
