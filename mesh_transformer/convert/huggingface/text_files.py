# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Small files of a model folder: configuration of tokenizer and generation, special tokens, chat templates.

The metadata of a native checkpoint stores the texts of these files under the key `carried`, by file name, and the tokenizer
under the key `tokenizer`. sample/model_defaults.py reads from them how texts of the model begin and end. An export writes
the files to the model folder; a conversion from one model folder to another copies the files unchanged. The key
`carried_files` has, in base64, files that an export only writes back: license, model card, and the files of SentencePiece,
which other programs read instead of tokenizer.json.
"""

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.checkpoint.backends import backend_for
from mesh_transformer.data.file_tokenizer import FileTokenizer
from mesh_transformer.data.span_corruption import SentinelTokenizer
from mesh_transformer.data.tokenizer_files import CONFIG as TOKENIZER_CONFIG
from mesh_transformer.data.tokenizer_files import MODEL_CONFIG, is_tokenizer_file
from mesh_transformer.data.tokenizers import Tokenizer, tokenizer_from_json
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath

_TEXTS = (
    "generation_config.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Keys of config.json: IDs of special tokens, and the labels of a classifier.
SPECIAL_IDS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("id2label", "label2id", "problem_type"),
)
MODEL_CARD = "README.md"
_FILES = re.compile(r"README\.md|(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.md|\.txt)?|[\w.-]+\.model")
_MAX_FILE_BYTES = 8 << 20  # maximum per stored file, because every checkpoint of a fine-tuned model stores it again
_NAMED_TEMPLATE = re.compile(r"additional_chat_templates/[^/\\]+\.jinja")


def is_stored_text(name: str) -> bool:
    """Return whether a native checkpoint stores the text of the file `name` of a model folder."""
    return name in _TEXTS or _NAMED_TEMPLATE.fullmatch(name) is not None


def is_stored_file(name: str) -> bool:
    """Return whether a native checkpoint stores the bytes of the file `name` of a model folder, if it is not too large."""
    return _FILES.fullmatch(name) is not None


def read_text_files(folder: AnyPath, external_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata of a model folder.

    Keys: `carried` (text files by name), `carried_files` (other files in base64, by name), and `special_ids` (keys and values
    of config.json). Raises CheckpointError for a file that is not text or not JSON.
    """
    carried = {}
    sizes = {name: size for name, (size, _) in sorted(backend_for(folder).list_files().items())}
    files = [name for name, size in sizes.items() if is_stored_file(name) and size <= _MAX_FILE_BYTES]
    for name in filter(is_stored_text, sizes):
        path = folder / name
        try:
            carried[name] = path.read_bytes().decode()
            if name.endswith(".json"):
                json.loads(carried[name])
        except ValueError as error:
            kind = "JSON" if name.endswith(".json") else "text in UTF-8"
            raise CheckpointError(f"{path}: not valid {kind}: {error}; copy it again, or remove the file") from None
    # A model with parts besides text may have these keys in text_config, the configuration of its text model.
    keys = {**(external_config.get("text_config") or {}), **external_config}
    meta: dict[str, Any] = {
        "carried": carried,
        "special_ids": {key: keys[key] for key in SPECIAL_IDS if key in keys},
    }
    if files:
        meta["carried_files"] = {name: base64.b64encode((folder / name).read_bytes()).decode() for name in files}
    return meta


def copy_small_files(source: AnyPath, destination: Path) -> None:
    """Copy text files, tokenizer files, license and model card from one model folder to another."""
    for name in backend_for(source).list_files():
        is_top_level_file = "/" not in name and (is_stored_file(name) or is_tokenizer_file(name))
        if name != MODEL_CONFIG and (is_stored_text(name) or is_top_level_file):
            (destination / name).parent.mkdir(exist_ok=True)
            (destination / name).write_bytes((source / name).read_bytes())


def write_text_files(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write the tokenizer and the files of a checkpoint's metadata to a model folder; existing files are not replaced.

    The IDs of special tokens are written to config.json. tokenizer_config.json is always written, because without it
    transformers chooses the tokenizer class by model type.
    """
    texts = {name: text for name, text in (meta.get("carried") or {}).items() if is_stored_text(name)}
    tokenizer = tokenizer_from_json(meta["tokenizer"]) if meta.get("tokenizer") else None
    table = json.loads((folder / MODEL_CONFIG).read_bytes())
    table |= meta["special_ids"] if "special_ids" in meta else _special_ids(tokenizer, table)
    (folder / MODEL_CONFIG).write_text(json.dumps(table, indent=1))
    if isinstance(tokenizer, FileTokenizer):
        texts["tokenizer.json"] = json.dumps(tokenizer.tokenizer_json, ensure_ascii=False)
        ends = {"bos_token": tokenizer.begin_of_text, "eos_token": tokenizer.end_of_text}
        named = {name: tokenizer.name_token(token) for name, token in ends.items()}
        texts.setdefault(
            TOKENIZER_CONFIG, json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}, indent=1)
        )
    stored = {name: data for name, data in (meta.get("carried_files") or {}).items() if is_stored_file(name)}
    files = {name: text.encode() for name, text in texts.items()}
    files |= {name: base64.b64decode(data) for name, data in stored.items()}
    for name, data in files.items():
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)


def _special_ids(tokenizer: Tokenizer | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special IDs of a model trained by this project; BOS and EOS replace the defaults of transformers."""
    end = tokenizer.end_of_text if tokenizer else None
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": config.get("pad_token_id")}
    if tokenizer is None:
        return ids
    if config.get("is_encoder_decoder"):
        ids["decoder_start_token_id"] = SentinelTokenizer(tokenizer, config["vocab_size"]).decoder_start
    return ids
