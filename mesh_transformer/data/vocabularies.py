# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Functions on the content of a tokenizer.json: reading, validation, properties and changes."""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers as hf

# End-of-text tokens: GPT-2 and derivatives, Llama 3, Llama, Gemma. The first token that a vocabulary has is used.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# Characters that no text contains: 32 Unicode noncharacters, chosen at random when the program starts.
ABSENT_FROM_TEXTS = "".join(secrets.choice(_NONCHARACTERS) for _ in range(32))


class TokenizerError(ValueError):
    """An unusable tokenizer, or text that it cannot encode. The message has the file and a fix."""


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object from a file. Raises TokenizerError."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        fix = "give a tokenizer.json" if path.suffix != ".json" else "copy it again"
        raise TokenizerError(f"{path}: not valid JSON: {error}; {fix}") from None
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(table, dict):
        raise TokenizerError(f"{path}: got {json.dumps(table)[:60]}, expected a JSON object; copy the file again")
    return table


def make_deterministic(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the tokenizer.json without truncation, padding and dropout, so that a text always has the same ids."""
    model = table.get("model")
    if not isinstance(model, Mapping) or not model.get("vocab"):
        raise TokenizerError(
            f"{where}: model.vocab is missing or empty; give a tokenizer.json of Hugging Face tokenizers"
        )
    if model.get("end_of_word_suffix"):
        raise TokenizerError(
            f"{where}: end_of_word_suffix={model['end_of_word_suffix']!r} is not supported; use another tokenizer"
        )
    fixed = {"dropout": None} if "merges" in model else {}
    return {**table, "truncation": None, "padding": None, "model": {**model, **fixed}}


def make_library(table: Mapping[str, Any], where: str) -> hf.Tokenizer:
    """Return the `tokenizers` object for a tokenizer.json. Raises TokenizerError."""
    try:
        return hf.Tokenizer.from_str(json.dumps(table))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(
            f"{where}: not a usable tokenizer.json: {error}; copy it again, or use another tokenizer"
        ) from None


def find_end_of_text(table: Mapping[str, Any], vocabulary: Mapping[str, int]) -> str | None:
    """Return the first token of END_OF_TEXT that a tokenizer.json has, or None."""
    special = {token["content"] for token in list_added(table) if token["special"]}
    for name in END_OF_TEXT:
        # An ordinary token "</s>" is HTML. The vocabulary of GPT-2 does not mark its end of text as special.
        if name in special or (name == END_OF_TEXT[0] and name in vocabulary):
            return name
    return None


def can_split(table: Mapping[str, Any]) -> bool:
    """Return whether encoding the parts of a text that is split at word boundaries gives the ids of the whole text.

    True only for pre-tokenizers and normalizers like GPT-2's, for which this is known.
    """
    pre_tokenizer, normalizer = table.get("pre_tokenizer") or {}, table.get("normalizer") or {"type": "NFC"}
    plain = (
        pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space")
    )
    ordinary = [token for token in list_added(table) if not token["special"]]
    return bool(plain) and normalizer["type"] == "NFC" and all(token["content"].isspace() for token in ordinary)


def list_added(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the added tokens of a tokenizer.json."""
    return table.get("added_tokens") or []


def find_unknown(table: Mapping[str, Any]) -> int | None:
    """Return the id of the unknown token in the vocabulary of a tokenizer.json, or None."""
    model = table["model"]
    if isinstance(model["vocab"], list):  # Unigram
        return model.get("unk_id")
    return model["vocab"].get(model.get("unk_token"))


def merge_additions(table: Mapping[str, Any], additions: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json with the added tokens and the post-processor of `additions`."""
    merged = {token["id"]: token for token in [*list_added(table), *additions.get("added_tokens", [])]}
    post_processor = {name: additions[name] for name in ("post_processor",) if name in additions}
    return {**table, "added_tokens": [merged[i] for i in sorted(merged)], **post_processor}


def mark_special(table: Mapping[str, Any], name: str, token: int) -> dict[str, Any]:
    """Return a tokenizer.json in which the token `name` with id `token` is special."""
    known = {added["content"]: added for added in list_added(table)}
    return merge_additions(
        table, {"added_tokens": [{**known.get(name, make_added_token(name, token)), "special": True}]}
    )


def make_added_token(name: str, token: int) -> dict[str, Any]:
    """Return an entry of a tokenizer.json's added_tokens for a special token."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {"id": token, "content": name, **flags}


def rename_tokens(table: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a tokenizer.json for encoding in which the tokens `names` have names that no text contains."""
    new = {name: ABSENT_FROM_TEXTS + name for name in names}
    model = dict(table["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [[new.get(name, name), score] for name, score in model["vocab"]]
    else:
        model["vocab"] = {new.get(name, name): i for name, i in model["vocab"].items()}
    added = [{**token, "content": new.get(token["content"], token["content"])} for token in list_added(table)]
    return {**table, "model": model, "added_tokens": added, "post_processor": None}


def make_digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 digest of a JSON object."""
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def to_utf8(text: str) -> bytes:
    """Return the bytes of a text. Raises TokenizerError at lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise TokenizerError(
            f"lone surrogate {code} at character {error.start} of the text is not valid Unicode; remove it"
        ) from None
