# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Plans of decoding with an encoder-decoder model: both programs equal those of its engine."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import Config, ConfigError, SampleConfig, parse_config
from mesh_transformer.config.presets import T5
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.plan.compile_worker import make_topology_layout, measure
from mesh_transformer.plan.decoding import lower_seq2seq_decode, lower_seq2seq_encode
from mesh_transformer.plan.fit import make_plan
from mesh_transformer.plan.job import CompiledStats, CompileJob
from mesh_transformer.plan.report import format_plan, plan_to_json
from mesh_transformer.sample.engine.encoder_decoder import EncoderDecoderEngine
from mesh_transformer.sample.engine.engine import EngineOptions

MESH = dict(data=2, tensor=2, expert=2)
CONTEXT = 128  # the engine's shortest cache


def make_config(serve: dict | None = None, **model: object) -> Config:
    sizes = dict(n_layers=2, n_encoder_layers=2, d_model=16, n_heads=2, d_ff=32, n_vocab=40, seq_len=CONTEXT)
    experts = dict(n_experts=4, layer_interval=2)
    table = {
        "model": T5 | sizes | dict(experts=experts) | model,
        "mesh": MESH,
        "data": {"train": {"texts": {"path": "made-up"}}},
        "train": dict(steps=10, batch_size=8),
        "serve": serve or {},
    }
    return parse_config(table, where="test")


def make_job(config: Config | None = None, *, batch: int = 8) -> CompileJob:
    return CompileJob(config=config or make_config(), topology="cpu-8", batch=batch, context=CONTEXT)


def test_the_planned_programs_are_the_engines():
    job = make_job(make_config(serve=dict(weight_dtype="bfloat16", kv_cache_dtype="int8")))
    layout, model = make_topology_layout(job), job.config.model
    rng = np.random.default_rng(0)
    params = {
        module: {name: jnp.asarray(rng.normal(size=info.shape) / 2, jnp.float32) for name, info in arrays.items()}
        for module, arrays in describe_params(model).items()
    }
    engine = EncoderDecoderEngine(
        model,
        params,
        EngineOptions(weight_dtype="bfloat16", kv_cache_dtype="int8"),
        start_token=0,
        end_token=1,
        layout=layout,
    )
    ran: dict[str, str] = {}

    def watch(name, program):
        def run(*arguments):
            ran.setdefault(name, program.lower(*arguments).as_text())
            return program(*arguments)

        return run

    engine.programs._encode_program = watch("encode", engine.programs._encode_program)
    engine.programs._decode_program = watch("decode", engine.programs._decode_program)
    prompts = [list(range(2, 40)) * 3 for _ in range(8)]
    assert len(prompts[0]) <= CONTEXT < 2 * len(prompts[0])
    found = engine.generate(prompts, SampleConfig(temperature=0.0), max_tokens=3)
    assert {len(sample.tokens) for (sample,) in found} == {3}
    assert lower_seq2seq_encode(job, layout)[0].as_text() == ran["encode"]
    assert lower_seq2seq_decode(job, layout)[0].as_text() == ran["decode"]
    assert lower_seq2seq_decode(dataclasses.replace(job, context=64), layout)[0].as_text() != ran["decode"]


@pytest.fixture(scope="module")
def stats() -> CompiledStats:
    return measure(CompileJob.from_json(make_job().to_json()))


def test_statistics_of_encoder_decoder_decoding(stats):
    job = make_job()
    encode = stats.encode
    assert encode is not None
    assert CompiledStats.from_json(stats.to_json()) == stats
    # Decoder layers, self- and cross-attention, sequences, heads, positions, head channels, k and v, float32.
    assert stats.bytes_by_kind["cache"] * 8 == 2 * 2 * 8 * 2 * CONTEXT * 8 * 2 * 4
    # During decoding the encoder's weights, about a third of all, stay in memory.
    assert stats.bytes_by_kind["weights"] / 4 < stats.idle_bytes < stats.bytes_by_kind["weights"] / 2
    assert encode.peak_bytes > stats.peak_bytes > stats.bytes_by_kind["weights"] + stats.bytes_by_kind["cache"]
    assert stats.hbm_bytes > stats.bytes_by_kind["weights"]
    plan = make_plan(job.config, stats)
    assert plan.fits is None
    text = format_plan(plan)
    assert text.index("FLOPs per step (one token per sequence)") < text.index("encoder: runs once per batch")
    table = json.loads(json.dumps(plan_to_json(plan)))
    assert table["encode"]["peak_bytes"] == encode.peak_bytes
    assert table["peak_bytes"] == stats.peak_bytes
    int8_job = make_job(make_config(serve=dict(weight_dtype="int8")))
    assert (
        lower_seq2seq_decode(int8_job, make_topology_layout(int8_job))[1].bytes_by_kind["weights"]
        < stats.bytes_by_kind["weights"] / 2
    )


def test_flops_per_token():
    """A dense model that is large enough for norms and embeddings to be negligible."""
    job = make_job(make_config(experts=None, d_model=64, d_ff=256))
    layout = make_topology_layout(job)
    model = job.config.model
    d, f, inner, s = model.d_model, model.ff_dim, model.n_heads * model.head_dim, CONTEXT
    attention = 2 * 2 * inner * s
    decoded = (
        2 * (4 * d * inner + 2 * d * inner + 2 * d * f) + 2 * attention
    )  # self-attention, queries of cross-attention
    encoded = 2 * (4 * d * inner + 2 * d * f) + attention
    each = 2 * decoded + 2 * d * model.n_vocab
    assert lower_seq2seq_decode(job, layout)[1].flops == pytest.approx(8 * each, rel=0.01)
    once = 2 * s * (encoded + 2 * 2 * d * inner)
    assert lower_seq2seq_encode(job, layout)[1].flops == pytest.approx(8 * (each + once), rel=0.01)


def test_a_plan_fits_if_both_programs_fit(stats):
    job = make_job()
    hardware = dict(topology="v5e-8", platform="tpu")
    small = dataclasses.replace(stats, **hardware, encode=dataclasses.replace(stats.encode, **hardware))
    assert make_plan(job.config, small).fits is True
    large = dataclasses.replace(small, encode=dataclasses.replace(small.encode, peak_bytes=10**12))
    plan = make_plan(job.config, large)
    assert (plan.fits, plan.memory.fits) == (False, True)
    assert plan_to_json(plan)["fits"] is False


def test_unsupported_batch_and_context_are_rejected():
    with pytest.raises(ConfigError, match="use a multiple of 4"):
        measure(make_job(batch=3))
    with pytest.raises(ConfigError, match=f"seq_len = {CONTEXT}"):
        measure(dataclasses.replace(make_job(), context=2 * CONTEXT))
