# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Recipe and datasheet keys that were renamed since version 1.0.

A recipe file with an old key is rejected, and the error states the current key. Tables stored with a corpus
(manifest.json, datasheet.json) are translated. The digests that identify the parts of a build are computed over the old
names, so that parts made by version 1.0 are reused.
"""

from collections.abc import Mapping
from typing import Any

from mesh_transformer.config.renamed import Renames, translate_stored

RECIPE = Renames(
    keys={
        "steps": "filters",
        "components.*.licence": "license",
        "components.*.pieces_kb": "chunk_kb",
        "filters.*.without": "exclude_components",
        "filters.*.min_piece": "min_fragment",
        "filters.*.common": "max_ngram_documents",
        "duplicates.across": "across_components",
    },
    values={"components.*.kind": {"source": "code"}, "duplicates.near": {"own": "custom"}},
)
DATASHEET = Renames(
    keys={
        "proof": "split_check",
        "components.*.licence": "license",
        "components.*.steps": "filters",
        "components.*.left_out": "skipped",
        "components.*.left_out_examples": "skipped_examples",
        **{f"recipe.{path}": name for path, name in RECIPE.keys.items()},
    },
    values={
        "components.*.kind": RECIPE.values["components.*.kind"],
        "duplicates.near": RECIPE.values["duplicates.near"],
        **{f"recipe.{path}": values for path, values in RECIPE.values.items()},
    },
)


def _inverse(renames: Renames) -> Renames:
    """Return the translation from the current names to the names of version 1.0."""
    sections = {name: path for path, name in renames.keys.items() if "." not in path}
    keys = {}
    for path, name in renames.keys.items():
        *parents, old = path.split(".")
        keys[".".join([*(sections.get(parent, parent) for parent in parents), name])] = old
    values = {path: {new: old for old, new in table.items()} for path, table in renames.values.items()}
    return Renames(keys, values)


_STORED = _inverse(RECIPE)


def to_stored_names(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return recipe sections with the names of version 1.0, in the same order."""
    return translate_stored(table, _STORED)
