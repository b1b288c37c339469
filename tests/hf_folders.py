# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Small random models as Hugging Face folders, written by `transformers`, with any tokenizer and settings."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import llama_table, special

BOS, EOS = 1, 2  # in llama_table
SIZES = dict(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=24, num_key_value_heads=1)


def with_template(table: dict[str, Any], before: list[str], after: list[str]) -> dict[str, Any]:
    """Return a tokenizer.json whose post-processor adds special tokens before and after a text."""
    ids = {token["content"]: token["id"] for token in table["added_tokens"]}

    def piece(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    single = [*map(piece, before), {"Sequence": {"id": "A", "type_id": 0}}, *map(piece, after)]
    named = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (*before, *after)}
    processor = {"type": "TemplateProcessing", "single": single, "pair": single + single, "special_tokens": named}
    return {"pre_tokenizer": None, "normalizer": None, **table, "post_processor": processor}


def two_ends_table() -> dict[str, Any]:
    """Return llama_table with <|endoftext|>, which is not its end, and ChatML's tokens."""
    table = llama_table()
    n = len(table["model"]["vocab"])
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    table["added_tokens"] += [special(n + i, name) for i, name in enumerate(names)]
    return {"pre_tokenizer": None, **table}


def save_folder(
    folder: Path,
    model: Any,
    table: dict[str, Any],
    tokenizer_config: dict[str, Any],
    generation: dict[str, Any] | None = None,
) -> Path:
    """Write a model of transformers, its tokenizer and generation_config.json, or none of the latter."""
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(table))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    file = folder / "generation_config.json"
    if generation is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(json.dumps(generation))
    return folder


def make_llama(**changes: Any) -> Any:
    """Return a Llama of transformers with large random weights, so that the greedy tokens depend on all of the context."""
    transformers = pytest.importorskip("transformers", reason="the comparison needs pip install transformers torch")
    torch = pytest.importorskip("torch", reason="the comparison needs pip install transformers torch")
    torch.manual_seed(0)
    sizes = dict(vocab_size=272, max_position_embeddings=64, bos_token_id=BOS, eos_token_id=EOS)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **sizes, **changes})).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.5 if parameter.dim() > 1 else 0.2) + (parameter.dim() == 1)
    return model


def only_ascii(model: Any) -> Any:
    """Return the Llama with weights that make bytes above 127 and added tokens improbable: their logits are 0.

    Libraries differ in how they decode invalid UTF-8 and ids without a token.
    """
    model.lm_head.weight.data[[*range(3 + 128, 3 + 256), *range(264, 272)]] = 0.0  # some other logit is positive
    return model


def always(model: Any, token: int) -> Any:
    """Return the Llama with weights that make `token` the most probable one everywhere."""
    head = model.lm_head.weight.data
    embedding = model.model.embed_tokens.weight.data
    embedding[:, 0] = 50.0  # so that the first feature is positive in every hidden state
    head[:, 0] = 0.0
    head[token, 0] = 100.0
    return model
