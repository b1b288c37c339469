# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""load_model reads checkpoints, applies overrides of sampling and serving, and configures speculative decoding."""

import dataclasses
import json

import pytest

from mesh_transformer.config import ConfigError
from mesh_transformer.convert.huggingface.reader import find_family
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.loading import load_model, load_sampling_config
from mesh_transformer.sample.text_generation import complete_texts

PROMPTS = ["abcabcabcabc", "a prompt"]


def complete(model, **changes):
    options = dataclasses.replace(model.config.sample, max_tokens=60, **changes)
    return complete_texts(model.engine, model.defaults, PROMPTS, options, seed=3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", ["prompt-lookup", "draft-model"])
def test_speculative_decoding_generates_the_same_tokens(run, model, save_run, method, temperature):
    overrides = [f'serve.speculative="{method}"', "serve.num_speculative_tokens=3"]
    if method == "draft-model":
        overrides.append(f'serve.draft_model="{run}"')  # the model itself: all draft tokens are accepted
    speculative = load_model(run, overrides)
    assert isinstance(speculative.engine, DecoderOnlyEngine)
    assert speculative.engine.is_speculative
    expected = complete(model, temperature=temperature)
    found = complete(speculative, temperature=temperature)
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    assert [c.speculative for c in expected] == [None, None]
    stats = [c.speculative for c in found]
    assert all(0 <= each.accepted_tokens <= each.draft_tokens for each in stats)
    if method == "draft-model":
        assert min(each.accepted_tokens for each in stats) >= 40, "59 tokens after the first, mostly in steps of 4"
    elif temperature == 0:  # random text hardly repeats itself
        assert stats[0].draft_tokens > 0


def test_a_draft_model_may_differ_but_not_in_its_vocabulary(run, model, save_run):
    small = save_run(d_model=8, seq_len=1024)
    overrides = ['serve.speculative="draft-model"', f'serve.draft_model="{small}"']
    found = complete(load_model(run, overrides), temperature=0.0)
    assert [c.tokens for c in found] == [c.tokens for c in complete(model, temperature=0.0)]
    assert found[0].speculative.draft_tokens > 0
    other = save_run(n_vocab=300)
    overrides[1] = f'serve.draft_model="{other}"'
    with pytest.raises(
        ConfigError, match=r"serve\.draft_model=.*n_vocab=300, but the model has n_vocab=257; use a draft"
    ):
        load_model(run, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['serve.speculative="draft-model"'], 'speculative="draft-model" requires draft_model'),
        (['serve.draft_model="runs/small"'], 'has no effect with speculative="none"'),
        (['serve.speculative="ngram"'], "serve.speculative"),
        (["serve.num_speculative_tokens=0"], "serve.num_speculative_tokens"),
        (["train.steps=5"], r"train\.steps of a trained model cannot be changed"),
    ],
)
def test_overrides_are_checked(run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_model(run, overrides)


def test_the_configuration_needs_no_weights(run, model, tmp_path):
    overrides = ["sample.max_tokens=7"]
    expected = dataclasses.replace(model.config, sample=dataclasses.replace(model.config.sample, max_tokens=7))
    assert load_sampling_config(run, overrides) == expected
    _, table = find_family(model.config.model)
    (tmp_path / "config.json").write_text(json.dumps(table))
    found = load_sampling_config(tmp_path, overrides)
    assert found.model.effective_fields() == model.config.model.effective_fields()
    assert found.sample.max_tokens == 7
    with pytest.raises(ConfigError, match=r"train\.steps of a trained model cannot be changed"):
        load_sampling_config(tmp_path, ["train.steps=5"])


def test_encoder_decoder_models_refuse_speculative_decoding(save_run):
    folder = save_run(n_encoder_layers=1, seq_len=64)
    assert not load_model(folder).engine.is_speculative
    with pytest.raises(ConfigError, match=r"serve\.speculative.*only supported for decoder-only models"):
        load_model(folder, ['serve.speculative="prompt-lookup"'])
