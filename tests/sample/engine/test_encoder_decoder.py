# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Sampling with an encoder: what is drawn is what the full forward pass says, alone and among others, narrow or on a mesh."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import CASES, LIVE_CASES, draw, import_arrays, make_torch

from mesh_transformer.config import ConfigError, MeshConfig, ModelConfig, SampleConfig
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.config.presets import T5
from mesh_transformer.mesh import make_layout
from mesh_transformer.model.transformer import make_model
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.sample.engine.encoder_decoder import EncoderDecoderEngine
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.engine import EngineOptions
from mesh_transformer.sample.engine.requests import RequestParams
from mesh_transformer.sample.engine.requests import PromptError

CONFIG = ModelConfig(
    **T5 | dict(n_layers=2, n_encoder_layers=2, d_model=16, n_heads=2, n_vocab=40, seq_len=32),
    experts=ExpertsConfig(n_experts=4, layer_interval=2),
)
PROMPTS = [[3, 4, 5], list(range(6, 26)), [30]]
START, END = 0, 1
GREEDY = SampleConfig(temperature=0.0, max_tokens=7)


def draw_params(config: ModelConfig):
    rng = np.random.default_rng(0)
    return {
        module: {name: jnp.asarray(rng.normal(size=info.shape) / 2, jnp.float32) for name, info in arrays.items()}
        for module, arrays in describe_params(config).items()
    }


PARAMS = draw_params(CONFIG)


def make_engine(**options) -> EncoderDecoderEngine:
    return EncoderDecoderEngine(CONFIG, PARAMS, **options, start=START, end=END)


def test_greedy_is_the_full_forward_pass():
    model = make_model(CONFIG)
    for prompt, (found,) in zip(PROMPTS, make_engine().generate(PROMPTS, GREEDY), strict=True):
        given = [START, *found.tokens[:-1]]
        logits, _ = model.apply(PARAMS, jnp.asarray([given]), sources=jnp.asarray([[*prompt, END]]))
        assert np.asarray(logits[0]).argmax(axis=-1).tolist() == found.tokens
        assert len(set(found.tokens)) > 1
        log_p = np.asarray(logits[0] - np.logaddexp.reduce(np.asarray(logits[0]), axis=-1, keepdims=True))
        np.testing.assert_allclose(found.logprobs, [log_p[i, t] for i, t in enumerate(found.tokens)], atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "t5-v1.1", "switch-every-layer-none-dropped"])
def test_greedy_is_what_transformers_generates(name):
    """Prompts of different lengths, padded there on the right and here with their batch."""
    case = (LIVE_CASES | CASES)[name]
    theirs, parameters = make_torch(case)
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
    theirs.generation_config.eos_token_id = None  # none ends early
    wanted = theirs.generate(
        sources, attention_mask=mask, do_sample=False, use_cache=False, max_new_tokens=12, decoder_start_token_id=START
    )[:, 1:]
    engine = EncoderDecoderEngine(case.config, import_arrays(weights, case.kind, case.config), EngineOptions(slots=len(texts)), start=START, end=END)
    options = SampleConfig(temperature=0.0, max_tokens=12)
    found = [sample.tokens for (sample,) in engine.generate([text[:-1] for text in texts], options)]
    assert found == wanted.tolist()
    assert len({tuple(row) for row in found}) > 1


def test_alone_is_among_others():
    options, wishes = SampleConfig(temperature=1.0, max_tokens=9), dict(seed=5, n=2)
    together = make_engine(slots=4).generate(PROMPTS, options, **wishes)
    apart = [make_engine().generate([prompt], options, **wishes)[0] for prompt in PROMPTS]
    assert [[s.tokens for s in samples] for samples in together] == [[s.tokens for s in samples] for samples in apart]
    assert together[0][0].tokens != together[0][1].tokens


def test_a_mesh_and_narrow_weights_draw_the_same():
    wanted = [found.tokens for (found,) in make_engine().generate(PROMPTS, GREEDY)]
    layout = make_layout(MeshConfig(data=2, tensor=2, expert=2))
    assert [found.tokens for (found,) in make_engine(layout=layout).generate(PROMPTS, GREEDY)] == wanted
    assert [
        len(found.tokens) for (found,) in make_engine(weights="bfloat16", cache="int8").generate(PROMPTS, GREEDY)
    ] == [7] * 3


def test_a_stop_token_ends_a_row():
    (found,) = make_engine().generate(PROMPTS[:1], GREEDY)[0]
    stop = found.tokens[3]
    (cut,) = make_engine().generate(PROMPTS[:1], GREEDY, stop_tokens=[stop])[0]
    assert (cut.tokens, cut.finish) == (found.tokens[: found.tokens.index(stop) + 1], "stop")


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"sampled by RewritingEngine \(device_sample\.py\)"):
        DecoderOnlyEngine(CONFIG, PARAMS)
    alone = dataclasses.replace(CONFIG, n_encoder_layers=None)
    with pytest.raises(ConfigError, match=r"model\.n_encoder_layers is not set"):
        EncoderDecoderEngine(alone, draw_params(alone), start=START, end=END)
    with pytest.raises(ConfigError, match=r"set mesh\.context and mesh\.pipeline to 1"):
        make_engine(layout=make_layout(MeshConfig(context=8)))
    engine = make_engine()
    with pytest.raises(ConfigError, match="serving and scoring are for decoders alone"):
        _ = engine.programs
    with pytest.raises(PromptError, match="no bias, scores or constraint"):
        engine.submit(engine.make_request([3], RequestParams(GREEDY, top_logprobs=2)))
    with pytest.raises(PromptError, match="max_tokens=33 more exceed"):
        engine.make_request([3], RequestParams(GREEDY, max_tokens=33))
