# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""RoBERTa (arXiv 1907.11692): tensor names and config.json.

The position embeddings have pad_token_id + 1 rows before the row of the first position; the last of them is for padding
tokens. All rows are imported and exported. The first layer of the classification head is imported as the pooler of BERT.
"""

import json
from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface import bert
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.tensor_map import TensorMapping
from mesh_transformer.storage.errors import CheckpointError

CLASSES = bert.Classes(
    masked_lm="RobertaForMaskedLM",
    model="RobertaModel",
    classification="RobertaForSequenceClassification",
    pretraining=None,
    masked_lm_tensor="lm_head.dense.weight",
    pooler_tensor="roberta.pooler.dense.weight",
    sentence_tensor="",
)
TENSORS = {
    **bert.encoder_tensors("roberta."),
    **bert.masked_lm_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    **bert.pooler("roberta.pooler.dense"),
    **bert.classifier("classifier.out_proj"),
}
COPIES = ("lm_head.decoder.weight",)  # copy of the embedding matrix
BIAS_COPIES = ("lm_head.decoder.bias",)  # copy of the bias of the head


def name_heads(c: ModelConfig) -> dict[str, TensorMapping]:
    """Return the mappings that depend on the class of a model."""
    if c.n_labels is not None:
        return bert.pooler("classifier.dense")
    return bert.without_prefix(TENSORS, "roberta.") if c.head == "none" else {}


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a RobertaConfig."""
    padding = s["pad_token_id"]
    model = bert.read_encoder(s) | bert.read_heads(s, CLASSES)
    if padding is None:
        raise CheckpointError(
            f"{s.where}: pad_token_id is null, but the first position is in row pad_token_id + 1; set pad_token_id"
        )
    if model["head"] == "masked-lm" and model["activation"] != "gelu-erf":  # RobertaLMHead always uses the exact GELU
        raise CheckpointError(
            f'{s.where}: hidden_act = {json.dumps(s["hidden_act"])} is not supported; supported: "gelu"'
        )
    rows = model["seq_len"]
    return model | dict(seq_len=rows - padding - 1, position_offset=padding + 1, position_padding_token=padding)


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a RobertaConfig."""
    return (
        bert.write_encoder(c)
        | bert.write_heads(c, CLASSES)
        | dict(pad_token_id=c.position_padding_token, max_position_embeddings=c.seq_len + c.position_offset)
    )
