# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Renamed configuration keys and values: errors in configuration files, translated in stored configurations.

A table maps the dotted path of an old key to its new name (the last part of the path). `*` matches one key or list index.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Renames(NamedTuple):
    """Renamed keys, renamed values, and conversions of values whose form changed."""

    keys: Mapping[str, str]  # path of the old key -> its new name
    values: Mapping[str, Mapping[str, str]]  # path of the new key -> old value -> new value
    conversions: Mapping[str, Callable[[Any], Any]] = {}  # path of the new key -> function of the stored value


def _convert_rope_scaling(value: Any) -> Any:
    """Return the table for a list (factor, low_freq_factor, high_freq_factor, original_seq_len) of version 1.0."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return value
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_seq_len")
    return dict(zip(names, (*value[:3], int(value[3])), strict=True))


LOGICAL_AXES = {
    "stream": "activation_seq",
    "residual": "activation_embed",
    "pieces": "microbatch",
    "routes": "router",
    "window": "replicated",
    "stages": "stage",
}

RUN = Renames(
    keys={
        "run.start_from": "init_from",
        "run.keep_optimizer": "load_optimizer_state",
        "model.encoder_layers": "n_encoder_layers",
        "model.rotary_dims": "rope_dims",
        "model.rotary_base": "rope_theta",
        "model.rotary_scaling": "rope_scaling",
        "model.gated": "gated_ffn",
        "model.head_scale": "logit_scale",
        "model.unroll": "scan_unroll",
        "model.experts.per_token": "n_experts_per_token",
        "model.experts.choice": "routing",
        "model.experts.noncausal": "allow_noncausal",
        "model.experts.every": "layer_interval",
        "model.experts.shared": "shared_expert",
        "model.experts.evaluation_capacity_factor": "eval_capacity_factor",
        "model.experts.evaluation_capacity": "eval_capacity",
        "model.experts.group": "group_size",
        "model.experts.overflow": "dropped_tokens",
        "model.experts.balance_loss": "aux_loss_weight",
        "model.experts.balance_over": "aux_loss_scope",
        "model.experts.jitter": "router_jitter",
        **{f"mesh.rules.{old}": new for old, new in LOGICAL_AXES.items()},
        "data.holdout": "holdout_one_in",
        "data.noise_share": "noise_density",
        "data.mean_span": "mean_noise_span_length",
        "train.accumulation": "grad_accum_steps",
        "train.ramp_from": "batch_ramp_from",
        "train.ramp_steps": "batch_ramp_steps",
        "train.loss_pieces": "loss_chunks",
        "train.noise_scale": "log_grad_noise_scale",
        "train.layer_norms": "log_layer_grad_norms",
        "train.spike_factor": "loss_spike_factor",
        "train.max_skipped": "max_consecutive_skips",
        "checkpoint.asynchronous": "async_save",
        "serve.weights": "weight_dtype",
        "serve.cache": "kv_cache_dtype",
        "serve.queue": "max_queue",
        "serve.max_body": "max_body_bytes",
        "serve.body_seconds": "body_timeout_seconds",
        "serve.timeout_seconds": "request_timeout_seconds",
        "serve.warm_up": "warmup_tokens",
        "evaluate.shots": "num_fewshot",
        "evaluate.shots_of": "num_fewshot_by_task",
        "evaluate.examples": "fewshot_data",
        "evaluate.share": "sample_fraction",
    },
    values={
        "model.positions": {"rotary-pairs": "rope-interleaved", "rotary-halves": "rope-half"},
        "model.attention_scale": {"sqrt": "rsqrt_d_head"},
        "model.logit_scale": {"sqrt": "rsqrt_d_model"},
        "model.attention_kernel": {"plain": "dense", "blocked": "blockwise"},
        "model.experts.routing": {"token": "token-choice", "expert": "expert-choice"},
        "model.experts.dropped_tokens": {"pass": "zero", "scale": "gated-input"},
        "checkpoint.resume": {"newest": "latest", "newest-intact": "latest-valid"},
        "optimizer.no_decay_axes.*": LOGICAL_AXES,
    },
    conversions={"model.rope_scaling": _convert_rope_scaling},
)


def find_renamed(table: Any, renames: Renames) -> list[str]:
    """Return one message per renamed key or value in nested dictionaries: "old was renamed: use new"."""
    messages: list[str] = []

    def visit(value: Any, path: tuple[str, ...]) -> None:
        for key, inner in _items(value):
            inner_path = (*path, key)
            new = _lookup(renames.keys, inner_path)
            if new is not None:
                messages.append(f"{'.'.join(inner_path)} was renamed: use {'.'.join((*path, new))}")
                inner_path = (*path, new)
            values = _lookup(renames.values, inner_path)
            if values and isinstance(inner, str) and inner in values:
                messages.append(f'{".".join(inner_path)} = "{inner}" was renamed: use "{values[inner]}"')
            visit(inner, inner_path)

    visit(table, ())
    return messages


def translate_stored(table: Any, renames: Renames = RUN, prefix: tuple[str, ...] = ()) -> Any:
    """Return a copy of the nested values that an older version stored, with the current keys and values.

    `prefix` is the path of `table` in the full configuration, for example ("model",) for a stored [model] section.
    """
    if isinstance(table, Mapping):
        copy = {}
        for key, inner in table.items():
            new = _lookup(renames.keys, (*prefix, key)) or key
            copy[new] = _translate_value(inner, renames, (*prefix, new))
        return copy
    if isinstance(table, list | tuple):
        return [_translate_value(inner, renames, (*prefix, str(i))) for i, inner in enumerate(table)]
    return table


def _translate_value(value: Any, renames: Renames, path: tuple[str, ...]) -> Any:
    convert = _lookup(renames.conversions, path)
    value = value if convert is None else convert(value)
    values = _lookup(renames.values, path)
    if values and isinstance(value, str):
        return values.get(value, value)
    return translate_stored(value, renames, path)


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return [(str(i), inner) for i, inner in enumerate(value)]
    return []


def _lookup(table: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Return the entry for `path`, or None; `*` in the dotted path of an entry matches one part."""
    exact = table.get(".".join(path))
    if exact is not None:
        return exact
    for pattern, entry in table.items():
        parts = pattern.split(".")
        if "*" in parts and len(parts) == len(path) and all(p in ("*", q) for p, q in zip(parts, path, strict=True)):
            return entry
    return None
