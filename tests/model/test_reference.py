# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Ours = `transformers`, logits and gradients, for every family: against stored goldens always, and live where torch is."""

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
    make_sources,
    make_torch,
    read_golden,
    run_model,
)

from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.transformer import make_model

LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4  # absolute; relative to the largest entry of the array


# Compiles in half the time; what is computed is the same.
QUICK: dict[str, bool | int | float | str] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def run_ours(
    case: Case, weights: Arrays, tokens: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, dict[str, Arrays]]:
    """Logits, and gradients of the mean loss, of our model with their weights."""
    model, read = make_model(case.config), make_sources(case, tokens)
    more = {} if read is None else dict(zip(("sources", "source_segments"), map(jnp.asarray, read), strict=True))

    def loss(params):
        logits, _ = model.apply(params, jnp.asarray(tokens), **more)
        log_p = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(log_p, jnp.asarray(targets)[..., None], axis=-1)), logits

    params = import_arrays(weights, case.kind, case.config)
    gradients, logits = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(params)
    return np.asarray(logits), gradients


def assert_equal(case: Case, ours: tuple[np.ndarray, dict[str, Arrays]], logits: np.ndarray, gradients: Arrays) -> None:
    assert np.std(logits) > 0.1, "the reference says nothing: too small weights"
    np.testing.assert_allclose(ours[0], logits, atol=LOGITS_TOLERANCE, rtol=0)
    wanted = flatten_names(import_arrays(gradients, case.kind, case.config))
    found = flatten_names(ours[1])
    assert found.keys() == wanted.keys()
    # A key's bias moves all of a row's scores alike, so its gradient is zero but for rounding: compare on the queries' scale.
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = largest if name.endswith("attention/b_k") else np.abs(gradient).max()
        assert scale > 0, f"{name} has no gradient: the case does not test it"
        np.testing.assert_allclose(found[name], gradient, atol=GRADIENT_TOLERANCE * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_ours_equals_golden(name):
    weights, tokens, targets, logits, gradients = read_golden(name)
    assert_equal(CASES[name], run_ours(CASES[name], weights, tokens, targets), logits, gradients)


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
    zeros = torch.zeros  # of an expert that nobody chose
    gradients = {name: zeros(p.shape) if p.grad is None else p.grad for name, p in parameters.items()}
    return logits.detach().numpy(), {name: gradient.numpy() for name, gradient in gradients.items()}


@pytest.mark.parametrize("name", CASES)
def test_golden_equals_transformers(name):
    case = CASES[name]
    model, parameters = make_torch(case)
    weights, tokens, targets, logits, gradients = read_golden(name)
    live_logits, live_gradients = run_torch(case, model, parameters, weights, tokens, targets)
    remedy = (
        "the installed transformers computes something else: if that is right, run python tests/model/test_reference.py"
    )
    np.testing.assert_allclose(live_logits, logits, atol=1e-5, rtol=0, err_msg=remedy)
    assert live_gradients.keys() == gradients.keys(), remedy
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    for key, gradient in gradients.items():
        np.testing.assert_allclose(
            live_gradients[key], gradient, atol=1e-5 * largest, rtol=0, err_msg=f"{key}: {remedy}"
        )


@pytest.mark.parametrize("name", LIVE_CASES)
def test_ours_equals_transformers(name):
    case = LIVE_CASES[name]
    model, parameters = make_torch(case)
    weights, tokens, targets = draw(case, parameters, seed=len(name))
    logits, gradients = run_torch(case, model, parameters, weights, tokens, targets)
    assert_equal(case, run_ours(case, weights, tokens, targets), logits, gradients)


def write_goldens(names: list[str]) -> None:
    """Those of all cases, or of `names`."""
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
