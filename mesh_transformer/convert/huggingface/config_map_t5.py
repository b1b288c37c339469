# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Translate config.json of T5, mT5, umT5 and SwitchTransformers to the native [model] section and back (see config_map.py)."""

import json
from typing import Any

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig
from mesh_transformer.config.presets import T5
from mesh_transformer.convert.huggingface.config_map import ACTIVATIONS, HF_ACTIVATIONS, HFConfig

DEFAULT_SEQ_LEN = 512  # of the encoder in training; config.json may omit it, and no weight depends on it


def _read(s: HFConfig, *, tied: bool, scaled: bool) -> dict[str, Any]:
    layers = s["num_layers"]
    return T5 | dict(
        n_layers=s.get("num_decoder_layers", default=layers), n_encoder_layers=layers, d_model=s["d_model"],
        n_heads=s["num_heads"], d_head=s["d_kv"], d_ff=s["d_ff"], n_vocab=s["vocab_size"],
        seq_len=s.get("n_positions", default=DEFAULT_SEQ_LEN), norm_eps=s["layer_norm_epsilon"],
        t5_buckets=s["relative_attention_num_buckets"], t5_max_distance=s["relative_attention_max_distance"],
        tied_embeddings=tied, logit_scale="rsqrt_d_model" if scaled else "none",
    )  # fmt: skip


def _write(c: ModelConfig) -> dict[str, Any]:
    return dict(
        num_layers=c.n_encoder_layers, num_decoder_layers=c.n_layers, d_model=c.d_model, num_heads=c.n_heads,
        d_kv=c.head_dim, d_ff=c.ff_dim, vocab_size=c.n_vocab, n_positions=c.seq_len, layer_norm_epsilon=c.norm_eps,
        relative_attention_num_buckets=c.t5_buckets, relative_attention_max_distance=c.t5_max_distance,
        is_encoder_decoder=True, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip


def read_t5(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a T5Config, an MT5Config or a UMT5Config. Their "gated-gelu" is the tanh approximation.

    In transformers 5 the embedding matrix is the head if the files lack the tensor of the head, regardless of
    tie_word_embeddings (`Family.files_tie_head`). The logits of T5 and umT5 are scaled according to
    scale_decoder_outputs; if this key is absent, they are scaled unless tie_word_embeddings is false.
    """
    projection = s["feed_forward_proj"]
    kind, _, name = projection.rpartition("-")
    if kind not in ("", "gated"):
        raise CheckpointError(
            f"{s.where}: feed_forward_proj = {json.dumps(projection)} is not supported; supported: NAME or gated-NAME "
            "with the name of an activation"
        )
    # transformers computes both keys from feed_forward_proj if a file lacks them; files of transformers 5 have them.
    stored_act = s.find("dense_act_fn")
    stored_gate = s.find("is_gated_act")
    act = stored_act or ("gelu_new" if projection == "gated-gelu" else name)
    if act not in ACTIVATIONS:
        raise CheckpointError(
            f"{s.where}: the activation {json.dumps(act)} of dense_act_fn or feed_forward_proj is not supported; supported: "
            + ", ".join(map(json.dumps, ACTIVATIONS))
        )
    gated = kind == "gated" if stored_gate is None else stored_gate
    tied = s.find("tie_word_embeddings") is not False
    scaled = False if s.kind == "mt5" else s.find("scale_decoder_outputs")
    scaled = tied if scaled is None else scaled
    model = _read(s, tied=tied, scaled=scaled) | dict(activation=ACTIVATIONS[act], gated_ffn=gated)
    return model | dict(t5_shared_bias=s.kind != "umt5")


def write_t5(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a T5Config or a UMT5Config."""
    activation = HF_ACTIVATIONS[c.activation]
    if c.gated_ffn:
        activation = "gated-" + {"gelu_new": "gelu", "gelu": "unknown"}.get(activation, activation)
    return _write(c) | dict(feed_forward_proj=activation, scale_decoder_outputs=c.logit_scale == "rsqrt_d_model")


def write_mt5(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of an MT5Config, whose logits are not scaled."""
    return {key: value for key, value in write_t5(c).items() if key != "scale_decoder_outputs"}


def read_switch(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a SwitchTransformersConfig.

    The output of the experts for a dropped token is zero, as in transformers 5.
    """
    s.require("router_bias", False)
    s.require("router_ignore_padding_tokens", False)
    s.require("router_dtype", "float32")
    s.require("is_gated_act", False)
    model = _read(s, tied=s["tie_word_embeddings"], scaled=s["tie_word_embeddings"])
    steps = [_read_step(s, "encoder", model["n_encoder_layers"]), _read_step(s, "decoder", model["n_layers"])]
    if steps[0] != steps[1] or not 1 <= steps[0] <= 2:
        raise CheckpointError(
            f"{s.where}: every N-th layer has experts, with N = {steps[0]} in the encoder and N = {steps[1]} in the decoder "
            "(0: no layer has experts); supported: N = 1 or 2, the same in both. N follows from num_layers, "
            "num_decoder_layers, num_sparse_encoder_layers, num_sparse_decoder_layers, encoder_sparse_step, decoder_sparse_step"
        )
    experts = dict(
        n_experts=s["num_experts"],
        layer_interval=steps[0],
        eval_capacity=s["expert_capacity"],
        aux_loss_weight=float(s["router_aux_loss_coef"]),
        router_z_loss=float(s["router_z_loss_coef"]),
        router_jitter=float(s["router_jitter_noise"]),
    )
    return model | dict(activation=s.translate(ACTIVATIONS, "dense_act_fn"), experts=experts)


def _read_step(s: HFConfig, stack: str, layers: int) -> int:
    """Return N if every N-th layer has experts; 0 if none has them."""
    sparse = s[f"num_sparse_{stack}_layers"]
    step = layers // sparse if sparse > 0 else 0
    return s.get(f"{stack}_sparse_step", default=step)  # transformers stores the computed step in config.json


def write_switch(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a SwitchTransformersConfig."""
    e = c.experts
    if e is None:
        return _write(c)
    sparse = {"encoder": (c.n_encoder_layers or 0) // e.layer_interval, "decoder": c.n_layers // e.layer_interval}
    return _write(c) | dict(
        num_sparse_encoder_layers=sparse["encoder"], num_sparse_decoder_layers=sparse["decoder"], num_experts=e.n_experts,
        expert_capacity=e.eval_capacity, router_aux_loss_coef=e.aux_loss_weight, router_z_loss_coef=e.router_z_loss,
        router_jitter_noise=e.router_jitter, router_bias=False, router_dtype="float32", router_ignore_padding_tokens=False,
        dense_act_fn=HF_ACTIVATIONS[c.activation],
    )  # fmt: skip
