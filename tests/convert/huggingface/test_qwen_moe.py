# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts families compute what transformers computes, in both directions: logits, text, gradients, files."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mesh_transformer.config import SampleConfig
from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.huggingface.reader import (
    find_family,
    open_huggingface,
    pack_tensors,
    read_config,
    read_model,
)
from mesh_transformer.convert.import_plan import PREFIX
from mesh_transformer.convert.lazy_arrays import full_index
from mesh_transformer.convert.logit_check import run_native
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.storage.errors import CheckpointError

pytestmark = pytest.mark.slow
SIZES = dict(
    num_hidden_layers=4, hidden_size=24, num_attention_heads=4, vocab_size=53, max_position_embeddings=64,
    intermediate_size=28, rms_norm_eps=1e-6, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1e4, beta_fast=4, beta_slow=1)
QWEN = SIZES | dict(num_key_value_heads=2, moe_intermediate_size=12, num_experts=6, num_experts_per_tok=2)
DEEPSEEK = SIZES | dict(
    num_key_value_heads=4, kv_lora_rank=10, q_lora_rank=None, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=12, n_shared_experts=2, first_k_dense_replace=1,
)  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-top-1": ("mixtral", SIZES | dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1)),
    "qwen2-moe": (
        "qwen2_moe",
        QWEN | dict(shared_expert_intermediate_size=20, mlp_only_layers=[2], use_sliding_window=True, sliding_window=7),
    ),
    "qwen2-moe-every-second": ("qwen2_moe", QWEN | dict(norm_topk_prob=True, decoder_sparse_step=2)),
    "qwen3-moe": ("qwen3_moe", QWEN | dict(head_dim=8, norm_topk_prob=True, attention_bias=True)),
    "deepseek-v2-lite": ("deepseek_v2", DEEPSEEK | dict(routed_scaling_factor=1.5)),
    "deepseek-v2": (
        "deepseek_v2",
        DEEPSEEK
        | dict(q_lora_rank=9, topk_method="group_limited_greedy", n_group=4, topk_group=2, attention_bias=True)
        | dict(rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.9)),
    ),
    "deepseek-v3": (
        "deepseek_v3",
        DEEPSEEK | dict(q_lora_rank=9, n_group=4, topk_group=2, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0)),
    ),
    "gpt-oss": (
        "gpt_oss",
        SIZES | dict(num_key_value_heads=2, head_dim=8, sliding_window=7, num_local_experts=4, num_experts_per_tok=2)
        | dict(rope_parameters=YARN | dict(truncate=False)),
    ),
}  # fmt: skip


def make_torch_model(kind: str, table: dict[str, Any]) -> Any:
    """Return a model of transformers with random weights far from initial values."""
    torch = pytest.importorskip("torch", reason="the comparison needs pip install transformers torch")
    transformers = pytest.importorskip("transformers", reason="the comparison needs pip install transformers torch")
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**table, pad_token_id=None)
    model = getattr(transformers, FAMILIES[kind].architecture)._from_config(config, attn_implementation="eager").eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("inv_freq"):
            continue
        is_vector = tensor.ndim == 1 or name.endswith("_bias")
        tensor.data = torch.randn(tensor.shape) * (0.3 if is_vector else 1.0 / tensor.shape[-1] ** 0.5)
        if name.endswith("norm.weight"):
            tensor.data += 1.0
    return model


def read_params(folder: Any) -> tuple[Any, dict[str, dict[str, jax.Array]]]:
    plan = open_huggingface(folder)
    params: dict[str, dict[str, jax.Array]] = {}
    for name, planned in plan.arrays.items():
        module, _, leaf = name.removeprefix(PREFIX).rpartition("/")
        params.setdefault(module, {})[leaf] = jnp.asarray(planned.array.read(full_index(planned.array)))
    return plan, params


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    kind, table = CASES[name]
    model = make_torch_model(kind, table)
    import torch

    model.save_pretrained(tmp_path / "files")
    plan, params = read_params(tmp_path / "files")
    config, native = plan.config, make_model(plan.config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 53, (2, 40), dtype=np.int32)
    targets = rng.integers(0, 53, (2, 40), dtype=np.int32)

    # logits and gradients
    def loss(params):
        logits, _ = native.apply(params, jnp.asarray(tokens))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[..., None], axis=-1)
        return -jnp.mean(chosen), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    wanted = model(torch.tensor(tokens, dtype=torch.long)).logits
    torch.nn.functional.cross_entropy(
        wanted.flatten(0, 1), torch.tensor(targets, dtype=torch.long).flatten()
    ).backward()
    assert np.std(wanted.detach().numpy()) > 0.3, "the weights are too small: the logits are nearly constant"
    np.testing.assert_allclose(logits, wanted.detach().numpy(), atol=2e-5, rtol=0)
    np.testing.assert_allclose(run_native(config, plan.values, tokens, max_memory=1), logits, atol=5e-5, rtol=0)

    # text: prefill and decoding with a cache
    sequence = tokens[:1, :20].tolist()[0]
    [[done]] = DecoderOnlyEngine(config, params).generate([sequence], SampleConfig(temperature=0.0), max_tokens=16)
    for _ in range(16):
        with torch.no_grad():
            sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
    assert done.tokens == sequence[20:]
    assert len(set(done.tokens)) > 2

    # back to files
    found_kind, written = find_family(config)
    assert found_kind == kind
    files = load_file(tmp_path / "files/model.safetensors")
    packed = pack_tensors(config, plan.values, FAMILIES[kind])
    assert packed.keys() == files.keys()
    for key, tensor in packed.items():
        values = tensor.read_slice(tensor.chunking.dim, 0, tensor.shape[tensor.chunking.dim])
        np.testing.assert_array_equal(values, files[key], err_msg=key)
    (tmp_path / "back").mkdir()
    (tmp_path / "back/config.json").write_text(json.dumps(written))
    save_file(files, tmp_path / "back/model.safetensors", metadata={"format": "pt"})
    again = type(model).from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    with torch.no_grad():
        back = again(torch.tensor(tokens, dtype=torch.long)).logits
    np.testing.assert_allclose(back, wanted.detach(), atol=1e-6, rtol=0)

    # gradients have the layouts of weights, so that the importer reads them as such
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(tmp_path / "gradients")
    _, wanted_gradients = read_params(tmp_path / "gradients")
    largest = max(np.abs(g).max() for g in flatten_names(wanted_gradients).values())
    for key, gradient in flatten_names(wanted_gradients).items():
        own = np.asarray(flatten_names(gradients)[key])
        if key.endswith("selection_bias"):
            assert not own.any()
            continue
        # zero up to rounding: a key's bias shifts all scores of a query equally, and the gate of a single expert is 1
        is_zero = key.endswith("attention/b_k") or (key.endswith("w_router") and table.get("num_experts_per_tok") == 1)
        scale = largest if is_zero else np.abs(gradient).max()
        assert scale > 0, f"{key} has no gradient: the case does not test it"
        np.testing.assert_allclose(own, gradient, atol=1e-4 * scale, rtol=0, err_msg=key)


@pytest.mark.parametrize("name", ["mixtral-top-1", "qwen3-moe"])
def test_experts_stacked_in_files_are_read(name, tmp_path):
    """transformers 5 has one tensor for all experts of a layer in memory, and writes it if asked to."""
    kind, table = CASES[name]
    model = make_torch_model(kind, table)
    model.save_pretrained(tmp_path / "separate")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any(key.endswith("gate_up_proj") for key in load_file(tmp_path / "stacked/model.safetensors"))
    _, separate = read_params(tmp_path / "separate")
    _, stacked = read_params(tmp_path / "stacked")
    for key, values in flatten_names(separate).items():
        np.testing.assert_array_equal(flatten_names(stacked)[key], values, err_msg=key)


def test_layers_for_multi_token_prediction_are_left_out(tmp_path):
    kind, table = CASES["deepseek-v3"]
    make_torch_model(kind, table).save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    extra = {"model.layers.4.eh_proj.weight": np.zeros((24, 48), np.float32)}
    save_file(files | extra, tmp_path / "model.safetensors")
    assert open_huggingface(tmp_path).notes == (
        "1 tensor of model.layers.4 and later layers, for multi-token prediction, is not imported",
    )
    save_file(files | {"model.layers.3.eh_proj.weight": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.3\.eh_proj\.weight"):
        open_huggingface(tmp_path)


@pytest.mark.parametrize("name", ["qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3"])
def test_a_model_without_experts_may_have_their_keys(name, tmp_path):
    kind, table = CASES[name]
    dense = {"first_k_dense_replace": 9} if kind.startswith("deepseek") else {"decoder_sparse_step": 9}
    table = {"model_type": kind, **table, "moe_intermediate_size": 20, **dense}
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert "experts" not in read_model(*read_config(tmp_path))
