# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The files of a tokenizer's folder beside tokenizer.json: what they say about special tokens.

Model folders of Hugging Face hold, besides the vocabulary, `tokenizer_config.json`, `special_tokens_map.json` and the
model's `config.json`. `read_additions` returns what they add to a tokenizer.json, in the form in which a checkpoint
stores it: {"end_of_text": name of a token}. It is empty where these files say nothing new, so that a tokenizer keeps its
fingerprint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.data.vocabularies import find_end_of_text, read_json

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
MODEL_CONFIG = "config.json"


def read_additions(folder: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the files of a folder add to its tokenizer.json `table`. Raises TokenizerError for damaged files."""
    names = name_special_tokens({name: read_optional(folder / name) for name in (CONFIG, SPECIAL_TOKENS_MAP)})
    ids = token_ids(table)
    end = names.get("eos_token")
    if end not in ids:
        end = _find_by_id(ids, read_optional(folder / MODEL_CONFIG).get("eos_token_id"))
    if end is None or end == find_end_of_text(table, ids):
        return {}
    return {"end_of_text": end}


def name_special_tokens(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the special tokens by the names that transformers gives them: {"eos_token": "</s>", ...}.

    `files` maps names of files to their content. As in transformers, special_tokens_map.json is read only where
    tokenizer_config.json has no added_tokens_decoder, and then has precedence.
    """
    found = dict(files.get(CONFIG, {}))
    if "added_tokens_decoder" not in found:
        found |= files.get(SPECIAL_TOKENS_MAP, {})
    named = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: value for name, value in named.items() if name.endswith("_token") and isinstance(value, str)}


def token_ids(table: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of every token of a tokenizer.json."""
    vocabulary = table["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in table.get("added_tokens") or []}}


def read_optional(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file does not exist. Raises TokenizerError."""
    return read_json(path) if path.is_file() else {}


def _find_by_id(ids: Mapping[str, int], wanted: Any) -> str | None:
    """Return the token with an id, or with the first of several."""
    first = wanted[0] if isinstance(wanted, list) and wanted else wanted
    return next((token for token, i in ids.items() if i == first), None)
