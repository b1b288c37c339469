# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""EncoderDecoderEngine generates what the full forward pass predicts, alone and in a batch, quantized and on a mesh."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import CASES, LIVE_CASES, draw, import_arrays, make_torch

from mesh_transformer.config import ConfigError, MeshConfig, ModelConfig, SampleConfig
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.config.presets import T5
from mesh_transformer.mesh import make_layout
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine, require_decoder_only
from mesh_transformer.sample.engine.encoder_decoder import EncoderDecoderEngine
from mesh_transformer.sample.engine.engine import EngineOptions
from mesh_transformer.sample.engine.requests import PromptError, RequestParams

CONFIG = ModelConfig(
    **T5 | dict(n_layers=2, n_encoder_layers=2, d_model=16, n_heads=2, n_vocab=40, seq_len=32),
    experts=ExpertsConfig(n_experts=4, layer_interval=2),
)
PROMPTS = [[3, 4, 5], list(range(6, 26)), [30]]
START, END = 0, 1
GREEDY = SampleConfig(temperature=0.0, max_tokens=7)


def random_params(config: ModelConfig):
    rng = np.random.default_rng(0)
    return {
        module: {name: jnp.asarray(rng.normal(size=info.shape) / 2, jnp.float32) for name, info in arrays.items()}
        for module, arrays in describe_params(config).items()
    }


PARAMS = random_params(CONFIG)


def make_engine(options: EngineOptions | None = None, **keywords) -> EncoderDecoderEngine:
    return EncoderDecoderEngine(CONFIG, PARAMS, options, start_token=START, end_token=END, **keywords)


def test_greedy_is_the_full_forward_pass():
    model = make_model(CONFIG)
    for prompt, (found,) in zip(PROMPTS, make_engine().generate(PROMPTS, GREEDY), strict=True):
        given = [START, *found.tokens[:-1]]
        logits, _ = model.apply(PARAMS, jnp.asarray([given]), encoder_tokens=jnp.asarray([[*prompt, END]]))
        assert np.asarray(logits[0]).argmax(axis=-1).tolist() == found.tokens
        assert len(set(found.tokens)) > 1
        log_p = np.asarray(logits[0] - np.logaddexp.reduce(np.asarray(logits[0]), axis=-1, keepdims=True))
        np.testing.assert_allclose(found.logprobs, [log_p[i, t] for i, t in enumerate(found.tokens)], atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "t5-v1.1", "switch-every-layer-none-dropped"])
def test_greedy_is_what_transformers_generates(name):
    """Prompts have different lengths; both sides pad them on the right."""
    case = (LIVE_CASES | CASES)[name]
    external, parameters = make_torch(case)
    import torch

    weights, tokens, _ = draw(case, parameters, seed=len(name))
    for key, parameter in parameters.items():
        parameter.data = torch.tensor(weights[key])
    texts = [[*row[: 8 + 7 * i].tolist(), END] for i, row in enumerate(tokens)]
    longest = max(map(len, texts))
    sources, mask = (
        torch.tensor([[*map(value, text), *[0] * (longest - len(text))] for text in texts])
        for value in (int, lambda _: 1)
    )
    external.generation_config.eos_token_id = None  # no sequence ends early
    expected = external.generate(
        sources, attention_mask=mask, do_sample=False, use_cache=False, max_new_tokens=12, decoder_start_token_id=START
    )[:, 1:]
    engine = EncoderDecoderEngine(
        case.config,
        import_arrays(weights, case.kind, case.config),
        EngineOptions(slots=len(texts)),
        start_token=START,
        end_token=END,
    )
    options = SampleConfig(temperature=0.0, max_tokens=12)
    found = [sample.tokens for (sample,) in engine.generate([text[:-1] for text in texts], options)]
    assert found == expected.tolist()
    assert len({tuple(row) for row in found}) > 1


def test_alone_equals_in_a_batch():
    options = SampleConfig(temperature=1.0, max_tokens=9)
    together = make_engine(EngineOptions(slots=4)).generate(PROMPTS, options, seed=5, n=2)
    apart = [make_engine().generate([prompt], options, seed=5, n=2)[0] for prompt in PROMPTS]
    assert [[s.tokens for s in samples] for samples in together] == [[s.tokens for s in samples] for samples in apart]
    assert together[0][0].tokens != together[0][1].tokens


def test_a_mesh_generates_the_same_tokens():
    expected = [found.tokens for (found,) in make_engine().generate(PROMPTS, GREEDY)]
    layout = make_layout(MeshConfig(data=2, tensor=2, expert=2))
    assert [found.tokens for (found,) in make_engine(layout=layout).generate(PROMPTS, GREEDY)] == expected


def test_quantized_weights_and_caches_cost_little():
    plain = make_engine().generate(PROMPTS, GREEDY)
    quantized = make_engine(EngineOptions(weight_dtype="bfloat16", kv_cache_dtype="int8")).generate(PROMPTS, GREEDY)
    assert [len(found.tokens) for (found,) in quantized] == [7] * 3
    for (found,), (expected,) in zip(quantized, plain, strict=True):
        assert found.logprobs != expected.logprobs
        np.testing.assert_allclose(found.logprobs[:1], expected.logprobs[:1], atol=0.1)


def test_a_stop_token_ends_a_request():
    (found,) = make_engine().generate(PROMPTS[:1], GREEDY)[0]
    stop = found.tokens[3]
    (cut,) = make_engine().generate(PROMPTS[:1], GREEDY, stop_tokens=[stop])[0]
    assert (cut.tokens, cut.finish) == (found.tokens[: found.tokens.index(stop) + 1], "stop")


def test_unsupported_models_meshes_and_requests_are_refused():
    with pytest.raises(ConfigError, match=r"use EncoderDecoderEngine, as device_sample\.py does"):
        DecoderOnlyEngine(CONFIG, PARAMS)
    alone = dataclasses.replace(CONFIG, n_encoder_layers=None)
    with pytest.raises(ConfigError, match=r"model\.n_encoder_layers is not set"):
        EncoderDecoderEngine(alone, random_params(alone), start_token=START, end_token=END)
    with pytest.raises(ConfigError, match=r"mesh\.context=8, mesh\.pipeline=1: .*set both to 1"):
        make_engine(layout=make_layout(MeshConfig(context=8)))
    engine = make_engine()
    with pytest.raises(ConfigError, match=r"serving supports only decoder-only models; use device_sample\.py"):
        require_decoder_only(engine, "serving")
    with pytest.raises(PromptError, match="do not support top_logprobs"):
        engine.submit(engine.make_request([3], RequestParams(GREEDY, top_logprobs=2)))
    with pytest.raises(PromptError, match="max_tokens=33 it exceeds"):
        engine.make_request([3], RequestParams(GREEDY, max_tokens=33))
