# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""ALBERT (arXiv 1909.11942): tensor names and config.json. All layers have the same parameters."""

from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface import bert
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.tensor_map import TensorMapping, linear

CLASSES = bert.Classes(
    masked_lm="AlbertForMaskedLM",
    model="AlbertModel",
    classification="AlbertForSequenceClassification",
    pretraining="AlbertForPreTraining",
    masked_lm_tensor="predictions.dense.weight",
    pooler_tensor="albert.pooler.weight",
    sentence_tensor="sop_classifier.classifier.weight",
)
LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"
TENSORS = {
    **bert.embeddings("albert.embeddings"),
    **linear("w_embedding", "albert.encoder.embedding_hidden_mapping_in", "embed", "embedding", "b_embedding"),
    **bert.attention(f"{LAYER}.attention", f"{LAYER}.attention.dense"),
    **bert.norms(norm_1=f"{LAYER}.attention.LayerNorm", norm_2=f"{LAYER}.full_layer_layer_norm"),
    **linear("feed_forward/w_in", f"{LAYER}.ffn", "ff", "embed", "feed_forward/b_in"),
    **linear("feed_forward/w_out", f"{LAYER}.ffn_output", "embed", "ff", "feed_forward/b_out"),
    **bert.masked_lm_head("predictions.dense", "predictions.LayerNorm", "predictions.bias"),
    **bert.pooler("albert.pooler"),
    **bert.classifier("classifier", alias="sop_classifier.classifier"),
}
COPIES = ("predictions.decoder.weight",)  # copy of the embedding matrix
BIAS_COPIES = ("predictions.decoder.bias",)  # copy of the bias of the head


def name_heads(c: ModelConfig) -> dict[str, TensorMapping]:
    """Return the mappings that depend on the class of a model."""
    if c.head == "masked-lm":
        return bert.classifier("sop_classifier.classifier")
    return {} if c.n_labels else bert.without_prefix(TENSORS, "albert.")


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for an AlbertConfig."""
    s.require("num_hidden_groups", 1)
    s.require("inner_group_num", 1)
    model = bert.read_encoder(s) | bert.read_heads(s, CLASSES)
    return model | dict(d_embedding=s["embedding_size"], shared_layers=True)


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of an AlbertConfig."""
    table = bert.write_encoder(c) | bert.write_heads(c, CLASSES)
    return table | dict(embedding_size=c.d_embedding, num_hidden_groups=1, inner_group_num=1)
