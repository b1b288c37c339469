# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files: reads tokenizer.json and GPT-2 vocabularies, and derives their properties and token bytes."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers as hf

# The first of these in a vocabulary is its end of text: GPT-2 and derivatives, Llama 3, Llama, Gemma.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_IN_UTF8 = set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that occur in some valid text


class TokenizerError(ValueError):
    """An unusable tokenizer, or text it cannot encode; the message names the file and a fix."""


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
        raise TokenizerError(f"{path}: expected a JSON object; give a tokenizer.json")
    return table


def read_gpt2(folder: Path) -> dict[str, Any]:
    """Read GPT-2's vocab.json and merges.txt as the content of a tokenizer.json."""
    vocabulary = read_json(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{folder / 'merges.txt'}: cannot be read: {error}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        pair = line.rstrip("\r").split(" ")
        if pair == [""] or (number == 1 and line.startswith("#version")):
            continue
        if len(pair) != 2:
            raise TokenizerError(f"{folder / 'merges.txt'}:{number}: expected two tokens separated by a space")
        merges.append(pair)
    added = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    return {
        "version": "1.0",
        "added_tokens": [dict(added, id=vocabulary[t], content=t) for t in END_OF_TEXT[:1] if t in vocabulary],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }


def make_deterministic(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the tokenizer.json without truncation, padding and dropout, so that a text always has the same ids."""
    model = table.get("model")
    if not isinstance(model, Mapping) or not model.get("vocab"):
        raise TokenizerError(f"{where}: no vocabulary; give a tokenizer.json of Hugging Face tokenizers")
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise TokenizerError(
            f"{where}: end_of_word_suffix and continuing_subword_prefix are not supported; give a byte-level BPE"
        )
    return {**table, "truncation": None, "padding": None, "model": {**model, "dropout": None}}


def make_library(table: Mapping[str, Any], where: str) -> hf.Tokenizer:
    """Return the `tokenizers` object for a tokenizer.json. Raises TokenizerError."""
    try:
        return hf.Tokenizer.from_str(json.dumps(table))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{where}: not a usable tokenizer.json: {error}") from None


def find_end_of_text(table: Mapping[str, Any], vocabulary: Mapping[str, int]) -> str | None:
    """Return the end-of-text token of a tokenizer.json by its name, or None."""
    special = {token["content"] for token in table.get("added_tokens") or [] if token["special"]}
    for name in END_OF_TEXT:
        # An ordinary token "</s>" is HTML. GPT-2's own vocabulary does not mark its end of text as special.
        if name in special or (name == END_OF_TEXT[0] and name in vocabulary):
            return name
    return None


def make_byte_table(
    table: Mapping[str, Any], vocabulary: Mapping[str, int], added: Mapping[int, hf.AddedToken], where: str
) -> dict[int, bytes]:
    """Return the bytes of every id. Raises TokenizerError if some text cannot be encoded with them."""
    byte_level = _find([table.get("normalizer"), table.get("pre_tokenizer")], "type", "ByteLevel")
    if not byte_level and not table["model"].get("byte_fallback"):
        raise TokenizerError(f"{where}: neither byte-level nor with byte fallback, so it cannot encode every text")
    alphabet = make_byte_alphabet()
    found: dict[int, bytes] = {}
    single: set[int] = set()
    for token, index in vocabulary.items():
        if index in added:
            found[index] = b"" if added[index].special else token.encode()
            continue
        if byte_level:
            data = bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            data = bytes([int(token[3:5], 16)])
        else:
            data = token.replace("\u2581", " ").encode()
        found[index] = data
        single.update(data if len(data) == 1 else b"")
    missing = len(_IN_UTF8 - single)
    if missing:
        raise TokenizerError(
            f"{where}: {missing} byte values are not in the vocabulary, so texts would lose characters"
        )
    return found


def make_byte_alphabet() -> dict[str, int]:
    """Return GPT-2's byte for each character: printable characters for themselves, U+0100 onward for the other bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def writes_leading_space(table: Mapping[str, Any]) -> bool:
    """Return whether encoding puts a space before the first word."""
    before = table.get("pre_tokenizer")
    prepends = _find(before, "prepend_scheme", "always") or _find(before, "prepend_scheme", "first")
    return prepends or _find(before, "add_prefix_space", True) or _find(table.get("decoder"), "type", "Strip")


def can_split(table: Mapping[str, Any]) -> bool:
    """Return whether encoding the parts of a text that is split at word boundaries gives the ids of the whole text.

    True only for pre-tokenizers and normalizers like GPT-2's, for which this is known.
    """
    before, normalizer = table.get("pre_tokenizer") or {}, table.get("normalizer") or {"type": "NFC"}
    plain = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before.get("add_prefix_space")
    ordinary = [token for token in table.get("added_tokens") or [] if not token["special"]]
    return bool(plain) and normalizer["type"] == "NFC" and all(token["content"].isspace() for token in ordinary)


def _find(tree: Any, key: str, value: object) -> bool:
    """Return whether `key` has `value` anywhere in nested JSON."""
    if isinstance(tree, Mapping):
        return tree.get(key) == value or any(_find(branch, key, value) for branch in tree.values())
    return isinstance(tree, list) and any(_find(branch, key, value) for branch in tree)
