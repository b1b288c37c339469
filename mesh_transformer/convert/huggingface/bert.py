# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""BERT (arXiv 1810.04805): tensor names and config.json, with functions that RoBERTa and ALBERT use too.

One native model covers these classes of transformers, which differ in their heads:

    class                         head        pooler  n_labels
    BertForMaskedLM               masked-lm   false   none
    BertModel                     none        true    none
    BertForSequenceClassification none        true    set
    BertForPreTraining            masked-lm   true    2

Files often have tensors of heads that the class in config.json lacks, for example of a pooler in addition to a masked
language-model head. These heads are imported as well, unless the class has a classifier: then they are left out with a note.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import ACTIVATIONS, HF_ACTIVATIONS, read_sizes
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.tensor_map import TensorMapping, linear
from mesh_transformer.storage.errors import CheckpointError


class Classes(NamedTuple):
    """Classes of transformers for one family, and names of tensors that show which heads the files have."""

    masked_lm: str
    model: str
    classification: str
    pretraining: str | None  # None: the family has no such class (RoBERTa)
    masked_lm_tensor: str
    pooler_tensor: str  # in files without a classifier
    sentence_tensor: str  # of the classifier of sentence pairs in the pretraining class; "" without that class


CLASSES = Classes(
    masked_lm="BertForMaskedLM",
    model="BertModel",
    classification="BertForSequenceClassification",
    pretraining="BertForPreTraining",
    masked_lm_tensor="cls.predictions.transform.dense.weight",
    pooler_tensor="bert.pooler.dense.weight",
    sentence_tensor="cls.seq_relationship.weight",
)


def norms(**modules: str) -> dict[str, TensorMapping]:
    """Return the mappings of scale and bias of layer norms; files made with TensorFlow call them gamma and beta."""
    mappings: dict[str, TensorMapping] = {}
    for norm, module in modules.items():
        mappings[f"{norm}/scale"] = TensorMapping(f"{module}.weight", "embed", aliases=(f"{module}.gamma",))
        mappings[f"{norm}/bias"] = TensorMapping(f"{module}.bias", "embed", aliases=(f"{module}.beta",))
    return mappings


def embeddings(module: str) -> dict[str, TensorMapping]:
    """Return the mappings of the embeddings."""
    return {
        "w_tokens": TensorMapping(f"{module}.word_embeddings.weight", "vocab embed"),
        "w_positions": TensorMapping(f"{module}.position_embeddings.weight", "position embed"),
        "w_token_types": TensorMapping(f"{module}.token_type_embeddings.weight", "token_type embed"),
        **norms(norm_embedding=f"{module}.LayerNorm"),
    }


def attention(module: str, output: str) -> dict[str, TensorMapping]:
    """Return the mappings of self-attention; `output` is the name of the output projection's module."""
    mappings: dict[str, TensorMapping] = {}
    for name, heads in (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads")):
        x = name[0]
        mappings |= linear(f"attention/w_{x}", f"{module}.{name}", f"{heads} head_dim", "embed", f"attention/b_{x}")
    return mappings | linear("attention/w_o", output, "embed", "heads head_dim", "attention/b_o")


def masked_lm_head(dense: str, norm: str, bias: str) -> dict[str, TensorMapping]:
    """Return the mappings of a masked language-model head, whose output matrix is the embedding matrix."""
    return {
        **linear("masked_lm_head/w", dense, "embedding", "embed", "masked_lm_head/b"),
        **norms(**{"masked_lm_head/norm": norm}),
        "b_head": TensorMapping(bias, "vocab", aliases=(bias.replace(".bias", ".decoder.bias"),)),
    }


def pooler(module: str) -> dict[str, TensorMapping]:
    """Return the mappings of the pooler."""
    return linear("pooler/w", module, "pooled", "embed", "pooler/b")


def classifier(module: str, alias: str = "") -> dict[str, TensorMapping]:
    """Return the mappings of the classifier; `alias` is another name of its module."""
    mappings = linear("classifier/w", module, "labels", "pooled", "classifier/b")
    if not alias:
        return mappings
    return {key: mapping._replace(aliases=(mapping.name.replace(module, alias),)) for key, mapping in mappings.items()}


def encoder_tensors(prefix: str) -> dict[str, TensorMapping]:
    """Return the mappings of embeddings and layers, which BERT and RoBERTa share."""
    layer = f"{prefix}encoder.layer.{{i}}"
    return {
        **embeddings(f"{prefix}embeddings"),
        **attention(f"{layer}.attention.self", f"{layer}.attention.output.dense"),
        **norms(norm_1=f"{layer}.attention.output.LayerNorm", norm_2=f"{layer}.output.LayerNorm"),
        **linear("feed_forward/w_in", f"{layer}.intermediate.dense", "ff", "embed", "feed_forward/b_in"),
        **linear("feed_forward/w_out", f"{layer}.output.dense", "embed", "ff", "feed_forward/b_out"),
    }


TENSORS = {
    **encoder_tensors("bert."),
    **masked_lm_head("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    **pooler("bert.pooler.dense"),
    **classifier("classifier", alias="cls.seq_relationship"),
}
COPIES = ("cls.predictions.decoder.weight",)  # copy of the embedding matrix
BIAS_COPIES = ("cls.predictions.decoder.bias",)  # copy of the bias of the head


def name_heads(c: ModelConfig) -> dict[str, TensorMapping]:
    """Return the mappings that depend on the class of a model."""
    if c.head == "masked-lm":
        return classifier("cls.seq_relationship")
    return {} if c.n_labels else without_prefix(TENSORS, "bert.")


def without_prefix(tensors: Mapping[str, TensorMapping], prefix: str) -> dict[str, TensorMapping]:
    """Return mappings for files of a model without heads, whose tensor names may lack the prefix."""
    return {
        key: mapping._replace(name=mapping.name.removeprefix(prefix), aliases=(mapping.name, *mapping.aliases))
        for key, mapping in tensors.items()
    }


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a BertConfig."""
    return read_encoder(s) | read_heads(s, CLASSES)


def read_encoder(s: HFConfig) -> dict[str, Any]:
    """Return the fields that BERT, RoBERTa and ALBERT share, except for the fields of the heads."""
    s.require("is_decoder", False)
    s.require("add_cross_attention", False)
    s.require("position_embedding_type", "absolute")
    return read_sizes(s) | dict(
        n_token_types=s["type_vocab_size"],
        norm_eps=s["layer_norm_eps"],
        activation=s.translate(ACTIVATIONS, "hidden_act"),
        residual="post-norm",
        causal=False,
        embedding_norm=True,
        init="bert",
    )


def read_heads(s: HFConfig, classes: Classes) -> dict[str, Any]:
    """Return the fields of the heads, by the class that config.json names and by the tensors in the files."""
    known = [name for name in classes[:4] if name]
    architecture = (s.table.get("architectures") or [None])[0]
    if architecture not in (*known, None):
        raise CheckpointError(
            f"{s.where}: architectures = [{json.dumps(architecture)}] is not supported; supported: {', '.join(known)}"
        )
    s.require("tie_word_embeddings", True)
    has_classifier = architecture == classes.classification or (
        architecture is None and any(name.startswith("classifier.") for name in s.tensors)
    )
    if has_classifier:
        return dict(head="none", head_bias=False, pooler=True, n_labels=read_n_labels(s))

    def has(tensor: str) -> bool:
        return not s.tensors.isdisjoint({tensor, tensor.partition(".")[2]})

    is_pretraining = architecture == classes.pretraining and architecture is not None
    masked_lm = is_pretraining or architecture == classes.masked_lm or has(classes.masked_lm_tensor)
    has_pooler = is_pretraining or has(classes.pooler_tensor)
    has_pair_classifier = is_pretraining or (has_pooler and classes.sentence_tensor in s.tensors)
    return dict(
        head="masked-lm" if masked_lm else "none",
        head_bias=masked_lm,
        pooler=has_pooler,
        n_labels=(2 if s.kind == "bert" else read_n_labels(s)) if has_pair_classifier else None,
    )


def read_n_labels(s: HFConfig) -> int:
    """Return the number of labels in id2label of config.json, or else num_labels, by default 2 as in transformers."""
    labels = s.table.get("id2label")
    return len(labels) if labels is not None else s.table.get("num_labels", 2)


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a BertConfig."""
    return write_encoder(c) | write_heads(c, CLASSES)


def write_encoder(c: ModelConfig) -> dict[str, Any]:
    """Return the keys that BERT, RoBERTa and ALBERT share."""
    return dict(
        num_hidden_layers=c.n_layers,
        hidden_size=c.d_model,
        num_attention_heads=c.n_heads,
        intermediate_size=c.ff_dim,
        vocab_size=c.n_vocab,
        max_position_embeddings=c.seq_len,
        type_vocab_size=c.n_token_types,
        layer_norm_eps=c.norm_eps,
        hidden_act=HF_ACTIVATIONS.get(c.activation),
        tie_word_embeddings=True,
    )


def write_heads(c: ModelConfig, classes: Classes) -> dict[str, Any]:
    """Return the keys for the heads of a model: the class that has these heads, and the names of the labels."""
    if c.head == "masked-lm":
        is_pretraining = c.n_labels is not None and classes.pretraining is not None
        architecture = classes.pretraining if is_pretraining else classes.masked_lm
    else:
        architecture = classes.model if c.n_labels is None else classes.classification
    if c.n_labels is None:
        return {"architectures": [architecture]}
    names = {i: f"LABEL_{i}" for i in range(c.n_labels)}
    return {
        "architectures": [architecture],
        "id2label": {str(i): name for i, name in names.items()},
        "label2id": {name: i for i, name in names.items()},
    }
