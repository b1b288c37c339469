# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Ours = `transformers`, logits and gradients, for every family: against stored goldens always, and live where torch is.

A golden file tests/golden/reference_<case>.npz holds the reference's weights under their own names ("weight:NAME",
float16 values), tokens and targets [B, T], logits [B, T, V] and the gradients of the mean loss ("grad:NAME").
`python tests/model/test_reference.py` writes them anew from the installed transformers.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.transformer import describe_params, make_model

GOLDEN = Path(__file__).parents[1] / "golden"
LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4  # absolute; relative to the largest entry of the array
Arrays = dict[str, np.ndarray]


# How an array of theirs turns into ours, up to the split of heads, which is a reshape.
def same(x, config):
    return x


def turned(x, config):  # torch's Linear stores [outputs, inputs]
    return x.T


def part(i):  # GPT-2: q | k | v side by side
    return lambda x, config: np.split(x, 3, axis=-1)[i]


def head_rows(i):  # GPT-NeoX: every head's rows of q, then k, then v
    return lambda x, config: x.reshape(config.n_heads, 3, config.head_dim, -1)[:, i].reshape(config.d_model, -1).T


# Our array -> theirs, and how it turns into ours. {i} is the layer.
Names = dict[str, tuple[str, Callable[[np.ndarray, ModelConfig], np.ndarray]]]


def norms(**names: str) -> Names:
    scales: Names = {f"{ours}/scale": (f"{theirs}.weight", same) for ours, theirs in names.items()}
    return scales | {f"{ours}/bias": (f"{theirs}.bias", same) for ours, theirs in names.items()}


GPT2: Names = {
    "w_tokens": ("transformer.wte.weight", same),
    "w_positions": ("transformer.wpe.weight", same),
    **norms(norm_1="transformer.h.{i}.ln_1", norm_2="transformer.h.{i}.ln_2", norm_out="transformer.ln_f"),
    **{f"attention/w_{name}": ("transformer.h.{i}.attn.c_attn.weight", part(i)) for i, name in enumerate("qkv")},
    **{f"attention/b_{name}": ("transformer.h.{i}.attn.c_attn.bias", part(i)) for i, name in enumerate("qkv")},
    "attention/w_o": ("transformer.h.{i}.attn.c_proj.weight", same),
    "attention/b_o": ("transformer.h.{i}.attn.c_proj.bias", same),
    "feed_forward/w_in": ("transformer.h.{i}.mlp.c_fc.weight", same),
    "feed_forward/b_in": ("transformer.h.{i}.mlp.c_fc.bias", same),
    "feed_forward/w_out": ("transformer.h.{i}.mlp.c_proj.weight", same),
    "feed_forward/b_out": ("transformer.h.{i}.mlp.c_proj.bias", same),
}
GPT_NEO: Names = {
    "w_tokens": ("transformer.wte.weight", same),
    "w_positions": ("transformer.wpe.weight", same),
    **norms(norm_1="transformer.h.{i}.ln_1", norm_2="transformer.h.{i}.ln_2", norm_out="transformer.ln_f"),
    **{f"attention/w_{name}": (f"transformer.h.{{i}}.attn.attention.{name}_proj.weight", turned) for name in "qkv"},
    "attention/w_o": ("transformer.h.{i}.attn.attention.out_proj.weight", turned),
    "attention/b_o": ("transformer.h.{i}.attn.attention.out_proj.bias", same),
    "feed_forward/w_in": ("transformer.h.{i}.mlp.c_fc.weight", turned),
    "feed_forward/b_in": ("transformer.h.{i}.mlp.c_fc.bias", same),
    "feed_forward/w_out": ("transformer.h.{i}.mlp.c_proj.weight", turned),
    "feed_forward/b_out": ("transformer.h.{i}.mlp.c_proj.bias", same),
}
GPT_J: Names = {
    "w_tokens": ("transformer.wte.weight", same),
    **norms(norm_1="transformer.h.{i}.ln_1", norm_out="transformer.ln_f"),
    **{f"attention/w_{name}": (f"transformer.h.{{i}}.attn.{name}_proj.weight", turned) for name in "qkv"},
    "attention/w_o": ("transformer.h.{i}.attn.out_proj.weight", turned),
    "feed_forward/w_in": ("transformer.h.{i}.mlp.fc_in.weight", turned),
    "feed_forward/b_in": ("transformer.h.{i}.mlp.fc_in.bias", same),
    "feed_forward/w_out": ("transformer.h.{i}.mlp.fc_out.weight", turned),
    "feed_forward/b_out": ("transformer.h.{i}.mlp.fc_out.bias", same),
    "w_head": ("lm_head.weight", turned),
    "b_head": ("lm_head.bias", same),
}
GPT_NEOX: Names = {
    "w_tokens": ("gpt_neox.embed_in.weight", same),
    **norms(norm_1="gpt_neox.layers.{i}.input_layernorm", norm_2="gpt_neox.layers.{i}.post_attention_layernorm"),
    **norms(norm_out="gpt_neox.final_layer_norm"),
    **{
        f"attention/w_{name}": ("gpt_neox.layers.{i}.attention.query_key_value.weight", head_rows(i))
        for i, name in enumerate("qkv")
    },
    **{
        f"attention/b_{name}": ("gpt_neox.layers.{i}.attention.query_key_value.bias", head_rows(i))
        for i, name in enumerate("qkv")
    },
    "attention/w_o": ("gpt_neox.layers.{i}.attention.dense.weight", turned),
    "attention/b_o": ("gpt_neox.layers.{i}.attention.dense.bias", same),
    "feed_forward/w_in": ("gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight", turned),
    "feed_forward/b_in": ("gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias", same),
    "feed_forward/w_out": ("gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight", turned),
    "feed_forward/b_out": ("gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias", same),
    "w_head": ("lm_head.weight", turned),  # "embed_out.weight" before transformers 5
}
LLAMA: Names = {
    "w_tokens": ("model.embed_tokens.weight", same),
    "norm_1/scale": ("model.layers.{i}.input_layernorm.weight", same),
    "norm_2/scale": ("model.layers.{i}.post_attention_layernorm.weight", same),
    "norm_out/scale": ("model.norm.weight", same),
    **{f"attention/w_{name}": (f"model.layers.{{i}}.self_attn.{name}_proj.weight", turned) for name in "qkvo"},
    "feed_forward/w_gate": ("model.layers.{i}.mlp.gate_proj.weight", turned),
    "feed_forward/w_in": ("model.layers.{i}.mlp.up_proj.weight", turned),
    "feed_forward/w_out": ("model.layers.{i}.mlp.down_proj.weight", turned),
    "w_head": ("lm_head.weight", turned),
}


def import_arrays(theirs: Mapping[str, np.ndarray], names: Names, config: ModelConfig) -> dict[str, Arrays]:
    """Their weights (or gradients) as ours; each of theirs must be used, and each of ours found."""
    period = len(config.attention_pattern)
    used: set[str] = set()

    def convert(name: str, layer: int | None) -> np.ndarray:
        key, how = names[name]
        key = key.replace("{i}", str(layer))
        used.add(key)
        return how(theirs[key], config)

    ours: dict[str, Arrays] = {}
    for module, infos in describe_params(config).items():
        inner = module.removeprefix("transformer").removeprefix("/")
        for leaf, info in infos.items():
            if info.axes[0] == "layers":
                _, block, inner = module.removeprefix("transformer/").split("/")
                first = int(block.removeprefix("block_"))
                rows = [convert(f"{inner}/{leaf}", layer) for layer in range(first, config.n_layers, period)]
                array = np.stack(rows).reshape(info.shape)
            else:
                array = convert(f"{inner}/{leaf}".removeprefix("/"), None).reshape(info.shape)
            ours.setdefault(module, {})[leaf] = array
    assert used == set(theirs)
    return ours


def make_gpt2(tf, c: ModelConfig):
    return tf.GPT2LMHeadModel, dict(
        n_embd=c.d_model, n_layer=c.n_layers, n_head=c.n_heads, n_positions=c.seq_len, n_inner=c.d_ff
    )


def make_gpt_neo(tf, c: ModelConfig):
    return tf.GPTNeoForCausalLM, dict(
        hidden_size=c.d_model,
        num_layers=c.n_layers,
        num_heads=c.n_heads,
        max_position_embeddings=c.seq_len,
        attention_types=[[list(c.attention_pattern), c.n_layers // len(c.attention_pattern)]],
        window_size=c.attention_window,
    )


def make_gpt_j(tf, c: ModelConfig):
    return tf.GPTJForCausalLM, dict(
        n_embd=c.d_model, n_layer=c.n_layers, n_head=c.n_heads, n_positions=c.seq_len, rotary_dim=c.rotary_channels
    )


def make_gpt_neox(tf, c: ModelConfig):
    return tf.GPTNeoXForCausalLM, dict(
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        intermediate_size=c.ff_dim,
        max_position_embeddings=c.seq_len,
        rotary_pct=c.rotary_channels / c.head_dim,
        use_parallel_residual=c.residual == "parallel-two-norms",
        hidden_act={"gelu-erf": "gelu", "gelu-tanh": "gelu_fast"}[c.activation],
    )


def make_llama(tf, c: ModelConfig):
    return tf.LlamaForCausalLM, dict(
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.ff_dim,
        max_position_embeddings=c.seq_len,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tied_embeddings,
    )


class Case(NamedTuple):
    names: Names
    make_reference: Callable[[Any, ModelConfig], tuple[Any, dict[str, Any]]]
    config: ModelConfig
    used_vocab: int  # tokens come from below this: rows above are padding


def make_case(names, make_reference, choices: dict[str, Any], used_vocab: int, **sizes) -> Case:
    return Case(names, make_reference, ModelConfig(**{"seq_len": 24, **choices, **sizes}), used_vocab)


NEO = dict(attention_pattern=("global", "local"), attention_scale="none", qkv_bias=False)
J = dict(
    positions="rotary-pairs",
    residual="parallel",
    qkv_bias=False,
    attention_out_bias=False,
    head_bias=True,
    tied_embeddings=False,
)
NEOX = dict(positions="rotary-halves", residual="parallel-two-norms", tied_embeddings=False)
LLAMA_CHOICES = dict(
    norm="rmsnorm",
    positions="rotary-halves",
    activation="silu",
    gated=True,
    qkv_bias=False,
    attention_out_bias=False,
    ff_bias=False,
    tied_embeddings=False,
)
SMALL = dict(n_layers=2, d_model=12, n_heads=2, n_vocab=37)
CASES = {
    "gpt2": make_case(GPT2, make_gpt2, {}, 37, **SMALL),
    "gpt-neo": make_case(GPT_NEO, make_gpt_neo, dict(NEO, attention_window=4), 37, **SMALL),
    "gpt-j": make_case(GPT_J, make_gpt_j, dict(J, rotary_dims=4), 33, **SMALL),
    "gpt-neox": make_case(GPT_NEOX, make_gpt_neox, dict(NEOX, rotary_dims=2), 33, **SMALL),
    "gpt-neox-serial": make_case(
        GPT_NEOX, make_gpt_neox, dict(NEOX, residual="serial", activation="gelu-erf"), 37, **SMALL
    ),
    "llama-gqa": make_case(
        LLAMA,
        make_llama,
        dict(LLAMA_CHOICES, n_kv_heads=2, d_head=4, d_ff=20, norm_eps=1e-6),
        37,
        **SMALL | {"n_heads": 4},
    ),
}
# Odd sizes: three heads, layers whose numbers sort otherwise as text, one key-value head, a window that starts the pattern.
ODD = dict(n_layers=12, d_model=24, n_heads=3, n_vocab=53, seq_len=40)
LIVE_CASES = {
    "gpt2": make_case(GPT2, make_gpt2, dict(d_ff=40), 53, **ODD),
    "gpt-neo-local-first": make_case(
        GPT_NEO, make_gpt_neo, dict(NEO, attention_pattern=("local", "global", "local"), attention_window=5), 53, **ODD
    ),
    "gpt-j": make_case(GPT_J, make_gpt_j, dict(J, rotary_dims=2), 47, **ODD),
    "gpt-neox-quarter": make_case(
        GPT_NEOX, make_gpt_neox, dict(NEOX, rotary_dims=6, d_ff=50), 51, **ODD | {"d_model": 72}
    ),
    "llama-one-key-head": make_case(LLAMA, make_llama, dict(LLAMA_CHOICES, n_kv_heads=1, d_head=10), 53, **ODD),
}
# Compiles in half the time; what is computed is the same.
QUICK: dict[str, bool | int | float | str] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def run_ours(
    case: Case, weights: Arrays, tokens: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, dict[str, Arrays]]:
    """Logits, and gradients of the mean loss, of our model with their weights."""
    model = make_model(case.config)

    def loss(params):
        logits, _ = model.apply(params, jnp.asarray(tokens))
        log_p = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(log_p, jnp.asarray(targets)[..., None], axis=-1)), logits

    params = import_arrays(weights, case.names, case.config)
    gradients, logits = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(params)
    return np.asarray(logits), gradients


def assert_equal(case: Case, ours: tuple[np.ndarray, dict[str, Arrays]], logits: np.ndarray, gradients: Arrays) -> None:
    assert np.std(logits) > 0.1, "the reference says nothing: too small weights"
    np.testing.assert_allclose(ours[0], logits, atol=LOGITS_TOLERANCE, rtol=0)
    wanted = flatten_names(import_arrays(gradients, case.names, case.config))
    found = flatten_names(ours[1])
    assert found.keys() == wanted.keys()
    # A key's bias moves all of a row's scores alike, so its gradient is zero but for rounding: compare on the queries' scale.
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = largest if name.endswith("attention/b_k") else np.abs(gradient).max()
        assert scale > 0, f"{name} has no gradient: the case does not test it"
        np.testing.assert_allclose(found[name], gradient, atol=GRADIENT_TOLERANCE * scale, rtol=0, err_msg=name)


def read_golden(name: str) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray, Arrays]:
    with np.load(GOLDEN / f"reference_{name}.npz") as file:
        weights = {
            key.removeprefix("weight:"): file[key].astype(np.float32) for key in file if key.startswith("weight:")
        }
        gradients = {key.removeprefix("grad:"): file[key] for key in file if key.startswith("grad:")}
        return weights, file["tokens"], file["targets"], file["logits"], gradients


@pytest.mark.parametrize("name", CASES)
def test_ours_equals_golden(name):
    weights, tokens, targets, logits, gradients = read_golden(name)
    assert_equal(CASES[name], run_ours(CASES[name], weights, tokens, targets), logits, gradients)


# From here on with torch.
def make_torch(case: Case):
    """Their model, in evaluation mode, and its weights by name (tied ones once)."""
    transformers = pytest.importorskip(
        "transformers", reason="the live comparison needs pip install transformers torch"
    )
    pytest.importorskip("torch", reason="the live comparison needs pip install transformers torch")
    kind, sizes = case.make_reference(transformers, case.config)
    ids = dict(vocab_size=case.config.n_vocab, bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    model = kind(kind.config_class(**sizes, **ids)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model, dict(model.named_parameters())


def draw(case: Case, weights: Mapping[str, Any], seed: int) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Weights that are far from their initial values (biases, norms and logits of order one), tokens and targets."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, weight in weights.items():
        shape = tuple(weight.shape)
        x = rng.normal(size=shape) * (0.3 if len(shape) == 1 else 0.7 / case.config.d_model**0.5)
        drawn[name] = (
            (x + 1.0 if len(shape) == 1 and name.endswith("weight") else x).astype(np.float16).astype(np.float32)
        )
    tokens, targets = rng.integers(0, case.used_vocab, size=(2, 3, case.config.seq_len - 1), dtype=np.int32)
    return drawn, tokens, targets


def run_torch(model, parameters, weights: Arrays, tokens: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, Arrays]:
    import torch

    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        parameter.data = torch.tensor(weights[name])
        parameter.grad = None
    logits = model(torch.tensor(tokens, dtype=torch.long)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets, dtype=torch.long).flatten())
    loss.backward()
    return logits.detach().numpy(), {name: parameter.grad.numpy() for name, parameter in parameters.items()}


@pytest.mark.parametrize("name", CASES)
def test_golden_equals_transformers(name):
    model, parameters = make_torch(CASES[name])
    weights, tokens, targets, logits, gradients = read_golden(name)
    live_logits, live_gradients = run_torch(model, parameters, weights, tokens, targets)
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
    logits, gradients = run_torch(model, parameters, weights, tokens, targets)
    assert_equal(case, run_ours(case, weights, tokens, targets), logits, gradients)


def write_goldens() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, case) in enumerate(CASES.items()):
        model, parameters = make_torch(case)
        weights, tokens, targets = draw(case, parameters, seed)
        logits, gradients = run_torch(model, parameters, weights, tokens, targets)
        arrays = {f"weight:{key}": weight.astype(np.float16) for key, weight in weights.items()}
        arrays |= {f"grad:{key}": gradient for key, gradient in gradients.items()}
        path = GOLDEN / f"reference_{name}.npz"
        np.savez_compressed(path, allow_pickle=False, tokens=tokens, targets=targets, logits=logits, **arrays)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    write_goldens()
