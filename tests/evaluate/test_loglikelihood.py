# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods equal those of `transformers`, for any batch and mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import CASES, LIVE_CASES, draw, import_arrays, make_torch, read_golden

from mesh_transformer.config import MeshConfig, ModelConfig
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.evaluate.loglikelihood import LoglikelihoodScorer, ScoringError, ScoringRequest, make_scorer
from mesh_transformer.mesh import make_layout
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine

TOLERANCE = 1e-4  # nats of one token, against another library; 1e-5 within this one
CONFIG = ModelConfig(n_layers=2, d_model=16, n_heads=4, n_vocab=40, seq_len=96, positions="rope-half")
LENGTHS = (2, 97, 5, 80, 90, 96, 17, 8, 66, 3, 30)  # in two buckets


def make_requests(n_vocab: int, lengths=LENGTHS) -> list[ScoringRequest]:
    rng = np.random.default_rng(1)
    return [ScoringRequest(rng.integers(0, n_vocab, n).tolist(), int(rng.integers(1, n))) for n in lengths]


def compare_with_logits(scorer: LoglikelihoodScorer, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Prefixes of every sequence, against log-softmax of the reference's logits of the full sequence."""
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))
    requests = []
    wanted = []
    greedy = []
    for row, ids in enumerate(tokens):
        for length, n_scored in ((2, 1), (9, 3), (len(ids), len(ids) - 1)):
            requests.append(ScoringRequest(ids[:length].tolist(), n_scored))
            positions = np.arange(length - 1 - n_scored, length - 1)
            wanted.append(log_p[row, positions, ids[positions + 1]])
            greedy.append(log_p[row, positions].argmax(-1) == ids[positions + 1])
    found = scorer.score(requests)
    for result, logprobs, is_best in zip(found, wanted, greedy, strict=True):
        np.testing.assert_allclose(result.logprobs, logprobs, atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(result.greedy, is_best)


@pytest.mark.parametrize("name", ["gpt-neo", "gpt-j", "llama-gqa"])
def test_results_equal_the_stored_ones_of_transformers(name):
    case = CASES[name]
    weights, tokens, _, logits, _ = read_golden(name)
    compare_with_logits(
        LoglikelihoodScorer(case.config, import_arrays(weights, case.kind, case.config), None), tokens, logits
    )


@pytest.mark.parametrize("name", ["gpt-neo-local-first"])
def test_results_equal_those_of_transformers(name):
    case = LIVE_CASES[name]
    model, parameters = make_torch(case)
    torch = pytest.importorskip("torch", reason="the live comparison needs pip install transformers torch")
    weights, tokens, _ = draw(case, parameters, seed=5)
    for key, parameter in parameters.items():
        parameter.data = torch.tensor(weights[key])
    with torch.no_grad():
        logits = model(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    compare_with_logits(
        LoglikelihoodScorer(case.config, import_arrays(weights, case.kind, case.config), None), tokens, logits
    )


@pytest.fixture(scope="module")
def params():
    params = make_model(CONFIG).init(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)


@pytest.fixture(scope="module")
def alone(params):
    """Results of each request in a batch of its own."""
    scorer = LoglikelihoodScorer(CONFIG, params, None, batch_tokens=1)
    return [scorer.score([request])[0].logprobs for request in make_requests(40)]


def assert_same(found, wanted) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.logprobs, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_tokens", [200])
def test_batch_size_changes_nothing(params, alone, batch_tokens):
    steps = []
    scorer = LoglikelihoodScorer(CONFIG, params, None, batch_tokens=batch_tokens)
    assert_same(scorer.score(make_requests(40), lambda done, total: steps.append((done, total))), alone)
    assert steps[-1] == (len(LENGTHS), len(LENGTHS))
    assert steps == sorted(set(steps)), "progress goes forward, a batch at a time"


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2, "pipeline": 2}, {"data": 2, "fsdp": 2, "context": 2}])
def test_mesh_changes_nothing(params, alone, sizes):
    layout = make_layout(MeshConfig(**sizes))
    described = describe_params(CONFIG)
    sharded = {
        module: {
            name: jax.device_put(array, layout.sharding(described[module][name].axes, array.shape, name))
            for name, array in arrays.items()
        }
        for module, arrays in params.items()
    }
    assert_same(LoglikelihoodScorer(CONFIG, sharded, layout, batch_tokens=10_000).score(make_requests(40)), alone)


def test_engine_and_chunks_change_nothing(params, alone, monkeypatch):
    engine = DecoderOnlyEngine(CONFIG, params, layout=make_layout(MeshConfig(data=1)))
    monkeypatch.setattr("mesh_transformer.evaluate.loglikelihood.MAX_LOGIT_BYTES", 3000)  # several chunks of logits
    assert_same(make_scorer(engine).score(make_requests(40)), alone)


def test_experts_have_no_capacity_limit():
    """With a capacity, the tokens an expert processes would depend on the length of the padding."""
    experts = ExpertsConfig(n_experts=4, n_experts_per_token=1, eval_capacity_factor=0.5)
    config = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=40, seq_len=96, ff_bias=False, experts=experts)
    scorer = LoglikelihoodScorer(config, make_model(config).init(jax.random.key(1)), None)
    request = make_requests(40, (70,))[0]
    logprobs = scorer.score([request])[0].logprobs
    short = scorer.score([ScoringRequest(request.tokens[:40], 40 - 70 + request.n_scored)])[0].logprobs
    np.testing.assert_allclose(short, logprobs[: len(short)], atol=1e-5)


def test_no_requests(params):
    assert LoglikelihoodScorer(CONFIG, params, None).score([]) == []


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ScoringRequest([1], 1), "at least 1 token before"),
        (ScoringRequest([1, 2], 0), "must score at least 1"),
        (ScoringRequest([1] * 98, 3), "at most model.seq_len . 1 = 97"),
        (ScoringRequest([1, 40], 1), r"token 40; the vocabulary is 0\.\.39"),
        (ScoringRequest([-1, 4], 1), "token -1"),
    ],
)
def test_invalid_requests_are_errors(params, request_, words):
    with pytest.raises(ScoringError, match=words):
        LoglikelihoodScorer(CONFIG, params, None).score([ScoringRequest([1, 2], 1), request_])
