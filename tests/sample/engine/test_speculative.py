# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding generates the tokens of plain decoding, in fewer steps, and counts the accepted ones."""

import numpy as np
import pytest
from engine_models import make_model_and_params, random_prompts

from mesh_transformer.config import ConfigError, SampleConfig
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.device_state import DecodeState
from mesh_transformer.sample.engine.requests import Request, RequestParams
from mesh_transformer.sample.engine.speculative import DraftModelDrafter, PromptLookupDrafter
from mesh_transformer.sample.engine.warmup import warm_up

GREEDY = SampleConfig(temperature=0.0)
WARM = SampleConfig(temperature=1.0, top_p=0.95)
UNUSED_STATE = DecodeState(*[None] * 6)  # prompt lookup needs only the tokens


@pytest.fixture(scope="module")
def plain():
    return DecoderOnlyEngine(*make_model_and_params())


def make_drafter(kind):
    match kind:
        case "prompt-lookup":
            return PromptLookupDrafter(max_ngram=2, num_draft_tokens=3)
        case "same":
            return DraftModelDrafter(*make_model_and_params(), num_draft_tokens=3)
        case "other":
            return DraftModelDrafter(*make_model_and_params(seed=3, n_layers=1), num_draft_tokens=3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("prompt-lookup", WARM),
        ("same", GREEDY),
        ("same", WARM),
        ("other", SampleConfig(temperature=0.9, repetition_penalty=1.3)),
    ],
)
def test_tokens_are_those_of_plain_decoding(plain, kind, options):
    prompts = [[5, 6, 7, 8] * 4, *random_prompts(20, 3)]
    expected = plain.generate(prompts, options, max_tokens=30, seed=2, n=2)
    engine = DecoderOnlyEngine(*make_model_and_params(), drafter=make_drafter(kind))
    generation = engine.start(prompts, options, max_tokens=30, seed=2, n=2)
    tokens, steps = [[] for _ in range(6)], 0
    while not generation.done:
        steps += 1
        for event in generation.step(1):
            tokens[event.request].append(event.token)
    assert tokens == [c.tokens for samples in expected for c in samples]
    assert engine.compilations["verify"], "no tokens were drafted"
    stats = engine.speculative_stats
    assert 0 <= stats.accepted_tokens <= stats.draft_tokens
    assert stats.draft_tokens == sum(generation.speculative_stats(i).draft_tokens for i in range(6)) > 0
    assert stats.accepted_tokens == sum(generation.speculative_stats(i).accepted_tokens for i in range(6))
    if kind == "same":
        assert steps <= 9, "the model accepts its own tokens: 1 + 29 / 4 steps"
        assert stats.accepted_tokens >= 6 * 21, "29 tokens after the first, in steps of one token and 3 accepted ones"


def test_sequences_end_at_seq_len(plain):
    """Draft tokens past the last position are not generated."""
    prompt = [5, 6, 7] * 30
    [[expected]] = plain.generate([prompt], GREEDY, max_tokens=6)
    engine = DecoderOnlyEngine(*make_model_and_params(), drafter=PromptLookupDrafter(1, 8))
    [[found]] = engine.generate([prompt], GREEDY, max_tokens=6)
    assert (found.tokens, found.finish) == (expected.tokens, "length")
    assert engine.compilations["verify"]


def test_prompt_lookup_drafts_what_followed_the_last_match():
    requests = [Request(np.array(tokens, np.int32), RequestParams()) for tokens in ([1, 2, 3, 9, 1, 2], [4, 5, 6])]
    draft = PromptLookupDrafter(max_ngram=3, num_draft_tokens=4).draft([requests[0], None, requests[1]], UNUSED_STATE)
    assert draft.lengths.tolist() == [4, 0, 0]
    assert draft.tokens[0].tolist() == [3, 9, 1, 2]
    assert PromptLookupDrafter().draft([requests[1]], UNUSED_STATE) is None


def test_warm_up_compiles_plain_and_speculative_decoding():
    engine = DecoderOnlyEngine(*make_model_and_params(n_layers=1), drafter=PromptLookupDrafter())
    drafter = engine.drafter
    list(warm_up(engine, 40))
    assert engine.drafter is drafter
    before = engine.compilations
    assert min(before["verify"], before["decode"]) > 0
    engine.generate([[5, 6, 7, 8] * 4], WARM, max_tokens=20)
    engine.generate(random_prompts(20), WARM, max_tokens=20)
    assert engine.compilations == before


def test_unfit_drafters_are_refused(plain):
    with pytest.raises(ConfigError, match="both must be at least 1"):
        PromptLookupDrafter(max_ngram=0)
    engine = DecoderOnlyEngine(*make_model_and_params(), drafter=DraftModelDrafter(*make_model_and_params(n_vocab=96)))
    with pytest.raises(ConfigError, match="the draft model has n_vocab=96, but the model has n_vocab=97"):
        engine.generate([[1, 2]], GREEDY, max_tokens=4)
