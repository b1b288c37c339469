# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Filters equal plain Python in float64; sampled tokens follow their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ConfigError, SampleConfig
from mesh_transformer.sample.sampling import (
    Sampled,
    SamplingOptions,
    filter_logits,
    make_options,
    position_keys,
    sample,
    stack_options,
    top_logprobs,
)

OFF = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
TRACED = []  # one entry per compilation of `jit_sample`
jit_filter = jax.jit(filter_logits)


@jax.jit
def jit_sample(logits, options, counts, keys, prompt) -> Sampled:
    TRACED.append(logits.shape)
    return sample(logits, options, counts, keys, prompt=prompt)


def options_for(rows):
    """Return options from one dictionary of changes per request."""
    return stack_options([SampleConfig(**{**OFF, **row}) for row in rows])


def keys_for(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def filter_padded(logits, rows):
    """Apply filter_logits to at most 15 requests, padded to 1000 tokens so that all tests share a program."""
    n, n_vocab = logits.shape
    full = np.full((15, 1000), -np.inf, np.float32)
    full[:n, :n_vocab] = logits
    full[n:] = 0.0
    return np.asarray(jit_filter(full, options_for([*rows, *[{}] * (15 - n)])))[:n, :n_vocab]


def sample_padded(logits, rows, counts=None, prompt=None, keys=None):
    """Sample for a few requests, padded to 8 requests and 40 tokens so that all tests share a program."""
    n, n_vocab = logits.shape

    def pad(x, fill):
        full = np.full((8, 40), fill, x.dtype)
        full[:n, :n_vocab] = x
        return full

    logits = pad(np.asarray(logits, np.float32), -np.inf)
    logits[n:] = 0.0
    counts = pad(np.zeros((n, n_vocab), np.int32) if counts is None else counts.astype(np.int32), 0)
    prompt = pad(np.zeros((n, n_vocab), bool) if prompt is None else prompt, False)
    options = options_for([*rows, *[{}] * (8 - n)])
    sampled = jit_sample(logits, options, counts, keys_for(8) if keys is None else keys, prompt)
    return Sampled(*(np.asarray(value)[:n] for value in sampled))


def kept_by_hand(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, **_):
    """Return the ids that the filters keep, by ranking and summing in float64."""
    x = np.asarray(logits, np.float64)
    weights = np.exp((x - x.max()) / temperature)
    ranked = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if top_k:
        ranked = ranked[:top_k]
    if top_p < 1:
        total, reached, kept = sum(weights[ranked]), 0.0, []
        for i in ranked:
            if kept and reached >= top_p * total:
                break
            kept.append(i)
            reached += weights[i]
        ranked = kept
    return {i for i in ranked if x[i] > -np.inf and weights[i] >= min_p * weights[ranked[0]]}


CHOICES = [
    {},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 10_000},
    {"top_p": 1e-9},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 0.999},
    {"top_k": 7, "top_p": 0.6},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
    {"top_p": 0.9, "temperature": 3.0},
    {"top_k": 5, "temperature": 1e-30},
    {"top_k": 300, "top_p": 0.95},
]


@pytest.mark.parametrize("n_vocab", [50, 1000])
@pytest.mark.parametrize("deviation", [0.3, 3.0])
def test_filters_match_plain_python(n_vocab, deviation):
    logits = np.random.default_rng(n_vocab).normal(size=(len(CHOICES), n_vocab)) * deviation
    logits[:, 3:8] = -np.inf
    logits = logits.astype(np.float32)
    filtered = filter_padded(logits, CHOICES)
    sizes = []
    for row, choice in enumerate(CHOICES):
        kept = {int(i) for i in np.flatnonzero(filtered[row] > -np.inf)}
        assert kept == kept_by_hand(logits[row], **choice), choice
        sizes.append(len(kept))
        scaled = (logits[row].astype(np.float64) - logits[row].max()) / choice.get("temperature", 1.0)
        np.testing.assert_allclose(filtered[row][list(kept)], scaled[list(kept)], rtol=1e-5)
    assert sizes[:3] == [n_vocab - 5, 1, 3]
    assert sizes[4] == 1
    assert len(set(sizes)) >= 6


def test_ties():
    """Tokens of equal probability are ranked by id, also at the limit of a filter."""
    logits = np.zeros((6, 600), np.float32)
    logits[4:, 500] = 1.0
    choices = [{"top_k": 1}, {"top_k": 4}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.5}, {"top_k": 4}, {"top_k": 300}]
    filtered = filter_padded(logits, choices)
    kept = [[int(i) for i in np.flatnonzero(row > -np.inf)] for row in filtered]
    assert kept == [[0], [0, 1, 2, 3], list(range(300)), [0, 1], [0, 1, 2, 500], [*range(299), 500]]


def test_top_k_masks_id_0():
    """mesh-transformer-jax multiplied the mask by the token's index, so id 0 survived every top-k."""
    logits = np.array([[-1.0, 4.0, 3.0, 2.0, 1.0]], np.float32)
    choices = [{"top_k": 2, "temperature": 50.0}]
    filtered = filter_padded(logits, choices)
    assert [int(i) for i in np.flatnonzero(filtered[0] > -np.inf)] == [1, 2]
    sampled = {
        int(t)
        for seed in range(10)
        for t in sample_padded(np.tile(logits, (8, 1)), choices * 8, keys=keys_for(8, seed)).token
    }
    assert sampled == {1, 2}


def test_greedy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 30)).astype(np.float32)
    logits[1, [7, 20]] = 9.0
    all_greedy = sample_padded(np.concatenate([logits, logits]), [{"temperature": 0.0}] * 8)
    best = [int(np.argmax(row)) for row in logits]
    assert best[1] == 7
    assert all_greedy.token.tolist() == best * 2
    assert all_greedy.sampling_logprob.tolist() == [0.0] * 8
    some = sample_padded(logits, [{"temperature": 0.0}, {}, {"temperature": 0.0}, {}])
    assert [int(some.token[i]) for i in (0, 2)] == [best[0], best[2]]
    for choice in ({"top_k": 1, "temperature": 2.0}, {"top_p": 1e-6}, {"temperature": 1e-30}, {"min_p": 0.9999}):
        found = sample_padded(logits[[0, 2]], [choice] * 2)
        assert found.token.tolist() == [best[0], best[2]], choice


def penalties_by_hand(
    logits, counts, prompt, *, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, **_
):
    out = []
    for logit, count, in_prompt in zip(logits.astype(np.float64), counts, prompt, strict=True):
        if count or in_prompt:
            logit = logit / repetition_penalty if logit > 0 else logit * repetition_penalty
        out.append(logit - count * frequency_penalty - (count > 0) * presence_penalty)
    return np.array(out)


def test_penalties():
    rng = np.random.default_rng(0)
    choices = [
        {},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.1},
        {"frequency_penalty": 0.4},
        {"repetition_penalty": 0.5, "presence_penalty": -2.0, "frequency_penalty": 3.0, "temperature": 0.6},
    ]
    logits = rng.normal(size=(5, 12)).astype(np.float32) * 2
    counts, prompt = rng.integers(0, 4, size=(5, 12)), rng.random((5, 12)) < 0.4
    assert np.any(prompt & (counts == 0))
    found = sample_padded(logits, choices, counts, prompt)
    for row, choice in enumerate(choices):
        wanted = penalties_by_hand(logits[row], counts[row], prompt[row], **choice) / choice.get("temperature", 1.0)
        token = int(found.token[row])
        assert float(found.sampling_logprob[row]) == pytest.approx(
            wanted[token] - np.log(np.sum(np.exp(wanted))), abs=1e-5
        )
        raw = logits[row].astype(np.float64)
        assert float(found.logprob[row]) == pytest.approx(raw[token] - np.log(np.sum(np.exp(raw))), abs=1e-5)
        one = slice(row, row + 1)
        best = sample_padded(logits[one], [{**choice, "temperature": 0.0}], counts[one], prompt[one])
        assert int(best.token[0]) == int(np.argmax(wanted))


def test_prompt_counts_for_repetition_only():
    logits = np.array([[2.0, 1.9]], np.float32)
    prompt = np.array([[True, False]])
    for choice, token in (({"repetition_penalty": 2.0}, 1), ({"presence_penalty": 2.0, "frequency_penalty": 2.0}, 0)):
        rows = [{**choice, "temperature": 0.0}]
        assert int(sample_padded(logits, rows, prompt=prompt).token[0]) == token
        assert int(sample_padded(logits, rows).token[0]) == 0


@pytest.mark.parametrize("choice", [{}, {"temperature": 1.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}])
def test_sampled_tokens_follow_the_distribution(choice):
    """Chi-square test of 20,000 samples; the bounds are the 0.999 quantiles."""
    n_samples = 20_000
    logits = np.array([0.3, -1.0, 1.2, 0.0, -0.4, 0.9, -2.0, 0.5], np.float32)
    kept = sorted(kept_by_hand(logits, **choice))
    weights = np.exp(logits[kept].astype(np.float64) / choice.get("temperature", 1.0))
    expected = n_samples * weights / weights.sum()
    options = SamplingOptions(*(jnp.repeat(value, n_samples) for value in options_for([choice])))
    zeros = np.zeros((n_samples, 8), np.int32)
    sampled = jit_sample(np.tile(logits, (n_samples, 1)), options, zeros, keys_for(n_samples, seed=1), zeros > 0)
    tally = np.bincount(sampled.token, minlength=8)
    assert tally.sum() == tally[kept].sum() == n_samples
    bound = {4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}[len(kept) - 1]
    assert np.sum((tally[kept] - expected) ** 2 / expected) < bound
    if choice:  # the unfiltered distribution over the same tokens fails the test
        plain = np.exp(logits.astype(np.float64))
        plain = n_samples * plain / plain.sum()
        assert np.sum((tally - plain) ** 2 / plain) > 2 * bound
    logprobs = np.log(weights / weights.sum())
    wanted = [logprobs[kept.index(int(token))] for token in sampled.token[:20]]
    np.testing.assert_allclose(sampled.sampling_logprob[:20], wanted, atol=1e-5)


def test_alone_equals_in_a_batch():
    """Other requests in the batch have no effect, whatever filters they use."""
    rng = np.random.default_rng(0)
    logits = (0.2 * rng.normal(size=(4, 700))).astype(np.float32)
    logits[:2] *= 20
    choices = [{"top_p": 0.9}, {"top_k": 20, "temperature": 0.8}, {"top_p": 0.98}, {"temperature": 0.0}]
    request_keys, counts = keys_for(4), np.zeros((4, 700), np.int32)
    jit_keys = jax.jit(position_keys)
    tokens = set()
    for position in range(12):
        keys = jit_keys(request_keys, jnp.full(4, position))
        together = jit_sample(logits, options_for(choices), counts, keys, counts > 0)
        for row, choice in enumerate(choices):
            one = slice(row, row + 1)
            own_key = jit_keys(request_keys[one], jnp.full(1, position))
            alone = jit_sample(logits[one], options_for([choice]), counts[one], own_key, counts[one] > 0)
            assert int(alone.token[0]) == int(together.token[row])
        tokens.add(int(together.token[2]))
    assert len(tokens) > 6  # tokens differ between positions


def test_options_need_no_recompilation():
    for rows in ([{}, {}], [{"top_k": 2}, {"top_p": 0.5}], [{"temperature": 0.0}, {"min_p": 0.1}]):
        sample_padded(np.zeros((2, 9)), rows)
    assert TRACED.count((8, 40)) == 1


def test_top_logprobs():
    logits = np.array([[1.0, 3.0, 3.0, -np.inf], [0.0, 0.0, 0.0, 0.0]], np.float32)
    logprobs, tokens = jax.jit(top_logprobs, static_argnums=1)(logits, 3)
    assert tokens.tolist() == [[1, 2, 0], [0, 1, 2]]
    total = np.log(2 * np.exp(3.0) + np.exp(1.0))
    np.testing.assert_allclose(logprobs, [[3 - total, 3 - total, 1 - total], [-np.log(4)] * 3], rtol=1e-6)


def test_bfloat16_logits():
    """bfloat16 logits are converted to float32 first; the prompt mask is optional."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, 40)), jnp.bfloat16)
    options, counts = make_options(SampleConfig(top_p=0.7), 8), np.zeros((8, 40), np.int32)
    from_bfloat16 = jax.jit(sample)(logits, options, counts, keys_for(8))
    from_float32 = sample_padded(np.asarray(logits, np.float32), [{"top_p": 0.7, "temperature": 0.8}] * 8)
    assert from_bfloat16.logprob.dtype == jnp.float32
    assert all(np.array_equal(a, b) for a, b in zip(from_bfloat16, from_float32, strict=True))


def test_no_requests():
    with pytest.raises(ConfigError, match="got no sampling options"):
        stack_options([])
