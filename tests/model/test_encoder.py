# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""An encoder, a decoder that reads it, and an encoder alone: who sees whom, and that a cache changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ConfigError, ModelConfig, parse_config
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.config.presets import T5
from mesh_transformer.model.transformer import make_model
from mesh_transformer.model.shapes import describe_params, init_cache

SIZES = dict(n_layers=2, n_encoder_layers=4, d_model=16, n_heads=2, n_vocab=37, seq_len=24)
CONFIG = ModelConfig(**T5 | SIZES)
EXPERTS = dataclasses.replace(CONFIG, experts=ExpertsConfig(n_experts=4, layer_interval=2))
SOURCES, TOKENS = (np.random.default_rng(i).integers(0, 37, (3, n), dtype=np.int32) for i, n in enumerate((9, 6)))


def draw_params(config: ModelConfig):
    """Weights that say something."""
    rng, names = np.random.default_rng(0), describe_params(config)
    return {
        module: {name: jnp.asarray(rng.normal(size=info.shape) / 3, jnp.float32) for name, info in arrays.items()}
        for module, arrays in names.items()
    }


def run(config: ModelConfig, tokens, **inputs):
    return np.asarray(jax.jit(make_model(config).apply)(draw_params(config), jnp.asarray(tokens), **inputs)[0])


@pytest.mark.parametrize("config", [CONFIG, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_is_full(config, padded):
    model, params = make_model(config), draw_params(config)
    segments = {"source_segments": jnp.asarray(np.arange(9) < [[9], [5], [7]], jnp.int32)} if padded else {}
    full, _ = jax.jit(model.apply)(params, TOKENS, sources=SOURCES, **segments)
    step, cache, found = jax.jit(model.apply), init_cache(config, 3, 8, source_len=9), []
    for place in range(TOKENS.shape[1]):
        given = {"sources": SOURCES} if place == 0 else {}
        places = jnp.full((3, 1), place)
        logits, cache = step(params, TOKENS[:, [place]], positions=places, cache=cache, **given, **segments)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), full, atol=2e-5 * np.abs(full).max())


def test_padding_is_not_read_and_order_is():
    segments = jnp.asarray(np.arange(9) < [[9], [5], [7]], jnp.int32)
    full = run(CONFIG, TOKENS, sources=SOURCES, source_segments=segments)
    other = np.where(segments > 0, SOURCES, (SOURCES + 1) % 37)
    np.testing.assert_array_equal(run(CONFIG, TOKENS, sources=other, source_segments=segments), full)
    cut = run(CONFIG, TOKENS[1:2], sources=SOURCES[1:2, :5])
    np.testing.assert_allclose(cut, full[1:2], atol=1e-5 * np.abs(full).max())
    assert np.abs(run(CONFIG, TOKENS, sources=SOURCES[:, ::-1]) - run(CONFIG, TOKENS, sources=SOURCES)).max() > 1e-4


@pytest.mark.parametrize("positions", ["t5", "alibi", "rope-half", "learned", "none"])
def test_only_the_decoder_is_causal(positions):
    config = dataclasses.replace(CONFIG, positions=positions)
    before, changed = run(config, TOKENS, sources=SOURCES), SOURCES.copy()
    later = TOKENS.copy()
    later[:, 4], changed[:, -1] = (later[:, 4] + 1) % 37, (changed[:, -1] + 1) % 37
    after = run(config, later, sources=SOURCES)
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert np.abs(after[:, 4:] - before[:, 4:]).max() > 0.01
    assert (np.abs(run(config, TOKENS, sources=changed) - before).max(axis=(0, 2)) > 1e-5).all()


@pytest.mark.parametrize("pattern", [("global",), ("global", "local")])
def test_an_encoder_alone_sees_both_sides(pattern):
    config = ModelConfig(
        **T5 | SIZES | dict(n_encoder_layers=None, causal=False, attention_pattern=pattern, attention_window=2)
    )
    before, changed = run(config, SOURCES), SOURCES.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 37
    moved = np.abs(run(config, changed) - before).max(axis=(0, 2))
    assert (moved > 1e-5).all()
    local = dataclasses.replace(config, n_layers=1, attention_pattern=("local",))
    moved = np.abs(run(local, changed) - run(local, SOURCES)).max(axis=(0, 2))
    assert [place for place in range(9) if moved[place] > 0] == [4, 5, 6]


def test_what_cannot_be_is_refused():
    def refuse(message: str, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            ModelConfig(**T5 | SIZES | changes)

    refuse("n_encoder_layers=4 needs causal=true", causal=False)
    refuse('n_encoder_layers=4 needs residual="serial"', residual="parallel")
    refuse(
        "n_encoder_layers=3 is not a multiple of 2",
        n_encoder_layers=3,
        experts=ExpertsConfig(n_experts=4, layer_interval=2),
    )
    with pytest.raises(ConfigError, match="the encoder has nothing to read; give sources"):
        make_model(CONFIG).apply(draw_params(CONFIG), jnp.asarray(TOKENS))
    alone = ModelConfig(**T5 | SIZES | dict(n_encoder_layers=None))
    with pytest.raises(ConfigError, match=r"sources are for a model with an encoder; set model\.n_encoder_layers"):
        make_model(alone).apply(draw_params(alone), jnp.asarray(TOKENS), sources=jnp.asarray(SOURCES))
    encoder = dataclasses.replace(alone, causal=False)
    with pytest.raises(ConfigError, match=r"model\.causal=false: an encoder sees all of a text at once"):
        make_model(encoder).apply(draw_params(encoder), jnp.asarray(TOKENS), cache=init_cache(encoder, 3, 8))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("mesh", dict(context=2), r"model\.n_encoder_layers needs mesh\.context=1"),
        ("mesh", dict(pipeline=2), r"model\.n_encoder_layers needs mesh\.pipeline=1"),
        ("train", dict(loss_chunks=3), r"what the decoder writes \(data\.noise_density\)=8 is not a multiple"),
        ("model", dict(n_encoder_layers=None, causal=False), r"model\.causal=false: next-token training would show"),
    ],
)
def test_a_run_says_what_it_cannot_do(section, values, message):
    table = {
        "model": T5 | SIZES | dict(seq_len=32),
        "data": {"train": {"a": {"path": "x"}}},
        "train": dict(steps=1, batch_size=4),
    }
    table[section] = table.get(section, {}) | values
    with pytest.raises(ConfigError, match=message):
        parse_config(table, where="test")
