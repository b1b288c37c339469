# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Files of a Hugging Face folder that a native checkpoint stores with the weights.

They say how the model's texts begin and end (sample/model_defaults.py), and are written when the model is exported.
"""

import json
from collections.abc import Mapping
from typing import Any

from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath

CARRIED_TEXTS = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# Keys of config.json: IDs of special tokens, and what the outputs of a classifier mean.
SPECIAL_IDS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("id2label", "label2id", "problem_type"),
)


def read_carried(folder: AnyPath, external_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a model folder: `carried`, its files by name, and `special_ids`, keys of its config.json.

    Raises CheckpointError for a file that is not text or not JSON.
    """
    carried = {}
    for name in CARRIED_TEXTS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            carried[name] = path.read_bytes().decode()
            if name.endswith(".json"):
                json.loads(carried[name])
        except ValueError as error:
            kind = "JSON" if name.endswith(".json") else "text in UTF-8"
            raise CheckpointError(f"{path}: not valid {kind}: {error}; copy it again, or remove it") from None
    return {
        "carried": carried,
        "special_ids": {key: external_config[key] for key in SPECIAL_IDS if key in external_config},
    }
