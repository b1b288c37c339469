# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Recipe keys and values that were renamed since version 1.0, and their translation in both directions.

Recipe files with an old name are refused with the new one. Tables stored with a corpus (manifest.json, datasheet.json)
are translated. The digests that identify the parts of a build are computed over the old names, so that parts made by
version 1.0 are reused.
"""

from collections.abc import Mapping
from typing import Any

from mesh_transformer.config import ConfigError

# Path of the key ("*": any name or number; the tables above it by their new names) -> new name of its last component.
RENAMED_KEYS = {
    "steps": "filters",
    "components.*.licence": "license",
    "components.*.pieces_kb": "chunk_kb",
    "filters.*.without": "exclude_components",
    "filters.*.min_piece": "min_fragment",
    "filters.*.common": "max_ngram_documents",
    "duplicates.across": "across_components",
}
# Path of a field by its new name -> old value -> new value.
RENAMED_VALUES = {"components.*.kind": {"source": "code"}, "duplicates.near": {"own": "custom"}}

_NEW_NAMES = {tuple(path.split(".")): name for path, name in RENAMED_KEYS.items()}
_OLD_NAMES = {(*path[:-1], name): path[-1] for path, name in _NEW_NAMES.items()}
_NEW_VALUES = {tuple(path.split(".")): values for path, values in RENAMED_VALUES.items()}
_OLD_VALUES = {path: {new: old for old, new in values.items()} for path, values in _NEW_VALUES.items()}

Path = tuple[str, ...]


def refuse_renamed(table: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError with a line for every old key or value of a recipe table."""
    changes: list[str] = []
    _to_new_names(table, (), changes)
    if changes:
        raise ConfigError("\n".join(f"{where}: {change}" for change in changes))


def translate_stored(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe table of any version with the current names."""
    return _to_new_names(table, (), [])


def to_stored_names(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe table with the names of version 1.0, in the same order."""
    return _to_old_names(table, ())


def stored_field(section: str, name: str) -> str:
    """Return the name that version 1.0 used for a field of the section, for example `filters.*`."""
    return _OLD_NAMES.get((*section.split("."), name), name)


def _to_new_names(value: Any, path: Path, changes: list[str]) -> Any:
    """Translate `value`, which is at `path` by the new names; append a sentence to `changes` for every change."""
    if isinstance(value, Mapping):
        table = {}
        for key, inner in value.items():
            new = _find(_NEW_NAMES, (*path, key)) or key
            if new != key:
                changes.append(f"{'.'.join((*path, key))} was renamed: write {'.'.join((*path, new))}")
            table[new] = _to_new_names(inner, (*path, new), changes)
        return table
    if isinstance(value, list | tuple):
        return [_to_new_names(inner, (*path, str(i)), changes) for i, inner in enumerate(value)]
    values = _find(_NEW_VALUES, path) or {}
    if isinstance(value, str) and value in values:
        changes.append(f'{".".join(path)} = "{value}" was renamed: write "{values[value]}"')
        return values[value]
    return value


def _to_old_names(value: Any, path: Path) -> Any:
    if isinstance(value, Mapping):
        return {_find(_OLD_NAMES, (*path, key)) or key: _to_old_names(x, (*path, key)) for key, x in value.items()}
    if isinstance(value, list):
        return [_to_old_names(inner, (*path, str(i))) for i, inner in enumerate(value)]
    values = _find(_OLD_VALUES, path) or {}
    return values.get(value, value) if isinstance(value, str) else value


def _find(renames: Mapping[Path, Any], path: Path) -> Any:
    """Return the entry whose pattern matches the path, or None."""
    for pattern, entry in renames.items():
        if len(pattern) == len(path) and all(one in ("*", part) for one, part in zip(pattern, path, strict=True)):
            return entry
    return None
