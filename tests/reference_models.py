# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Models of `transformers` that the native model is compared with: configurations, golden files, and live models.

A golden file tests/golden/reference_<case>.npz holds the weights under the names of transformers ("weight:NAME", float16
values), tokens and targets [B, T], logits [B, T, V] and the gradients of the mean loss ("grad:NAME").
`python tests/model/test_reference.py` writes all of them from the installed transformers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.model import RopeScalingConfig
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.config.presets import T5, T5_V1_1
from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.huggingface.reader import find_array, find_family
from mesh_transformer.convert.import_plan import PREFIX, assemble, describe_weights
from mesh_transformer.convert.lazy_arrays import InMemory, full_index

GOLDEN = Path(__file__).parent / "golden"
Arrays = dict[str, np.ndarray]


class Case(NamedTuple):
    kind: str  # model_type in transformers
    config: ModelConfig
    used_vocab: int  # tokens are below this; the rest of the vocabulary is padding


def make_case(kind: str, choices: dict[str, Any], used_vocab: int, **sizes) -> Case:
    return Case(kind, ModelConfig(**{"seq_len": 24, **choices, **sizes}), used_vocab)


NEO = dict(attention_pattern=("global", "local"), attention_scale="none", qkv_bias=False)
J = dict(
    positions="rope-interleaved",
    residual="parallel",
    qkv_bias=False,
    attention_out_bias=False,
    head_bias=True,
    tied_embeddings=False,
)
NEOX = dict(positions="rope-half", residual="parallel-two-norms", tied_embeddings=False)
ROPE_SCALING = RopeScalingConfig(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_seq_len=16)
LLAMA_CHOICES = dict(
    norm="rmsnorm",
    positions="rope-half",
    activation="silu",
    gated_ffn=True,
    qkv_bias=False,
    attention_out_bias=False,
    ff_bias=False,
    tied_embeddings=False,
)
GEMMA2_CHOICES = dict(
    norm="gemma-rmsnorm", norm_eps=1e-6, residual="sandwich", positions="rope-half", activation="gelu-tanh", gated_ffn=True,
    attention_pattern=("local", "global"), attention_window=6, attention_scale=0.25, attention_softcap=3.0, logit_softcap=2.0,
    embedding_scale="sqrt_d_model", qkv_bias=False, attention_out_bias=False, ff_bias=False, n_kv_heads=1,
)  # fmt: skip
SWITCH_EXPERTS = dict(n_experts=4, layer_interval=2, eval_capacity=3)  # of 23 tokens: many are dropped
SMALL = dict(n_layers=2, d_model=12, n_heads=2, n_vocab=37)
CASES = {
    "gpt2": make_case("gpt2", {}, 37, **SMALL),
    "gpt-neo": make_case("gpt_neo", dict(NEO, attention_window=4), 37, **SMALL),
    "gpt-j": make_case("gptj", dict(J, rope_dims=4), 33, **SMALL),
    "gpt-neox": make_case("gpt_neox", dict(NEOX, rope_dims=2), 33, **SMALL),
    "gpt-neox-serial": make_case("gpt_neox", dict(NEOX, residual="serial", activation="gelu-erf"), 37, **SMALL),
    "llama-gqa": make_case(
        "llama",
        dict(LLAMA_CHOICES, n_kv_heads=2, d_head=4, d_ff=20, norm_eps=1e-6),
        37,
        **SMALL | {"n_heads": 4},
    ),
    "gemma2": make_case("gemma2", dict(GEMMA2_CHOICES, d_head=8, d_ff=20), 37, **SMALL),
    "mixtral": make_case(
        "mixtral",
        dict(
            LLAMA_CHOICES,
            n_kv_heads=2,
            d_head=4,
            d_ff=20,
            experts=ExpertsConfig(n_experts=4, n_experts_per_token=2),
            rope_theta=1e6,
        ),
        37,
        **SMALL | {"n_heads": 4},
    ),
}
SMALL_T5 = SMALL | dict(n_encoder_layers=2, d_head=5, d_ff=20, seq_len=24)
CASES |= {
    "t5": make_case("t5", T5, 35, **SMALL_T5),
    "t5-v1.1": make_case("t5", T5_V1_1, 35, **SMALL_T5),
    "switch": make_case("switch_transformers", dict(T5, experts=ExpertsConfig(**SWITCH_EXPERTS)), 35, **SMALL_T5),
}
# Unusual sizes: three heads, layer numbers that sort differently as text, one key-value head, a local first layer.
ODD = dict(n_layers=12, d_model=24, n_heads=3, n_vocab=53, seq_len=40)
LIVE_CASES = {
    "gpt2": make_case("gpt2", dict(d_ff=40), 53, **ODD),
    "gpt-neo-local-first": make_case(
        "gpt_neo", dict(NEO, attention_pattern=("local", "global", "local"), attention_window=5), 53, **ODD
    ),
    "gpt-j": make_case("gptj", dict(J, rope_dims=2), 47, **ODD),
    "gpt-neox-quarter": make_case("gpt_neox", dict(NEOX, rope_dims=6, d_ff=50), 51, **ODD | {"d_model": 72}),
    "mistral": make_case(
        "mistral",
        dict(LLAMA_CHOICES, n_kv_heads=1, attention_pattern=("local",), attention_window=7),
        53,
        **ODD,
    ),
    "mixtral-8-windows": make_case(
        "mixtral",
        dict(
            LLAMA_CHOICES,
            n_kv_heads=1,
            d_ff=28,
            attention_pattern=("local",),
            attention_window=7,
            experts=ExpertsConfig(n_experts=8, n_experts_per_token=2),
        ),
        53,
        **ODD,
    ),
    "mixtral-12-of-3-tied": make_case(
        "mixtral",
        dict(LLAMA_CHOICES, d_head=6, experts=ExpertsConfig(n_experts=12, n_experts_per_token=3), tied_embeddings=True),
        53,
        **ODD | {"n_layers": 3},
    ),
    "arcee": make_case("arcee", dict(LLAMA_CHOICES, gated_ffn=False, n_kv_heads=1, activation="gelu-tanh"), 53, **ODD),
    "qwen2": make_case("qwen2", dict(LLAMA_CHOICES, qkv_bias=True, rope_theta=1e6), 53, **ODD),
    "qwen3": make_case(
        "qwen3", dict(LLAMA_CHOICES, qk_norm=True, n_kv_heads=1, d_head=6, tied_embeddings=True), 53, **ODD
    ),
    "qwen2-windows": make_case(
        "qwen2",
        dict(LLAMA_CHOICES, qkv_bias=True, attention_pattern=("global", "local", "local"), attention_window=6),
        53,
        **ODD,
    ),
    "llama-3-rotary": make_case(
        "llama", dict(LLAMA_CHOICES, d_head=16, rope_theta=5e5, rope_scaling=ROPE_SCALING), 53, **ODD
    ),
    "llama-one-key-head-biases": make_case(
        "llama",
        dict(LLAMA_CHOICES, n_kv_heads=1, d_head=10, ff_bias=True, qkv_bias=True, attention_out_bias=True),
        53,
        **ODD,
    ),
}
ODD_T5 = ODD | dict(n_encoder_layers=3, n_layers=6, d_head=7, seq_len=190)  # sequences longer than the last bucket
LIVE_CASES |= {
    "gemma2": make_case(
        "gemma2", dict(GEMMA2_CHOICES, d_head=6, attention_scale="rsqrt_d_head"), 53, **ODD | dict(n_layers=6)
    ),
    "gemma2-untied-uncapped": make_case(
        "gemma2",
        dict(
            GEMMA2_CHOICES,
            tied_embeddings=False,
            attention_softcap=None,
            logit_softcap=None,
            rope_theta=5e4,
            attention_pattern=("local", "local", "global"),
            activation="silu",
        ),
        53,
        **ODD | dict(n_layers=6),
    ),
    "t5": make_case("t5", T5, 53, **ODD_T5),
    "t5-16-buckets": make_case("t5", dict(T5, t5_buckets=16, t5_max_distance=50), 53, **ODD_T5),
    "t5-gated-silu": make_case("t5", dict(T5, gated_ffn=True, activation="silu"), 53, **ODD_T5),
    "t5-v1.1-deep-encoder": make_case("t5", T5_V1_1, 53, **ODD_T5 | dict(n_encoder_layers=11, n_layers=2)),
    "switch-every-layer-none-dropped": make_case(
        "switch_transformers",
        dict(T5, experts=ExpertsConfig(n_experts=5, eval_capacity=189), activation="gelu-tanh"),
        53,
        **ODD_T5,
    ),
    "switch-untied-dropped": make_case(
        "switch_transformers",
        dict(
            T5,
            experts=ExpertsConfig(n_experts=7, layer_interval=2, eval_capacity=11),
            tied_embeddings=False,
            logit_scale="none",
        ),
        53,
        **ODD_T5 | dict(n_encoder_layers=4),
    ),
}


def read_golden(name: str) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray, Arrays]:
    with np.load(GOLDEN / f"reference_{name}.npz") as file:
        weights = {
            key.removeprefix("weight:"): file[key].astype(np.float32) for key in file if key.startswith("weight:")
        }
        gradients = {key.removeprefix("grad:"): file[key] for key in file if key.startswith("grad:")}
        return weights, file["tokens"], file["targets"], file["logits"], gradients


def make_torch(case: Case):
    """Return the model of transformers in evaluation mode, and its weights by their names in files (tied ones once)."""
    transformers = pytest.importorskip(
        "transformers", reason="the live comparison needs pip install transformers torch"
    )
    pytest.importorskip("torch", reason="the live comparison needs pip install transformers torch")
    family = FAMILIES[case.kind]
    kind = getattr(transformers, family.architecture)
    sizes = family.write_config(case.config) | {"tie_word_embeddings": case.config.tied_embeddings}
    ids: dict[str, Any] = dict(bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    if case.kind == "gemma2":  # its embedding has no gradient for the padding token, which is 0 by default
        ids["pad_token_id"] = None
    model = kind(kind.config_class(**sizes | ids)).eval()
    if case.config.encoder is not None and not case.config.tied_embeddings:
        untie(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    parameters: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        fused = ".mlp.experts." in name and name.endswith("_proj")
        parameters |= split_experts(name, parameter) if fused else {name: parameter}
    return model, {name.replace(".mlp.gate.", ".block_sparse_moe.gate."): each for name, each in parameters.items()}


def untie(model: Any) -> None:
    """Give the model a separate head and shared embeddings, which some classes of transformers do not do by themselves."""
    model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach().clone())
    model.set_input_embeddings(model.shared)


def run_model(case: Case, model: Any, tokens: np.ndarray) -> Any:
    """Return the logits of a model of transformers. Its encoder, if any, runs on `make_encoder_inputs`."""
    import torch

    input_ids = torch.tensor(tokens, dtype=torch.long)
    encoder_inputs = make_encoder_inputs(case, tokens)
    if encoder_inputs is None:
        return model(input_ids).logits
    encoder_tokens, mask = (torch.tensor(x.copy(), dtype=torch.long) for x in encoder_inputs)
    return model(input_ids=encoder_tokens, attention_mask=mask, decoder_input_ids=input_ids, use_cache=False).logits


class TensorView:
    """A tensor of a file that is a slice of a parameter in memory: the attributes of it that the tests use."""

    def __init__(self, parameter: Any, index: tuple[Any, ...]):
        self.parameter = parameter
        self.index = index
        self.shape = parameter[index].shape

    @property
    def data(self) -> Any:
        return self.parameter.data[self.index]

    @data.setter
    def data(self, values: Any) -> None:
        self.parameter.data[self.index] = values

    @property
    def grad(self) -> Any:
        return self.parameter.grad[self.index]

    @grad.setter
    def grad(self, value: None) -> None:
        self.parameter.grad = value


def split_experts(name: str, fused: Any) -> dict[str, TensorView]:
    """Return one tensor per expert, as in files, for a parameter [E, ...] of all experts (Mixtral in transformers 5)."""
    start, _, end = name.partition(".mlp.experts.")
    parts = {}
    for e in range(fused.shape[0]):
        prefix = f"{start}.block_sparse_moe.experts.{e}.w"
        half = fused.shape[1] // 2
        if end == "down_proj":
            parts[f"{prefix}2.weight"] = TensorView(fused, (e,))
        else:
            parts[f"{prefix}1.weight"] = TensorView(fused, (e, slice(half)))
            parts[f"{prefix}3.weight"] = TensorView(fused, (e, slice(half, None)))
    return parts


def draw(case: Case, weights: Mapping[str, Any], seed: int) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Return random weights far from initial values (biases, norms and logits of order one), tokens and targets."""
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


def make_encoder_inputs(case: Case, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return encoder tokens of another length than `tokens`, and their mask (0: padding); None without an encoder."""
    if case.config.encoder is None:
        return None
    encoder_tokens = np.flip(tokens, (0, 1))[:, : -tokens.shape[1] // 5]
    batch, length = encoder_tokens.shape
    mask = np.arange(length) < length - 3 * np.arange(batch)[:, None]
    return encoder_tokens, mask.astype(np.int32)


def import_arrays(external: Mapping[str, np.ndarray], kind: str, config: ModelConfig) -> dict[str, Arrays]:
    """Return external weights (or gradients) in native form. Every external tensor has to be used."""
    family, used = FAMILIES[kind], set()
    tensors = {name: InMemory(array) for name, array in external.items()}
    native: dict[str, Arrays] = {}
    for name, planned in assemble(config, lambda spec: find_array(tensors, family, config, spec, used), kind).items():
        module, _, leaf = name.removeprefix(PREFIX).rpartition("/")
        native.setdefault(module, {})[leaf] = planned.array.read(full_index(planned.array))
    assert used == set(external)
    return native


def make_model_folder(folder: Path, name: str) -> Arrays:
    """Write the weights of a golden file as a Hugging Face model folder; return the tensors."""
    weights = {key: np.asarray(value) for key, value in read_golden(name)[0].items()}
    folder.mkdir()
    _, table = find_family(CASES[name].config)
    (folder / "config.json").write_text(json.dumps(table))
    save_file(weights, folder / "model.safetensors")
    return weights


def make_random_arrays(config: ModelConfig) -> dict[str, InMemory]:
    """Return native weights of a model with random values."""
    rng = np.random.default_rng(0)
    shapes = {}
    for name, specs in describe_weights(config).items():
        shapes[name] = specs[0].shape if specs[0].layer is None else (len(specs), *specs[0].shape)
    return {name: InMemory(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}
