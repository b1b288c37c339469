# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The NumPy reference implementations equal transformers and mesh-transformer-jax."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from reference_models import CASES, LIVE_CASES, draw, make_encoder_inputs, make_torch, read_golden, run_model

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.convert.gptj.reader import open_gptj, open_raw_weights
from mesh_transformer.convert.gptj.reference import run_mtj
from mesh_transformer.convert.huggingface import reference
from mesh_transformer.convert.huggingface.families import FAMILIES, run_huggingface
from mesh_transformer.convert.huggingface.reader import find_family
from mesh_transformer.convert.lazy_arrays import InMemory
from mesh_transformer.convert.logit_check import run_native

FIXTURE = Path(__file__).parents[4] / "shared" / "fixtures" / "gptj_v1_4shards"


def run(case, weights, config, tokens) -> np.ndarray:
    """Run the reference implementation of a case."""
    tensors = {key: InMemory(value) for key, value in weights.items()}
    return run_huggingface(tensors, config, tokens, *(make_encoder_inputs(case, tokens) or ()))


@pytest.mark.parametrize("name", CASES)
def test_equals_golden(name, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_BYTES", 300)  # several blocks of every weight
    case = CASES[name]
    weights, tokens, _, logits, _ = read_golden(name)
    config = FAMILIES[case.kind].write_config(case.config)
    config |= {"model_type": case.kind, "tie_word_embeddings": case.config.tied_embeddings}
    found = run(case, weights, config, tokens)
    assert np.std(logits) > 0.1
    np.testing.assert_allclose(found, logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", LIVE_CASES)
def test_equals_transformers(name):
    case = LIVE_CASES[name]
    model, parameters = make_torch(case)
    import torch

    weights, tokens, _ = draw(case, parameters, seed=1)
    for key, parameter in parameters.items():
        parameter.data = torch.tensor(weights[key])
    logits = run_model(case, model, tokens).detach().numpy()
    config = model.config.to_dict() | {"tie_word_embeddings": case.config.tied_embeddings}
    found = run(case, weights, config, tokens)
    assert np.std(logits) > 0.1
    np.testing.assert_allclose(found, logits, atol=5e-5, rtol=0)


@pytest.mark.skipif(
    not FIXTURE.exists(), reason="the mesh-transformer-jax fixtures are not available (../shared/fixtures)"
)
def test_equals_mesh_transformer_jax():
    config = json.loads((FIXTURE / "config.json").read_text())
    expected = np.load(FIXTURE / "expected.npz")
    tokens = np.asarray(expected["tokens"], np.int32)
    logits = run_mtj(open_raw_weights(FIXTURE / "full/step_1234", config), config, tokens[:, :-1])
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    losses = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, expected["full_token_loss"], atol=1e-5, rtol=0)
    plan = open_gptj(FIXTURE / "full/step_1234", config)
    native = run_native(plan.config, plan.values, tokens[:, :-1])
    np.testing.assert_allclose(native, logits, atol=2e-5, rtol=0)


def test_unknown_model_type_is_refused():
    with pytest.raises(
        CheckpointError, match=r'no reference implementation of model_type "bert"; supported: gpt2, .*qwen3'
    ):
        run_huggingface({}, {"model_type": "bert"}, np.zeros((1, 1), np.int32))


def test_families_without_a_reference_implementation_are_none_of_these():
    with pytest.raises(CheckpointError, match='no reference implementation of model_type "bloom"'):
        run_huggingface({}, {"model_type": "bloom"}, np.zeros((1, 1), np.int32))
    for case in (CASES | LIVE_CASES).values():
        assert FAMILIES[case.kind].reference is not None
        assert find_family(dataclasses.replace(case.config, dropout=0.0))[0] in FAMILIES
