# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Plan the import of Hugging Face model folders, and pack native arrays into tensors for an export.

Names and layouts of tensors are in tensor_map.py, names of configuration keys in config_map.py.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mesh_transformer.config import ModelConfig, format_value
from mesh_transformer.convert.huggingface.families import FAMILIES, Family
from mesh_transformer.convert.huggingface.hf_config import HFConfig, recorded_classes
from mesh_transformer.convert.huggingface.quantized.formats import open_tensors
from mesh_transformer.convert.huggingface.tensor_map import TensorMapping
from mesh_transformer.convert.import_plan import (
    ImportPlan,
    WeightSpec,
    assemble,
    check_all_used,
    describe_weights,
    list_weights,
    make_model_config,
)
from mesh_transformer.convert.layout_views import Joined, LayoutView, Packed, Part
from mesh_transformer.convert.lazy_arrays import Index, LazyArray, Stack, full_index
from mesh_transformer.data.tokenizer_files import holds_vocabulary, is_tokenizer_file
from mesh_transformer.storage.errors import CheckpointError, StorageError
from mesh_transformer.storage.paths import AnyPath, local_copy

CONFIG = "config.json"
# Keys that some classes of similar families have and others lack.
OPTIONAL_KEYS = (
    "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip
COMPARED_ROWS = 4096  # rows of two copies of a matrix that are compared at once

# native field -> keys of config.json that determine it, where errors about the field do not quote their values
KEYS_OF_FIELDS = {
    "rope_scaling": ("rope_parameters", "rope_scaling"),
    "router_jitter": ("router_jitter_noise",),
    "n_groups_per_token": ("n_group", "topk_group"),
}


def is_huggingface(folder: AnyPath) -> bool:
    """Return whether a folder looks like a model folder of transformers."""
    return (folder / CONFIG).is_file()


def open_huggingface(folder: AnyPath) -> ImportPlan:
    """Plan the import of a model folder.

    Raises CheckpointError with all tensors that are missing, unexpected or have a wrong shape.
    """
    external_config, family = read_config(folder)
    tensors, is_quantized, quantized_notes = open_tensors(folder, external_config.table)
    external_config.tensors = frozenset(tensors)
    model = read_model(external_config, family)
    if family.files_tie_head:
        model["tied_embeddings"] = _is_head_tied(tensors, family, model["tied_embeddings"])
    try:
        config = make_model_config(model, folder / CONFIG)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_list_keys(external_config, str(error))}") from None
    used: set[str] = set()
    arrays = assemble(config, lambda spec: find_array(tensors, family, config, spec, used), folder)
    copies = {
        name: "but the model has one array for both; use files of one model"
        for name in (*family.copies, *family.bias_copies)
        if name in tensors
    }
    if config.tied_embeddings and (head := _find_optional(tensors, family, "w_head")):
        copies[head] = f"but {CONFIG} has tie_word_embeddings = true; set it to false"
    notes = list(quantized_notes)
    embedding = find_name(tensors, family, family.mappings["w_tokens"], None)
    for copy, reason in copies.items():
        original = _find_optional(tensors, family, "b_head") if copy in family.bias_copies else embedding
        if original is None or original == copy:
            continue
        if not _are_equal(tensors[copy], tensors[original]):
            raise CheckpointError(f"{folder}: {copy} differs from {original}, {reason}")
        used.add(copy)
        notes.append(f"{copy} equals {original} and is stored once")
    if other_heads := sorted(name for name in tensors if name not in used and name.startswith(family.heads)):
        used.update(other_heads)
        architecture = ", ".join(external_config.table.get("architectures") or ("the model",))
        notes.append(f"tensors of heads that {architecture} does not have are left out: {', '.join(other_heads)}")
    if family.layers_after_last and (extra := _find_later_layers(tensors, family, config.n_layers)):
        used |= extra
        tensor = "1 tensor" if len(extra) == 1 else f"{len(extra)} tensors"
        layers = f"{family.prefix}layers.{config.n_layers} and later layers, for {family.layers_after_last},"
        notes.append(f"{tensor} of {layers} {'is' if len(extra) == 1 else 'are'} not imported")
    if left_out := {name for name in tensors if name.startswith(family.left_out or ("\0",))}:
        notes.append(
            f"{len(left_out)} tensors of the vision tower and its projector are left out: only text is supported"
        )
    if is_quantized and (zero := [name for name in set(tensors) - used - left_out if _is_zero_bias(name, tensors)]):
        used.update(zero)
        notes.append(f"biases that the model does not have, zero and left out: {len(zero)}, such as {min(zero)}")
    unused = set(tensors) - left_out
    check_all_used(unused, used, lambda name: name.endswith(family.buffers or ("\0",)), folder)
    names = [path.name for path in folder.iterdir()]
    files = tuple(filter(is_tokenizer_file, names))
    tokenizer = str(local_copy(folder, files)) if holds_vocabulary(names) else None
    return ImportPlan(config, model, arrays, 0, tokenizer, tuple(notes), is_quantized)


def read_config(folder: AnyPath) -> tuple[HFConfig, Family]:
    """Return config.json and its family. Raise CheckpointError if it is missing, invalid or of an unsupported family."""
    path = folder / CONFIG
    try:
        table = json.loads(path.read_bytes())
        kind = table["model_type"]
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a model configuration, which is a JSON object with model_type: {type(error).__name__}: {error}"
        ) from None
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type {json.dumps(kind)} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return HFConfig(table, path), FAMILIES[kind]


def read_model(s: HFConfig, family: Family) -> dict[str, Any]:
    """Return the [model] section for a config.json. Raise CheckpointError if it is invalid or has unsupported keys."""
    try:
        model = family.read_config(s)
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{s.where}: not a valid configuration of {s.kind}: {type(error).__name__}: {error}; correct the values"
        ) from None
    s.check_all_read()
    return model


def _list_keys(s: HFConfig, message: str) -> str:
    """Return a phrase with the keys of config.json that determine the native fields, or have the values, in an error."""
    values = set(re.findall(r"=([\w.]+)", message))
    named = {key for field, own in KEYS_OF_FIELDS.items() if field in message for key in own}
    keys = [
        f"{key} = {json.dumps(s[key])}"
        for key in sorted(s.was_read)
        if key in s and (key in named or {str(s[key]), json.dumps(s[key])} & values)
    ]
    return f" ({CONFIG} has {', '.join(keys)})" if keys else ""


def find_family(config: ModelConfig, preferred: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the model type of a family that computes the same function as a native model, and its config.json.

    Of several such families, `preferred` is returned, or else the first. Raises CheckpointError with the fields that the
    nearest family cannot represent.
    """
    differences: dict[str, list[str]] = {}
    wanted = config.effective_fields()
    for kind, family in sorted(FAMILIES.items(), key=lambda item: item[0] != preferred):
        table: dict[str, Any] = {}
        try:
            table = _write_table(kind, family, config)
            external = HFConfig(table, kind)
            external.tensors = exported_names(config, family)
            found = make_model_config(read_model(external, family), kind).effective_fields()
        except (CheckpointError, KeyError):  # the family has no model of these sizes, or not this activation
            found = {}
        differences[kind] = [
            f"{key} = {format_value(value)}" for key, value in wanted.items() if found.get(key) != value
        ]
        if not differences[kind]:
            return kind, table
    nearest = min(differences, key=lambda kind: len(differences[kind]))
    raise CheckpointError(
        f"no Hugging Face family computes the function of this model; the nearest, {nearest}, does not support: "
        + ", ".join(differences[nearest])
        + "; use --format native"
    )


def exported_names(config: ModelConfig, family: Family) -> frozenset[str]:
    """Return the names that the weights of a model have in files of a family; `{i}` stands for the layer."""
    mappings = family.mappings_of(config)
    specs = (spec for specs in describe_weights(config).values() for spec in specs)
    return frozenset(mappings[spec.name].name for spec in specs if spec.name in mappings)


def _write_table(kind: str, family: Family, config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a native model in one family, without optional keys that the family's class lacks."""
    table = family.write_config(config)
    if kind in recorded_classes():
        lacks = [key for key in OPTIONAL_KEYS if key not in recorded_classes()[kind]["fields"]]
        table = {key: value for key, value in table.items() if key not in lacks}
    table = {"architectures": [family.architecture]} | table
    return table | {"model_type": kind, "tie_word_embeddings": config.tied_embeddings}


def pack_tensors(config: ModelConfig, arrays: Mapping[str, LazyArray], family: Family) -> dict[str, Packed | Joined]:
    """Return the external tensors by name, packed from native arrays."""
    components: dict[str, list[tuple[TensorMapping, LazyArray, WeightSpec]]] = {}
    for spec, array in list_weights(config, arrays):
        mapping = family.mappings_of(config)[spec.name]
        name = mapping.gated_name if config.gated_ffn and mapping.gated_name else mapping.name
        if mapping.shared_name and spec.layer is not None and config.layer_kinds[spec.layer].has_experts:
            name = mapping.shared_name
        name = name.replace("{i}", str(spec.layer))
        if "{e}" not in name:
            components.setdefault(name, []).append((mapping, array, spec))
            continue
        for e in range(spec.shape[0]):
            components.setdefault(name.replace("{e}", str(e)), []).append((mapping, Index(array, e), spec.expert()))
    tensors: dict[str, Packed | Joined] = {}
    for name, group in components.items():
        group.sort(key=lambda component: component[0].component)
        pattern, split = group[0][0].pattern, group[0][0].split
        if split is None:
            tensors[name] = Packed([array for _, array, _ in group], pattern, [spec.axes for _, _, spec in group])
        else:
            parts = [Packed([array], mapping.pattern, [spec.axes]) for mapping, array, spec in group]
            tensors[name] = Joined(parts, split(config))
    if family.needs_copies and not config.tied_embeddings:
        tensors.update(dict.fromkeys(family.copies, tensors[family.mappings["w_tokens"].name]))
    return tensors


def find_array(
    tensors: Mapping[str, LazyArray], family: Family, config: ModelConfig, spec: WeightSpec, used: set[str]
) -> LazyArray:
    """Return a native weight as a view of external tensors, whose names are added to `used`.

    Raises KeyError with the name of a missing tensor, and ValueError for a wrong shape or number of experts.
    """
    mappings = family.mappings_of(config)
    if spec.name not in mappings:
        raise KeyError(f"{spec}; {family.architecture} has no tensor for it")
    mapping = mappings[spec.name]

    def view(spec: WeightSpec, expert: int | None = None) -> LazyArray:
        name = find_name(tensors, family, mapping, spec.layer, expert)
        used.add(name)
        if mapping.split is not None:
            part = Part(tensors[name], mapping.split(config), mapping.component, name=name)
            return LayoutView(part, mapping.pattern, spec.axes, spec.shape, name=name)
        return LayoutView(tensors[name], mapping.pattern, spec.axes, spec.shape, component=mapping.component, name=name)

    if "{e}" not in mapping.name:
        return view(spec)
    if mapping.stacked is not None:
        name, pattern, component = mapping.stacked
        stacked = TensorMapping(name, pattern, component)
        with contextlib.suppress(KeyError):
            name = find_name(tensors, family, stacked, spec.layer)
            used.add(name)
            return LayoutView(tensors[name], pattern, spec.axes, spec.shape, component=component, name=name)
    start = mapping.name.replace("{i}", str(spec.layer)).partition("{e}")[0].removeprefix(family.prefix)
    names = {name.removeprefix(family.prefix) for name in tensors}
    experts = {int(name.removeprefix(start).partition(".")[0]) for name in names if name.startswith(start)}
    if experts and max(experts) + 1 != spec.shape[0]:
        raise ValueError(
            f"{CONFIG} has {spec.shape[0]} experts, the files have {max(experts) + 1} per layer; "
            f"correct {family.experts_key} if the files are right, otherwise download the files that belong to {CONFIG}"
        )
    return Stack([view(spec.expert(), e) for e in range(spec.shape[0])])


def find_name(
    tensors: Mapping[str, Any], family: Family, mapping: TensorMapping, layer: int | None, expert: int | None = None
) -> str:
    """Return the name of a tensor in these files. Raise KeyError with its usual name if it is missing."""
    known = (mapping.name, *mapping.aliases, *filter(None, [mapping.gated_name, mapping.shared_name]))
    names = [name.replace("{i}", str(layer)).replace("{e}", str(expert)) for name in known]
    for full in names:
        for candidate in (full, full.removeprefix(family.prefix)):
            if candidate in tensors:
                return candidate
    raise KeyError(names[0])


def _is_head_tied(tensors: Mapping[str, LazyArray], family: Family, expected: bool) -> bool:
    """Return whether the embedding matrix is also the head; `expected` is the value in config.json."""
    head = _find_optional(tensors, family, "w_head")
    embedding = _find_optional(tensors, family, "w_tokens")
    if head is None or embedding is None:
        return True
    return expected and _are_equal(tensors[head], tensors[embedding])


def _find_later_layers(tensors: Mapping[str, Any], family: Family, n_layers: int) -> set[str]:
    """Return the names of the tensors of layers after the model's last layer."""
    pattern = re.compile(rf"({re.escape(family.prefix)})?layers\.(\d+)\.")
    matches = ((name, pattern.match(name)) for name in tensors)
    return {name for name, match in matches if match and int(match[2]) >= n_layers}


def _is_zero_bias(name: str, tensors: Mapping[str, LazyArray]) -> bool:
    """Return whether a tensor is a bias of zeros, such as older versions of AutoGPTQ wrote for every quantized module."""
    return name.endswith(".bias") and not tensors[name].read(full_index(tensors[name])).any()


def _find_optional(tensors: Mapping[str, Any], family: Family, weight: str) -> str | None:
    try:
        return find_name(tensors, family, family.mappings[weight], None)
    except KeyError:
        return None


def _are_equal(a: LazyArray, b: LazyArray) -> bool:
    """Return whether two arrays are equal, reading some rows at a time."""
    if a.shape != b.shape:
        return False
    for first in range(0, a.shape[0], COMPARED_ROWS):
        index = (slice(first, min(first + COMPARED_ROWS, a.shape[0])), *full_index(a)[1:])
        if not np.array_equal(a.read(index), b.read(index)):
            return False
    return True
