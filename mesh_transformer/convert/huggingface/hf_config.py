# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Read a config.json with the defaults, aliases and types of its configuration class in transformers.

config_defaults.jsonc records the classes (scripts/record_config_defaults.py). `HFConfig` records every key that a family's
reader reads; a key of the class that was not read, has an effect and differs from its default is rejected.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.storage.errors import CheckpointError

# Not .json, which the readers of training data take for JSON Lines: some examples train on this package.
DEFAULTS = Path(__file__).with_name("config_defaults.jsonc")
JSON_TYPES = {int: "int", float: "float", bool: "bool", str: "str", list: "list", dict: "dict", type(None): "null"}
NO_EFFECT = {
    # reason: keys
    "initial values of weights": "initializer_range initializer_factor init_std init_device",
    "dropout, which is off outside of training": (
        "resid_pdrop embd_pdrop attn_pdrop emb_pdrop attention_dropout hidden_dropout classifier_dropout resid_dropout "
        "embed_dropout dropout_rate dropout layerdrop hidden_dropout_prob attention_probs_dropout_prob "
        "classifier_dropout_prob residual_dropout embedding_dropout summary_first_dropout"
    ),
    "losses and noise of training": (
        "output_router_logits add_router_probs router_aux_loss_coef router_z_loss_coef router_jitter_noise"
    ),
    "cache of a call": "use_cache",
    "special token IDs, stored in the metadata (SPECIAL_IDS in text_files.py)": (
        "bos_token_id eos_token_id pad_token_id decoder_start_token_id sep_token_id cls_token_id"
    ),
    "heads for classification": (
        "summary_type summary_use_proj summary_activation summary_proj_to_labels type_of_head classifier_pooling"
    ),
    "order of float operations, not the function": (
        "pretraining_tp reorder_and_upcast_attn attention_softmax_in_fp32 scale_attention_softmax_in_fp32 slow_but_exact"
    ),
}
KEYS_WITHOUT_EFFECT = {key for keys in NO_EFFECT.values() for key in keys.split()}
# Further keys without effect, by model type: transformers sets them in its copies of the configuration for encoder and
# decoder, or does not read them.
NO_EFFECT_OF = {
    "gpt_neox": {"is_decoder"},
    "t5": {"is_decoder"},
    "mt5": {"is_decoder"},
    "umt5": {"is_decoder"},
    "switch_transformers": {"is_decoder", "add_cross_attention"},
}
ROPE_WITH_TRAINED_LENGTH = ("llama3", "yarn", "longrope")


@functools.cache
def recorded_classes() -> dict[str, dict[str, Any]]:
    """Return the recorded configuration classes by model type."""
    return json.loads(DEFAULTS.read_bytes())["model_types"]


def recorded_version() -> str:
    """Return the version of transformers whose classes are recorded."""
    return json.loads(DEFAULTS.read_bytes())["transformers"]


class HFConfig:
    """A config.json, with the defaults of its class and a record of the keys that were read.

    `table` is the file with aliases replaced by the names of the fields that they set. A key that the file lacks has the
    default of the configuration class. Every method that returns a value adds its key to `was_read`.
    """

    def __init__(self, table: Mapping[str, Any], where: object):
        self.where = where
        self.kind = str(table.get("model_type"))
        recorded = recorded_classes().get(self.kind, {})
        self.aliases: dict[str, str] = recorded.get("aliases", {})
        fields: dict[str, tuple[Any, str]] = recorded.get("fields", {})
        self.fields = {self.aliases.get(name, name): (default, types) for name, (default, types) in fields.items()}
        self.computed: list[str] = recorded.get("computed", [])
        self.rope_defaults: dict[str, Any] | None = recorded.get("rope")
        # transformers sets fields first and every other key after them, so that an alias overrides its field
        in_order = sorted(table.items(), key=lambda item: item[0] not in fields)
        self.table = {self.aliases.get(key, key): value for key, value in in_order}
        self.was_read: set[str] = set()
        self.was_restricted: set[str] = set()  # keys of which only some values are supported
        # Names of the tensors in the model's files; some families' readers determine the heads of the model from them
        self.tensors: frozenset[str] = frozenset()

    def __contains__(self, key: str) -> bool:
        """Return whether the file has the key, even if its value is null."""
        return self.aliases.get(key, key) in self.table

    def __getitem__(self, key: str) -> Any:
        """Return the value in the file, or the default of the class. Raise CheckpointError if there is neither."""
        key = self.aliases.get(key, key)
        self.was_read.add(key)
        default, types = self.fields.get(key, (None, "any"))
        if key in self.table:
            self._check_type(key, types)
            return self.table[key]
        if key not in self.fields:
            raise CheckpointError(f"{self.where}: the key {key} is missing; add it")
        return default

    def _check_type(self, key: str, types: str) -> None:
        value = self.table[key]
        allowed = types.split("|")
        found = JSON_TYPES[type(value)]
        if "any" in allowed or found in allowed or (found == "int" and "float" in allowed):
            return
        raise CheckpointError(
            f"{self.where}: {key} = {json.dumps(value)} has the type {found}, but must have the type {' or '.join(allowed)}"
        )

    def find(self, key: str) -> Any:
        """Return the value in the file, or None if the file lacks the key, even if the class has a default for it."""
        if key not in self:
            return None
        return self[key]

    def get(self, *keys: str, default: Any = None) -> Any:
        """Return the value of the first of `keys` in the file that is not null.

        If all of them are null, returns `default`; if the file has none of them, the default of the class, or else
        `default`. Raises CheckpointError if there is no value.
        """
        values = [self[key] for key in keys if key in self]
        if not values:
            values = [self[key] for key in keys if self.aliases.get(key, key) in self.fields]
        value = next((value for value in values if value is not None), default)
        self.was_read.update(self.aliases.get(key, key) for key in keys)
        if value is None:
            raise CheckpointError(f"{self.where}: the key {' or '.join(keys)} is missing or null; set it")
        return value

    def require(self, key: str, *allowed: Any) -> None:
        """Raise CheckpointError unless the key has one of the `allowed` values, the only ones that are supported.

        A null is allowed if the class has no default for the key, or if its default is null.
        """
        key = self.aliases.get(key, key)
        self.was_read.add(key)
        self.was_restricted.add(key)
        value = self[key] if key in self or key in self.fields else None
        if value is None and self.fields.get(key, (None,))[0] is None:
            return
        if value not in allowed:
            supported = ", ".join(map(json.dumps, allowed or (None,)))
            raise CheckpointError(f"{self.where}: {key} = {json.dumps(value)} is not supported; supported: {supported}")

    def translate(self, names: Mapping[Any, str], *keys: str, default: Any = None) -> str:
        """Return the native name of an external value. Raise CheckpointError if it is not in `names`."""
        value = self.get(*keys, default=default)
        if value not in names:
            supported = ", ".join(map(json.dumps, names))
            raise CheckpointError(
                f"{self.where}: {keys[0]} = {json.dumps(value)} is not supported; supported: {supported}"
            )
        return names[value]

    def rope_parameters(self) -> dict[str, Any]:
        """Return the parameters of rotary embeddings as transformers completes them, with rope_type and rope_theta.

        Source: RotaryEmbeddingConfigMixin.convert_rope_params_to_dict and standardize_rope_params of transformers 5, where
        the old key rope_scaling has precedence. Parameters by layer type (nested tables) are not handled here.
        """
        defaults = self.rope_defaults or {"rope_type": "default", "rope_theta": 10_000.0}
        stored = self.find("rope_parameters")
        if stored is None:
            stored = {key: value for key, value in defaults.items() if key not in TOP_LEVEL}
        rope = dict(self.find("rope_scaling") or stored)
        rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        rope.pop("type", None)
        for name, top_level in (NEOX_TOP_LEVEL if self.kind == "gpt_neox" else TOP_LEVEL).items():
            value = self[top_level] if top_level in self else defaults.get(name)
            if value is not None:
                rope.setdefault(name, value)
        if rope["rope_type"] in ROPE_WITH_TRAINED_LENGTH:
            key = "original_max_position_embeddings"
            if key in self.fields:
                rope[key] = self[key]
            else:
                rope.setdefault(key, self["max_position_embeddings"])
        self.was_read |= {"rope_parameters", "rope_scaling"}
        for name in ("rope_theta", "partial_rotary_factor", "factor"):
            value = rope.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise CheckpointError(
                    f"{self.where}: {name} = {json.dumps(value)} of the rotary embeddings is not a number; set it to a number"
                )
        return rope

    def merged(self) -> dict[str, Any]:
        """Return the file completed with the defaults of the class and with `rope_parameters`."""
        fields = {key: default for key, (default, _) in self.fields.items()} | self.table
        if self.rope_defaults and "rope_type" in self.rope_defaults:
            fields["rope_parameters"] = self.rope_parameters()
        fields.pop("rope_scaling", None)
        return fields

    def keys_by_treatment(self) -> tuple[list[str], list[str]]:
        """Return the class's fields of which all values are supported, and the fields of which some values are rejected.

        Must be called after a reader has read the configuration.
        """
        effective = [key for key in self.fields if key not in KEYS_WITHOUT_EFFECT | NO_EFFECT_OF.get(self.kind, set())]
        honored = [key for key in effective if key in self.was_read - self.was_restricted]
        return honored, [key for key in effective if key not in honored]

    def check_all_read(self) -> None:
        """Raise CheckpointError with every key that was not read, has an effect and differs from the default."""
        ignored = KEYS_WITHOUT_EFFECT | NO_EFFECT_OF.get(self.kind, set()) | self.was_read
        keys = [
            key
            for key in (*self.fields, *self.computed, "per_layer_config")
            if key in self.table and key not in ignored
        ]
        unread = []
        for key in keys:
            default = self.fields.get(key, (None,))[0]
            if self.table[key] != default:
                unread.append(
                    f"{key} = {json.dumps(self.table[key])} is not supported; supported: {json.dumps(default)}"
                )
        if unread:
            raise CheckpointError(f"{self.where}: {'; '.join(unread)}")


# Rope parameters, each with the top-level key of config.json that transformers reads if rope_parameters lacks it.
TOP_LEVEL = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
NEOX_TOP_LEVEL = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
