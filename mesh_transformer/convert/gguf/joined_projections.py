# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""BLOOM, Falcon and MPT in llama.cpp: one tensor has all queries, then all keys, then all values (src/models/*.cpp)."""

from collections.abc import Mapping

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.gguf.metadata import Architecture, Metadata, Table, Tensors, read_rope, write_rope
from mesh_transformer.convert.huggingface.tensor_map import TensorMapping, joined, norms, split_qkv
from mesh_transformer.storage.errors import CheckpointError

SECOND_NORM = "blk.{i}.attn_norm_2"
FALCON_LAYOUT = "jploski"  # the name of the order of rows in the metadata
ALIBI_BIAS = 8.0  # exponent of the slopes, the only value that transformers implements
BLOOM_KEYS = {
    "block_count": "n_layer",
    "context_length": "seq_length",
    "embedding_length": "hidden_size",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
MPT_KEYS = {
    "block_count": "n_layers",
    "context_length": "max_seq_len",
    "embedding_length": "d_model",
    "attention.head_count": "n_heads",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
FALCON_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "ffn_hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}


def _read_bloom(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    metadata.require("feed_forward_length", 4 * table["hidden_size"])
    metadata.require("attention.head_count_kv", table["n_head"])


def _write_bloom(config: Table, values: Table) -> None:
    values["feed_forward_length"] = 4 * config["hidden_size"]
    values["attention.head_count_kv"] = config["n_head"]


def _read_mpt(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    metadata.require("feed_forward_length", 4 * table["d_model"])
    metadata.require("attention.head_count_kv", table["n_heads"])
    if (bias := metadata.get("attention.max_alibi_bias", 0.0)) != ALIBI_BIAS:
        raise CheckpointError(
            f"{metadata.where}: mpt.attention.max_alibi_bias = {bias} is not supported; supported: {ALIBI_BIAS}"
        )
    table["attn_config"] = {"clip_qkv": metadata.get("attention.clamp_kqv") or None}


def _write_mpt(config: Table, values: Table) -> None:
    values["feed_forward_length"] = 4 * config["d_model"]
    values["attention.max_alibi_bias"] = ALIBI_BIAS
    if clip := config["attn_config"]["clip_qkv"]:
        values["attention.clamp_kqv"] = float(clip)


def _read_falcon(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    metadata.require("tensor_data_layout", FALCON_LAYOUT)
    heads = table["num_attention_heads"]
    kv_heads = metadata.get("attention.head_count_kv", heads)
    has_two_norms = f"{SECOND_NORM}.weight".format(i=0) in tensors
    is_grouped = has_two_norms or kv_heads not in (1, heads)
    read_rope(metadata, table, tensors, table["hidden_size"] // heads)
    table |= {
        "num_kv_heads": kv_heads if is_grouped else heads,
        "new_decoder_architecture": is_grouped,
        "multi_query": kv_heads == 1 and not is_grouped,
        "num_ln_in_parallel_attn": (2 if has_two_norms else 1) if is_grouped else None,
    }


def _write_falcon(config: Table, values: Table) -> None:
    write_rope({"rope_theta": 10_000.0} | config, values)  # a model with ALiBi has no rope_theta and is refused later
    values["tensor_data_layout"] = FALCON_LAYOUT
    values["attention.head_count_kv"] = 1 if config["multi_query"] else config["num_kv_heads"]


def _name_falcon_norms(c: ModelConfig) -> Mapping[str, TensorMapping]:
    """Return the mappings of the norms: with two norms, that of the feed-forward layer has the name of the only one."""
    if c.residual == "parallel-two-norms":
        return norms(norm_1=SECOND_NORM, norm_2="blk.{i}.attn_norm")
    return norms(norm_1="blk.{i}.attn_norm")


BLOOM = Architecture(
    ("bloom",),
    BLOOM_KEYS,
    {},
    _read_bloom,
    _write_bloom,
    mappings=norms(norm_embedding="token_embd_norm", norm_2="blk.{i}.ffn_norm"),
)
MPT = Architecture(("mpt",), MPT_KEYS, {}, _read_mpt, _write_mpt)
FALCON = Architecture(
    ("falcon",),
    FALCON_KEYS,
    {"activation": "gelu", "alibi": False, "parallel_attn": True, "bias": False},
    _read_falcon,
    _write_falcon,
    mappings=joined("blk.{i}.attn_qkv", split_qkv),
    variant=_name_falcon_norms,
)
