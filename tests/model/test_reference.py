# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Logits and gradients of every family equal those of `transformers`: golden files, and live if torch is installed."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import (
    CASES,
    GOLDEN,
    LIVE_CASES,
    Arrays,
    Case,
    draw,
    import_arrays,
    make_encoder_inputs,
    make_torch,
    read_golden,
    run_model,
)

from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.transformer import make_model

LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4  # absolute; relative to the largest entry of the array


# Halves the compile time.
QUICK: dict[str, bool | int | float | str] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def run_native(
    case: Case, weights: Arrays, tokens: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, dict[str, Arrays]]:
    """Return the logits of the native model with external weights, and the gradients of its mean loss."""
    model = make_model(case.config)
    inputs: dict[str, jax.Array] = {}
    if (encoder_inputs := make_encoder_inputs(case, tokens)) is not None:
        inputs["encoder_tokens"], inputs["encoder_segment_ids"] = map(jnp.asarray, encoder_inputs)

    def loss(params):
        logits, _ = model.apply(params, jnp.asarray(tokens), **inputs)
        log_p = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(log_p, jnp.asarray(targets)[..., None], axis=-1)), logits

    params = import_arrays(weights, case.kind, case.config)
    gradients, logits = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(params)
    return np.asarray(logits), gradients


def assert_equal(
    case: Case, native: tuple[np.ndarray, dict[str, Arrays]], logits: np.ndarray, gradients: Arrays
) -> None:
    assert np.std(logits) > 0.1, "the weights are too small: the reference logits are nearly constant"
    np.testing.assert_allclose(native[0], logits, atol=LOGITS_TOLERANCE, rtol=0)
    wanted = flatten_names(import_arrays(gradients, case.kind, case.config))
    found = flatten_names(native[1])
    assert found.keys() == wanted.keys()
    # A key's bias shifts all scores of a query equally, so its gradient is zero up to rounding: compared on another scale.
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = largest if name.endswith("attention/b_k") else np.abs(gradient).max()
        assert scale > 0, f"{name} has no gradient: the case does not test it"
        np.testing.assert_allclose(found[name], gradient, atol=GRADIENT_TOLERANCE * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_native_equals_golden(name):
    weights, tokens, targets, logits, gradients = read_golden(name)
    assert_equal(CASES[name], run_native(CASES[name], weights, tokens, targets), logits, gradients)


# With torch
def run_torch(
    case: Case, model, parameters, weights: Arrays, tokens: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, Arrays]:
    import torch

    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        parameter.data = torch.tensor(weights[name])
        parameter.grad = None
    logits = run_model(case, model, tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets, dtype=torch.long).flatten())
    loss.backward()
    zeros = torch.zeros  # for an expert that no token was assigned to
    gradients = {name: zeros(p.shape) if p.grad is None else p.grad for name, p in parameters.items()}
    return logits.detach().numpy(), {name: gradient.numpy() for name, gradient in gradients.items()}


@pytest.mark.parametrize("name", CASES)
def test_golden_equals_transformers(name):
    case = CASES[name]
    model, parameters = make_torch(case)
    weights, tokens, targets, logits, gradients = read_golden(name)
    live_logits, live_gradients = run_torch(case, model, parameters, weights, tokens, targets)
    hint = "the installed transformers computes other values; if they are correct, run python tests/model/test_reference.py"
    np.testing.assert_allclose(live_logits, logits, atol=1e-5, rtol=0, err_msg=hint)
    assert live_gradients.keys() == gradients.keys(), hint
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    for key, gradient in gradients.items():
        np.testing.assert_allclose(live_gradients[key], gradient, atol=1e-5 * largest, rtol=0, err_msg=f"{key}: {hint}")


@pytest.mark.parametrize("name", LIVE_CASES)
def test_native_equals_transformers(name):
    case = LIVE_CASES[name]
    model, parameters = make_torch(case)
    weights, tokens, targets = draw(case, parameters, seed=len(name))
    logits, gradients = run_torch(case, model, parameters, weights, tokens, targets)
    assert_equal(case, run_native(case, weights, tokens, targets), logits, gradients)


def write_goldens(names: list[str]) -> None:
    """Write the golden files of `names`, or of all cases."""
    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, case) in enumerate(CASES.items()):
        if names and name not in names:
            continue
        model, parameters = make_torch(case)
        weights, tokens, targets = draw(case, parameters, seed)
        logits, gradients = run_torch(case, model, parameters, weights, tokens, targets)
        arrays = {f"weight:{key}": weight.astype(np.float16) for key, weight in weights.items()}
        arrays |= {f"grad:{key}": gradient for key, gradient in gradients.items()}
        path = GOLDEN / f"reference_{name}.npz"
        np.savez_compressed(path, allow_pickle=False, tokens=tokens, targets=targets, logits=logits, **arrays)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    write_goldens(sys.argv[1:])
