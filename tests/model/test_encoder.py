# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoder and encoder-only models: attention masks, and equality of cached and full computation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ConfigError, ModelConfig, parse_config
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.config.presets import T5
from mesh_transformer.model.shapes import describe_params, init_cache
from mesh_transformer.model.transformer import make_model

SIZES = dict(n_layers=2, n_encoder_layers=4, d_model=16, n_heads=2, n_vocab=37, seq_len=24)
CONFIG = ModelConfig(**T5 | SIZES)
EXPERTS = dataclasses.replace(CONFIG, experts=ExpertsConfig(n_experts=4, layer_interval=2))
ENCODER_TOKENS, TOKENS = (
    np.random.default_rng(i).integers(0, 37, (3, n), dtype=np.int32) for i, n in enumerate((9, 6))
)


def draw_params(config: ModelConfig):
    """Return weights that are large enough for every input to affect the output."""
    rng, names = np.random.default_rng(0), describe_params(config)
    return {
        module: {name: jnp.asarray(rng.normal(size=info.shape) / 3, jnp.float32) for name, info in arrays.items()}
        for module, arrays in names.items()
    }


def run(config: ModelConfig, tokens, **inputs):
    return np.asarray(jax.jit(make_model(config).apply)(draw_params(config), jnp.asarray(tokens), **inputs)[0])


@pytest.mark.parametrize("config", [CONFIG, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_equals_full(config, padded):
    model, params = make_model(config), draw_params(config)
    segment_ids = {"encoder_segment_ids": jnp.asarray(np.arange(9) < [[9], [5], [7]], jnp.int32)} if padded else {}
    full, _ = jax.jit(model.apply)(params, TOKENS, encoder_tokens=ENCODER_TOKENS, **segment_ids)
    step = jax.jit(model.apply)
    cache = init_cache(config, 3, 8, encoder_len=9)
    found = []
    for position in range(TOKENS.shape[1]):
        inputs = {"encoder_tokens": ENCODER_TOKENS} if position == 0 else {}
        positions = jnp.full((3, 1), position)
        logits, cache = step(params, TOKENS[:, [position]], positions=positions, cache=cache, **inputs, **segment_ids)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), full, atol=2e-5 * np.abs(full).max())


def test_padding_has_no_influence_and_order_has():
    segment_ids = jnp.asarray(np.arange(9) < [[9], [5], [7]], jnp.int32)
    full = run(CONFIG, TOKENS, encoder_tokens=ENCODER_TOKENS, encoder_segment_ids=segment_ids)
    other = np.where(segment_ids > 0, ENCODER_TOKENS, (ENCODER_TOKENS + 1) % 37)
    np.testing.assert_array_equal(run(CONFIG, TOKENS, encoder_tokens=other, encoder_segment_ids=segment_ids), full)
    unpadded = run(CONFIG, TOKENS[1:2], encoder_tokens=ENCODER_TOKENS[1:2, :5])
    np.testing.assert_allclose(unpadded, full[1:2], atol=1e-5 * np.abs(full).max())
    assert (
        np.abs(
            run(CONFIG, TOKENS, encoder_tokens=ENCODER_TOKENS[:, ::-1])
            - run(CONFIG, TOKENS, encoder_tokens=ENCODER_TOKENS)
        ).max()
        > 1e-4
    )


@pytest.mark.parametrize("positions", ["t5", "alibi", "rope-half", "learned", "none"])
def test_only_the_decoder_is_causal(positions):
    config = dataclasses.replace(CONFIG, positions=positions)
    before, changed = run(config, TOKENS, encoder_tokens=ENCODER_TOKENS), ENCODER_TOKENS.copy()
    later = TOKENS.copy()
    later[:, 4], changed[:, -1] = (later[:, 4] + 1) % 37, (changed[:, -1] + 1) % 37
    after = run(config, later, encoder_tokens=ENCODER_TOKENS)
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert np.abs(after[:, 4:] - before[:, 4:]).max() > 0.01
    assert (np.abs(run(config, TOKENS, encoder_tokens=changed) - before).max(axis=(0, 2)) > 1e-5).all()


@pytest.mark.parametrize("pattern", [("global",), ("global", "local")])
def test_encoder_only_attention_is_bidirectional(pattern):
    config = ModelConfig(
        **T5 | SIZES | dict(n_encoder_layers=None, causal=False, attention_pattern=pattern, attention_window=2)
    )
    before, changed = run(config, ENCODER_TOKENS), ENCODER_TOKENS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 37
    moved = np.abs(run(config, changed) - before).max(axis=(0, 2))
    assert (moved > 1e-5).all()
    local = dataclasses.replace(config, n_layers=1, attention_pattern=("local",))
    moved = np.abs(run(local, changed) - run(local, ENCODER_TOKENS)).max(axis=(0, 2))
    assert [position for position in range(9) if moved[position] > 0] == [4, 5, 6]


def test_unsupported_models_are_refused():
    def refuse(message: str, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            ModelConfig(**T5 | SIZES | changes)

    refuse("n_encoder_layers=4 requires causal=true", causal=False)
    refuse('n_encoder_layers=4 requires residual="serial"', residual="parallel")
    refuse(
        "n_encoder_layers=3 is not a multiple of 2",
        n_encoder_layers=3,
        experts=ExpertsConfig(n_experts=4, layer_interval=2),
    )
    with pytest.raises(ConfigError, match="an encoder-decoder model needs encoder_tokens"):
        make_model(CONFIG).apply(draw_params(CONFIG), jnp.asarray(TOKENS))
    alone = ModelConfig(**T5 | SIZES | dict(n_encoder_layers=None))
    with pytest.raises(ConfigError, match=r"encoder_tokens were given, but model\.n_encoder_layers is not set"):
        make_model(alone).apply(draw_params(alone), jnp.asarray(TOKENS), encoder_tokens=jnp.asarray(ENCODER_TOKENS))
    encoder = dataclasses.replace(alone, causal=False)
    with pytest.raises(ConfigError, match=r"model\.causal=false: an encoder-only model cannot decode"):
        make_model(encoder).apply(draw_params(encoder), jnp.asarray(TOKENS), cache=init_cache(encoder, 3, 8))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("mesh", dict(context=2), r"mesh\.context=2 is not supported with model\.n_encoder_layers"),
        ("mesh", dict(pipeline=2), r"mesh\.pipeline=2 is not supported with model\.n_encoder_layers"),
        ("train", dict(loss_chunks=3), "the number of target tokens, 8, which follows from .* is not a multiple"),
    ],
)
def test_unsupported_runs_are_refused(section, values, message):
    table = {
        "model": T5 | SIZES | dict(seq_len=32),
        "data": {"train": {"a": {"path": "x"}}},
        "train": dict(steps=1, batch_size=4),
    }
    table[section] = table.get(section, {}) | values
    with pytest.raises(ConfigError, match=message):
        parse_config(table, where="test")
