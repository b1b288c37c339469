# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model folder <-> arrays of ours, by the rows of names.py; a tensor at a time, a few rows at a time."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import Settings
from mesh_transformer.convert.huggingface.tensor_files import find_tensors
from mesh_transformer.convert.huggingface.tensor_map import FAMILIES, Entry, Family
from mesh_transformer.convert.import_plan import (
    Foreign,
    Leaf,
    assemble,
    check,
    check_all_used,
    describe_leaves,
    make_model_config,
)
from mesh_transformer.convert.lazy_arrays import Composed, FileArray, Lazy, Row, Stack, View, whole
from mesh_transformer.storage.errors import CheckpointError, StorageError
from mesh_transformer.storage.paths import AnyPath, local_copy

CONFIG = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
CARRIED = (*TOKENIZER_FILES, "generation_config.json", "added_tokens.json", "chat_template.jinja", "tokenizer.model")


def is_huggingface(folder: AnyPath) -> bool:
    """Whether a folder looks like a model of transformers."""
    return (folder / CONFIG).is_file()


def open_huggingface(folder: AnyPath) -> Foreign:
    """What is in a model folder; CheckpointError lists all tensors that are missing, unknown or of another shape."""
    settings, family = read_settings(folder)
    model = family.read_config(settings)
    config = make_model_config(model, folder / CONFIG)
    tensors = find_tensors(folder)
    used: set[str] = set()

    arrays = assemble(config, lambda leaf: find_array(tensors, family, leaf, used), folder)
    notes = []
    if config.tied_embeddings:
        notes += _check_tied(tensors, family, used, folder)
    for copy in family.copies:
        notes += _check_copy(tensors, copy, find_name(tensors, family, family.entries["w_tokens"], None), used, folder)
    check_all_used(set(tensors), used, lambda name: name.endswith(family.buffers or ("\0",)), folder)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    tokenizer = str(local_copy(folder, TOKENIZER_FILES)) if has_tokenizer else None
    return Foreign(model, arrays, 0, tokenizer, tuple(notes))


def read_settings(folder: AnyPath) -> tuple[Settings, Family]:
    """config.json and its family; CheckpointError if it is not there or of no family in names.py."""
    path = folder / CONFIG
    try:
        table = json.loads(path.read_bytes())
        kind = table["model_type"]
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a model's configuration: {type(error).__name__}: {error}") from None
    if kind not in FAMILIES:
        raise CheckpointError(f"{path}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    return Settings(table, path), FAMILIES[kind]


def find_family(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The family that computes the same function, and its config.json; CheckpointError names what none of them has."""
    differences: dict[str, list[str]] = {}
    wanted = config.describe_function()
    for kind, family in FAMILIES.items():
        table = family.write_config(config) | {
            "model_type": kind,
            "architectures": [family.architecture],
            "tie_word_embeddings": config.tied_embeddings,
        }
        try:
            again = make_model_config(family.read_config(Settings(table, kind)), kind).describe_function()
        except CheckpointError:  # what the family would make of these sizes is no model at all
            again = {}
        differences[kind] = [f"{key} = {value!r}" for key, value in wanted.items() if again.get(key) != value]
        if not differences[kind]:
            return kind, table
    nearest = min(differences, key=lambda kind: len(differences[kind]))
    raise CheckpointError(
        f"no Hugging Face family computes this model's function; nearest is {nearest}, which has not: "
        + ", ".join(differences[nearest])
    )


def compose_tensors(config: ModelConfig, arrays: Mapping[str, Lazy], family: Family) -> dict[str, Composed]:
    """Their tensors by name, made of our arrays."""
    pieces: dict[str, list[tuple[Entry, Lazy, Leaf]]] = {}
    for name, leaves in describe_leaves(config).items():
        for place, leaf in enumerate(leaves):
            entry = family.entries[leaf.name]
            array = arrays[name] if leaf.layer is None else Row(arrays[name], place)
            theirs = (entry.gated if config.gated_ffn and entry.gated else entry.theirs).replace("{i}", str(leaf.layer))
            if "{e}" not in theirs:
                pieces.setdefault(theirs, []).append((entry, array, leaf))
                continue
            one = leaf._replace(axes=leaf.axes[1:], shape=leaf.shape[1:])
            for e in range(leaf.shape[0]):
                pieces.setdefault(theirs.replace("{e}", str(e)), []).append((entry, Row(array, e), one))
    tensors: dict[str, Composed] = {}
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece[0].pick)
        pattern = found[0][0].pattern
        tensors[name] = Composed([array for _, array, _ in found], pattern, [leaf.axes for _, _, leaf in found])
    if family.needs_copies and not config.tied_embeddings:
        tensors.update(dict.fromkeys(family.copies, tensors[family.entries["w_tokens"].theirs]))
    return tensors


def find_array(tensors: Mapping[str, Lazy], family: Family, leaf: Leaf, used: set[str]) -> Lazy:
    """An array of ours, made of tensors of theirs, whose names `used` takes up.

    KeyError with a name that is not there; ValueError if a shape, or the number of experts, is another.
    """
    if leaf.name not in family.entries:
        raise KeyError(f"{leaf.name}, which {family.architecture} does not have")
    entry = family.entries[leaf.name]

    def view(leaf: Leaf, expert: int | None = None) -> Lazy:
        name = find_name(tensors, family, entry, leaf.layer, expert)
        used.add(name)
        return View(tensors[name], entry.pattern, leaf.axes, leaf.shape, entry.pick)

    if "{e}" not in entry.theirs:
        return view(leaf)
    start = entry.theirs.replace("{i}", str(leaf.layer)).partition("{e}")[0].removeprefix(family.prefix)
    found = {name.removeprefix(family.prefix) for name in tensors}
    places = {int(name.removeprefix(start).partition(".")[0]) for name in found if name.startswith(start)}
    if places and max(places) + 1 != leaf.shape[0]:
        raise ValueError(
            f"{CONFIG} says {leaf.shape[0]} experts, the files hold {max(places) + 1} in a layer; "
            f"correct {family.experts_key} if the files are right, otherwise fetch those that belong to it"
        )
    one = leaf._replace(axes=leaf.axes[1:], shape=leaf.shape[1:])
    return Stack([view(one, e) for e in range(leaf.shape[0])])


def find_name(
    tensors: Mapping[str, Any], family: Family, entry: Entry, layer: int | None, expert: int | None = None
) -> str:
    """What an array is called in these files; KeyError with its usual name if it is not there."""
    known = (entry.theirs, *entry.aliases, *filter(None, [entry.gated]))
    names = [name.replace("{i}", str(layer)).replace("{e}", str(expert)) for name in known]
    for full in names:
        for candidate in (full, full.removeprefix(family.prefix)):
            if candidate in tensors:
                return candidate
    raise KeyError(names[0])


def _check_tied(tensors: Mapping[str, FileArray], family: Family, used: set[str], folder: AnyPath) -> list[str]:
    """A tied model's file may hold its head as well; it must then be the embedding itself."""
    try:
        head = find_name(tensors, family, family.entries["w_head"], None)
    except KeyError:
        return []
    table = find_name(tensors, family, family.entries["w_tokens"], None)
    reason = f"though {CONFIG} says tie_word_embeddings; set it to false"
    return _check_copy(tensors, head, table, used, folder, reason)


def _check_copy(
    tensors: Mapping[str, FileArray],
    copy: str,
    table: str,
    used: set[str],
    folder: AnyPath,
    reason: str = "where one table serves for both",
) -> list[str]:
    """What is stored a second time must be the same."""
    if copy not in tensors:
        return []
    same = tensors[copy].shape == tensors[table].shape
    for first in range(0, tensors[copy].shape[0] if same else 0, 4096):
        index = (slice(first, min(first + 4096, tensors[copy].shape[0])), whole(tensors[copy])[1])
        same = same and np.array_equal(tensors[copy].read(index), tensors[table].read(index))
    check([] if same else [f"{copy} differs from {table}, {reason}"], folder)
    used.add(copy)
    return [f"{copy} is {table}: stored once"]
