# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Table of the supported Hugging Face model families.

An entry of FAMILIES has the family's class in transformers, its tensor names, its functions for config.json and, for some
families, a NumPy reference implementation. A new family can define these in a new module and needs one entry here.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface import (
    albert,
    bert,
    bloom,
    cohere,
    config_map,
    config_map_t5,
    deepseek,
    falcon,
    gemma,
    gemma2,
    gpt_bigcode,
    gpt_oss,
    mpt,
    olmo,
    opt,
    phi3,
    qwen_moe,
    reference,
    roberta,
    smollm3,
    stablelm,
    starcoder2,
    tensor_map,
)
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.reference import ExternalTensors
from mesh_transformer.convert.huggingface.reference_t5 import run_t5
from mesh_transformer.convert.huggingface.tensor_map import TensorMapping
from mesh_transformer.convert.lazy_arrays import LazyArray


class Family(NamedTuple):
    """A family of models in transformers."""

    architecture: str
    mappings: Mapping[str, TensorMapping]  # by native weight
    read_config: Callable[[HFConfig], dict[str, Any]]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    # NumPy implementation: (tensors, config.json, tokens [B, T]) -> logits [B, T, V]; None: compare with transformers only
    reference: Callable[..., np.ndarray] | None
    prefix: str  # prefix of tensor names; files of a model without a head lack it
    buffers: tuple[str, ...] = ()  # suffixes of names of tensors that are not weights
    left_out: tuple[str, ...] = ()  # prefixes of names of tensors that are not part of the text model
    copies: tuple[str, ...] = ()  # other names under which files may store the embedding matrix
    bias_copies: tuple[str, ...] = ()  # other names under which files may store the bias of the head
    heads: tuple[str, ...] = ()  # prefixes of names of tensors of heads, which are left out if the model lacks the head
    # True if files with an untied head must have the copies, because transformers then does not tie the embeddings
    needs_copies: bool = False
    # True if the tensors decide: the head is tied if the files lack its tensor, and untied if that tensor differs from the
    # embedding matrix
    files_tie_head: bool = False
    experts_key: str = "num_local_experts"  # key of config.json with the number of experts
    # Purpose of extra layers that files have after the model's last layer; they are not imported. "": no extra layers
    layers_after_last: str = ""
    variant: Callable[[ModelConfig], Mapping[str, TensorMapping]] | None = None  # mappings that depend on the model

    def mappings_of(self, config: ModelConfig) -> Mapping[str, TensorMapping]:
        """Return the mappings of one model of the family, by native weight."""
        return self.mappings if self.variant is None else {**self.mappings, **self.variant(config)}


T5_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
T5_BUFFERS = (".EncDecAttention.relative_attention_bias.weight",)  # unused tensors in the first files of T5
ENCODER_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # in older files of encoders

# read_config, write_config, reference, prefix and buffers
LLAMA_FIELDS = (config_map.read_llama, config_map.write_llama, reference.run_llama, "model.", (".rotary_emb.inv_freq",))
FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        tensor_map.GPT2,
        config_map.read_gpt2,
        config_map.write_gpt2,
        reference.run_gpt2,
        "transformer.",
        (".attn.bias", ".attn.masked_bias"),
    ),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        tensor_map.GPT_NEO,
        config_map.read_gpt_neo,
        config_map.write_gpt_neo,
        reference.run_gpt_neo,
        "transformer.",
        (".attn.attention.bias", ".attn.attention.masked_bias"),
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        tensor_map.GPT_J,
        config_map.read_gpt_j,
        config_map.write_gpt_j,
        reference.run_gptj,
        "transformer.",
        (".attn.bias", ".attn.masked_bias"),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        tensor_map.GPT_NEOX,
        config_map.read_gpt_neox,
        config_map.write_gpt_neox,
        reference.run_gpt_neox,
        "gpt_neox.",
        (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
    "llama": Family("LlamaForCausalLM", tensor_map.LLAMA, *LLAMA_FIELDS),
    "mistral": Family("MistralForCausalLM", tensor_map.LLAMA, *LLAMA_FIELDS),
    "mixtral": Family(
        "MixtralForCausalLM", tensor_map.MIXTRAL, config_map.read_mixtral, config_map.write_mixtral, *LLAMA_FIELDS[2:]
    ),
    "arcee": Family("ArceeForCausalLM", tensor_map.LLAMA, *LLAMA_FIELDS),  # without a gate in its feed-forward layers
    "qwen2": Family("Qwen2ForCausalLM", tensor_map.LLAMA, *LLAMA_FIELDS),
    "qwen3": Family("Qwen3ForCausalLM", tensor_map.QWEN3, *LLAMA_FIELDS),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        qwen_moe.QWEN2_MOE,
        qwen_moe.read_config,
        qwen_moe.write_qwen2_moe,
        None,
        *LLAMA_FIELDS[3:],
        experts_key="num_experts",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qwen_moe.QWEN3_MOE,
        qwen_moe.read_config,
        qwen_moe.write_qwen3_moe,
        None,
        *LLAMA_FIELDS[3:],
        experts_key="num_experts",
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        deepseek.TENSORS,
        deepseek.read_config,
        deepseek.write_v2,
        None,
        *LLAMA_FIELDS[3:],
        experts_key="n_routed_experts",
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        deepseek.TENSORS,
        deepseek.read_config,
        deepseek.write_v3,
        None,
        *LLAMA_FIELDS[3:],
        experts_key="n_routed_experts",
        layers_after_last="multi-token prediction",
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM", gpt_oss.TENSORS, gpt_oss.read_config, gpt_oss.write_config, None, *LLAMA_FIELDS[3:]
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        gemma2.TENSORS,
        gemma2.read_config,
        gemma2.write_config,
        gemma2.run,
        "model.",
        LLAMA_FIELDS[4],
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM", tensor_map.LLAMA, smollm3.read_config, smollm3.write_config, None, "model."
    ),
    "gemma": Family("GemmaForCausalLM", gemma.GEMMA, gemma.read_gemma, gemma.write_gemma, None, "model."),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", gemma.GEMMA3, gemma.read_gemma3_text, gemma.write_gemma3_text, None, "model."
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        gemma.GEMMA3_TEXT_PART,
        gemma.read_gemma3,
        gemma.write_gemma3,
        None,
        "",
        left_out=gemma.IMAGE_PART,
    ),
    "phi3": Family("Phi3ForCausalLM", phi3.TENSORS, phi3.read_config, phi3.write_config, None, "model."),
    "olmo": Family("OlmoForCausalLM", olmo.OLMO, olmo.read_olmo, olmo.write_olmo, None, "model."),
    "olmo2": Family("Olmo2ForCausalLM", olmo.OLMO2, olmo.read_olmo, olmo.write_olmo2, None, "model."),
    "stablelm": Family(
        "StableLmForCausalLM", stablelm.TENSORS, stablelm.read_config, stablelm.write_config, None, "model."
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM", starcoder2.TENSORS, starcoder2.read_config, starcoder2.write_config, None, "model."
    ),
    "cohere": Family("CohereForCausalLM", cohere.TENSORS, cohere.read_config, cohere.write_config, None, "model."),
    "falcon": Family(
        "FalconForCausalLM",
        falcon.TENSORS,
        falcon.read_config,
        falcon.write_config,
        None,
        "transformer.",
        (".inv_freq",),
        variant=falcon.name_norms,
    ),
    "opt": Family("OPTForCausalLM", opt.TENSORS, opt.read_config, opt.write_config, None, "model."),
    "bloom": Family("BloomForCausalLM", bloom.TENSORS, bloom.read_config, bloom.write_config, None, "transformer."),
    "mpt": Family("MptForCausalLM", mpt.TENSORS, mpt.read_config, mpt.write_config, None, "transformer."),
    "gpt_bigcode": Family(
        "GPTBigCodeForCausalLM",
        gpt_bigcode.TENSORS,
        gpt_bigcode.read_config,
        gpt_bigcode.write_config,
        None,
        "transformer.",
        (".attn.bias", ".attn.masked_bias"),
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        tensor_map.T5,
        config_map_t5.read_t5,
        config_map_t5.write_t5,
        run_t5,
        "",
        T5_BUFFERS,
        copies=T5_COPIES,
        files_tie_head=True,
    ),
    "mt5": Family(
        "MT5ForConditionalGeneration",
        tensor_map.T5,
        config_map_t5.read_t5,
        config_map_t5.write_mt5,
        run_t5,
        "",
        T5_BUFFERS,
        copies=T5_COPIES,
        files_tie_head=True,
    ),
    "umt5": Family(
        "UMT5ForConditionalGeneration",
        tensor_map.UMT5,
        config_map_t5.read_t5,
        config_map_t5.write_t5,
        run_t5,
        "",
        T5_BUFFERS,
        copies=T5_COPIES,
        files_tie_head=True,
    ),
    "bert": Family(
        "BertForMaskedLM",
        bert.TENSORS,
        bert.read_config,
        bert.write_config,
        None,
        "bert.",
        ENCODER_BUFFERS,
        copies=bert.COPIES,
        bias_copies=bert.BIAS_COPIES,
        heads=("cls.", "classifier."),
        variant=bert.name_heads,
    ),
    "roberta": Family(
        "RobertaForMaskedLM",
        roberta.TENSORS,
        roberta.read_config,
        roberta.write_config,
        None,
        "roberta.",
        ENCODER_BUFFERS,
        copies=roberta.COPIES,
        bias_copies=roberta.BIAS_COPIES,
        heads=("lm_head.", "classifier.", "roberta.pooler."),
        variant=roberta.name_heads,
    ),
    "albert": Family(
        "AlbertForMaskedLM",
        albert.TENSORS,
        albert.read_config,
        albert.write_config,
        None,
        "albert.",
        ENCODER_BUFFERS,
        copies=albert.COPIES,
        bias_copies=albert.BIAS_COPIES,
        heads=("predictions.", "sop_classifier.", "classifier."),
        variant=albert.name_heads,
    ),
    "switch_transformers": Family(
        "SwitchTransformersForConditionalGeneration",
        tensor_map.SWITCH,
        config_map_t5.read_switch,
        config_map_t5.write_switch,
        run_t5,
        "",
        T5_BUFFERS,
        copies=T5_COPIES,
        needs_copies=True,
        experts_key="num_experts",
    ),
}
REFERENCE_ROPE_TYPES = ("default", "llama3")
ENCODER_DECODER = ("t5", "mt5", "umt5", "switch_transformers")


def has_reference(config: Mapping[str, Any]) -> bool:
    """Return whether `run_huggingface` supports the model that a config.json describes."""
    family = FAMILIES.get(config["model_type"])
    rope = HFConfig(config, config["model_type"]).merged().get("rope_parameters") or {}
    return (
        family is not None and family.reference is not None and rope.get("rope_type", "default") in REFERENCE_ROPE_TYPES
    )


def run_huggingface(
    tensors: Mapping[str, LazyArray], config: Mapping[str, Any], tokens: np.ndarray, *encoder_inputs: np.ndarray
) -> np.ndarray:
    """Return the float32 logits [B, T, V] of a model folder's tensors and config.json for tokens [B, T].

    `encoder_inputs` of an encoder-decoder model are the encoder's tokens [B, S] and their mask [B, S], 0 for padding.
    Raises CheckpointError if the model type is not supported.
    """
    kind = config["model_type"]
    family = FAMILIES.get(kind)
    if family is None or family.reference is None:
        supported = ", ".join(name for name, other in FAMILIES.items() if other.reference is not None)
        raise CheckpointError(
            f"no reference implementation of model_type {json.dumps(kind)}; supported: {supported}; use transformers"
        )
    merged = HFConfig(config, kind).merged()
    if kind in ENCODER_DECODER:
        return family.reference(tensors, merged, tokens, *encoder_inputs)
    return family.reference(ExternalTensors(tensors, family.prefix), merged, tokens)
