# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Initial state of a run: resumed from its checkpoint, or new with the weights of another checkpoint (`run.init_from`).

The `Resume` markers of the schema (config/schema.py) are the rules for fields that change when a run is resumed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.config import (
    Config,
    ConfigError,
    ModelConfig,
    config_to_dict,
    format_value,
    parse_model,
    parse_stored,
)
from mesh_transformer.config.field_types import Resume
from mesh_transformer.config.resume_rules import resume_rule
from mesh_transformer.convert.huggingface.text_files import MODEL_CARD
from mesh_transformer.data.dataset import Data
from mesh_transformer.train.compile import abstract_state
from mesh_transformer.train.state import TrainState, flatten_state, unflatten_state


def restore_state(
    config: Config, data: Data, store: Store, step: int, shapes: TrainState, shardings: TrainState
) -> tuple[TrainState, list[str]]:
    """Return the state of a checkpoint, and notes on changed fields. Raises ConfigError, CheckpointError."""
    where = str(store.folder(step))
    meta = store.read_meta(step)
    saved = parse_stored(meta["config"], where=where)  # fields added after the checkpoint get their defaults
    notes = check_resume(config_to_dict(saved), config, where)
    if meta["data_fingerprint"] != data.train.fingerprint:
        raise ConfigError(
            f"data.train has the fingerprint {data.train.fingerprint}, but {where} was trained on data with the "
            f"fingerprint {meta['data_fingerprint']}; restore the data, use another run.dir, or start over with --restart"
        )
    arrays = store.restore(step, flatten_state(abstract_state(shapes, shardings)))
    return unflatten_state(arrays, shapes), [*notes, f"resumed from {where}"]


def check_resume(saved: Mapping[str, Any], config: Config, where: str) -> list[str]:
    """Return notes on fields that differ from the saved configuration. Raises ConfigError for a FIXED field."""
    before = flatten_table(saved)
    now = flatten_table(config_to_dict(config))
    notes = []
    for path in sorted(before.keys() | now.keys()):
        old, new = before.get(path), now.get(path)
        if old == new:
            continue
        match resume_rule(path):
            case Resume.FREE:
                pass
            case Resume.LOGGED:
                notes.append(f"{path} = {format_value(new)} (was {format_value(old)})")
            case Resume.FIXED:
                raise ConfigError(
                    f"the configuration has {_format_field(now, path)}, but {where} was trained with "
                    f"{_format_field(before, path)}; restore that value, use another run.dir, or start over with "
                    "--restart"
                )
    return notes


def _format_field(flat: Mapping[str, Any], path: str) -> str:
    section = path.rpartition(".")[0]
    has_section = any(key.startswith(f"{section}.") for key in flat)
    return f"{path} = {format_value(flat.get(path))}" if has_section else f"no {section}"


def init_from(
    config: Config, state: TrainState, shardings: TrainState, store: Store, step: int
) -> tuple[TrainState, list[str]]:
    """Return a new state with the weights of another checkpoint, and a note with its path.

    With `run.load_optimizer_state`, the optimizer's moments are loaded as well. The step, the schedule and the skip guard
    start from zero, and arrays are cast to the types of `state`. Raises ConfigError if the models differ, and
    CheckpointError for a damaged checkpoint or moments of another optimizer.
    """
    where = str(store.folder(step))
    _check_same_model(config, parse_model(store.read_meta(step)["config"]["model"], where=where), where)
    arrays = flatten_state(state)
    flat_shardings = flatten_state(shardings)
    records = store.read_manifest(step).arrays
    prefixes = ("params/", "opt_state/") if config.run.load_optimizer_state else ("params/",)
    for prefix in prefixes:
        like = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, records[name].dtype if name in records else leaf.dtype, sharding=flat_shardings[name]
            )
            for name, leaf in arrays.items()
            if name.startswith(prefix)
        }
        restored = store.restore(step, like, only=prefix)
        arrays |= {name: array.astype(arrays[name].dtype) for name, array in restored.items()}
    loaded = unflatten_state(arrays, state)
    opt_state = jax.tree.map(
        lambda new, old: new if _is_schedule(new) else old, state.opt_state, loaded.opt_state, is_leaf=_is_schedule
    )
    note = f"started from the {' and '.join(prefix.strip('/') for prefix in prefixes)} of {where}"
    return loaded.replace(opt_state=opt_state), [note]


def read_carried_meta(store: Store, step: int) -> dict[str, Any]:
    """Return a converted model's metadata about special tokens and chat template; empty for other models.

    The checkpoints of a run that starts from a converted model keep this metadata and the license, for sampling and export.
    The model card is not kept, because it does not describe the new weights.
    """
    meta = store.read_meta(step)
    kept = {name: meta[name] for name in ("carried", "carried_files", "special_ids", "model_type") if name in meta}
    if "carried_files" in kept:
        kept["carried_files"] = {name: data for name, data in kept["carried_files"].items() if name != MODEL_CARD}
    return kept


def _is_schedule(leaf: Any) -> bool:
    return isinstance(leaf, optax.ScaleByScheduleState)


def _check_same_model(config: Config, saved: ModelConfig, where: str) -> None:
    old = saved.effective_fields()
    new = config.model.effective_fields()
    if config.model.positions != "learned":  # no weight depends on the length
        old["seq_len"] = new["seq_len"]
    before, now = flatten_table({"model": old}), flatten_table({"model": new})
    if changed := [key for key in sorted(before.keys() | now.keys()) if now.get(key) != before.get(key)]:
        differences = ", ".join(
            f"{key} = {format_value(now.get(key))} (checkpoint: {format_value(before.get(key))})" for key in changed
        )
        raise ConfigError(
            f"run.init_from: {where} was trained with a different [model] section: {differences}; set these fields "
            "to the checkpoint's values"
        )


def flatten_table(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        path = f"{prefix}{key}"
        flat |= flatten_table(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return flat
