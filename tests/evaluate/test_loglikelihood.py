# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Likelihoods = those of `transformers`, whatever shares a batch and wherever the model lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import CASES, LIVE_CASES, draw, import_arrays, make_torch, read_golden

from mesh_transformer.config import MeshConfig, ModelConfig
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.evaluate.loglikelihood import ScoringRequest, LoglikelihoodScorer, ScoringError, make_scorer
from mesh_transformer.mesh import make_layout
from mesh_transformer.model.transformer import make_model
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine

TOLERANCE = 1e-4  # nats of one token, against another library; within ours 1e-5
CONFIG = ModelConfig(n_layers=2, d_model=16, n_heads=4, n_vocab=40, seq_len=96, positions="rope-half")
LENGTHS = (2, 97, 5, 80, 90, 96, 17, 8, 66, 3, 30)  # of two buckets


def make_queries(n_vocab: int, lengths=LENGTHS) -> list[ScoringRequest]:
    rng = np.random.default_rng(1)
    return [ScoringRequest(rng.integers(0, n_vocab, n).tolist(), int(rng.integers(1, n))) for n in lengths]


def compare_with_logits(scorer: LoglikelihoodScorer, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Every row's beginnings, against log-softmax of the reference's logits of the whole row."""
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))
    queries, wanted, greedy = [], [], []
    for row, ids in enumerate(tokens):
        for length, n_scored in ((2, 1), (9, 3), (len(ids), len(ids) - 1)):
            queries.append(ScoringRequest(ids[:length].tolist(), n_scored))
            places = np.arange(length - 1 - n_scored, length - 1)
            wanted.append(log_p[row, places, ids[places + 1]])
            greedy.append(log_p[row, places].argmax(-1) == ids[places + 1])
    found = scorer.score(queries)
    for likelihood, logprobs, is_best in zip(found, wanted, greedy, strict=True):
        np.testing.assert_allclose(likelihood.logprobs, logprobs, atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(likelihood.greedy, is_best)


@pytest.mark.parametrize("name", ["gpt-neo", "gpt-j", "llama-gqa"])
def test_likelihoods_equal_stored_ones_of_transformers(name):
    case = CASES[name]
    weights, tokens, _, logits, _ = read_golden(name)
    compare_with_logits(LoglikelihoodScorer(case.config, import_arrays(weights, case.kind, case.config), None), tokens, logits)


@pytest.mark.parametrize("name", ["gpt-neo-local-first"])
def test_likelihoods_equal_those_of_transformers(name):
    case = LIVE_CASES[name]
    model, parameters = make_torch(case)
    torch = pytest.importorskip("torch", reason="the live comparison needs pip install transformers torch")
    weights, tokens, _ = draw(case, parameters, seed=5)
    for key, parameter in parameters.items():
        parameter.data = torch.tensor(weights[key])
    with torch.no_grad():
        logits = model(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    compare_with_logits(LoglikelihoodScorer(case.config, import_arrays(weights, case.kind, case.config), None), tokens, logits)


@pytest.fixture(scope="module")
def params():
    params = make_model(CONFIG).init(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)


@pytest.fixture(scope="module")
def alone(params):
    """Each query in a batch of its own."""
    scorer = LoglikelihoodScorer(CONFIG, params, None, batch_tokens=1)
    return [scorer.score([query])[0].logprobs for query in make_queries(40)]


def assert_same(found, wanted) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.logprobs, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_tokens", [200])
def test_batch_size_changes_nothing(params, alone, batch_tokens):
    steps = []
    scorer = LoglikelihoodScorer(CONFIG, params, None, batch_tokens=batch_tokens)
    assert_same(scorer.score(make_queries(40), lambda done, total: steps.append((done, total))), alone)
    assert steps[-1] == (len(LENGTHS), len(LENGTHS))
    assert steps == sorted(set(steps)), "progress goes forward, a batch at a time"


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2, "pipeline": 2}, {"data": 2, "fsdp": 2, "context": 2}])
def test_mesh_changes_nothing(params, alone, sizes):
    layout = make_layout(MeshConfig(**sizes))
    described = describe_params(CONFIG)
    placed = {
        module: {
            name: jax.device_put(array, layout.sharding(described[module][name].axes, array.shape, name))
            for name, array in arrays.items()
        }
        for module, arrays in params.items()
    }
    assert_same(LoglikelihoodScorer(CONFIG, placed, layout, batch_tokens=10_000).score(make_queries(40)), alone)


def test_engine_and_pieces_change_nothing(params, alone, monkeypatch):
    engine = DecoderOnlyEngine(CONFIG, params, layout=make_layout(MeshConfig(data=1)))
    monkeypatch.setattr("mesh_transformer.evaluate.loglikelihood.LOGIT_BYTES", 3000)  # several pieces of logits
    assert_same(make_scorer(engine).score(make_queries(40)), alone)


def test_experts_see_no_neighbours():
    """With a capacity, what an expert takes would depend on how long the padding is."""
    experts = ExpertsConfig(n_experts=4, n_experts_per_token=1, eval_capacity_factor=0.5)
    config = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=40, seq_len=96, ff_bias=False, experts=experts)
    scorer = LoglikelihoodScorer(config, make_model(config).init(jax.random.key(1)), None)
    query = make_queries(40, (70,))[0]
    likelihood = scorer.score([query])[0].logprobs
    short = scorer.score([ScoringRequest(query.tokens[:40], 40 - 70 + query.n_scored)])[0].logprobs
    np.testing.assert_allclose(short, likelihood[: len(short)], atol=1e-5)


def test_nothing_to_score_is_no_work(params):
    assert LoglikelihoodScorer(CONFIG, params, None).score([]) == []


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (ScoringRequest([1], 1), "at least one stands before"),
        (ScoringRequest([1, 2], 0), "at least one is scored"),
        (ScoringRequest([1] * 98, 3), "at most 97"),
        (ScoringRequest([1, 40], 1), r"token 40; the vocabulary is 0\.\.39"),
        (ScoringRequest([-1, 4], 1), "token -1"),
    ],
)
def test_what_cannot_be_scored_is_named(params, query, words):
    with pytest.raises(ScoringError, match=words):
        LoglikelihoodScorer(CONFIG, params, None).score([ScoringRequest([1, 2], 1), query])
