# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The bytes of each token, from which texts are decoded one token at a time.

The decoders of Hugging Face `tokenizers` take all tokens of a text at once. All decoders but two concatenate the texts of
the tokens, and only the first token of a text differs: it loses its leading space ("\u2581the" in T5, "the" in BERT). So the
text of a token follows from the decoder's output for the token alone and after another token. The two exceptions,
ByteLevel (GPT-2) and ByteFallback (Llama), concatenate bytes; the bytes of one token may be invalid UTF-8.
"""

import re
from collections.abc import Mapping
from typing import Any

import tokenizers as hf

IN_UTF8 = frozenset({*range(256)} - {0xC0, 0xC1, *range(0xF5, 0x100)})  # bytes that occur in some valid text
_ANCHOR = "a"  # a token that all decoders leave unchanged
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class TokenBytes:
    """Bytes of the tokens of one vocabulary."""

    def __init__(self, table: Mapping[str, Any], library: hf.Tokenizer):
        """Prepare decoding with `library`, made from the tokenizer.json `table`; `special` is the set of special ids."""
        vocabulary = library.get_vocab(with_added_tokens=True)
        self._tokens = {i: token for token, i in vocabulary.items()}
        self.special = {i for i, token in library.get_added_tokens_decoder().items() if token.special}
        self._added = set(library.get_added_tokens_decoder())
        self._decoder: Any = library.decoder
        self._alphabet = make_byte_alphabet() if find_entry(table.get("decoder"), "type", "ByteLevel") else None
        self._byte_fallback = find_entry(table.get("decoder"), "type", "ByteFallback")
        self._cache: dict[tuple[int, bool], bytes] = {}

    def find(self, token: int, *, first: bool = False) -> bytes | None:
        """Return the bytes of an id, with `first` at the start of a text; None for an id outside the vocabulary."""
        key = token, first
        if key not in self._cache:
            if token not in self._tokens:
                return None
            self._cache[key] = self._decode(self._tokens[token], token in self._added, first)
        return self._cache[key]

    def _decode(self, name: str, is_added: bool, first: bool) -> bytes:
        if self._alphabet is not None:
            if is_added or not self._alphabet.keys() >= set(name):
                return name.encode()
            return bytes(self._alphabet[character] for character in name)
        if self._byte_fallback and _BYTE_TOKEN.fullmatch(name) and not (first and name == "<0x20>"):
            return bytes([int(name[3:5], 16)])
        if self._decoder is None:  # without a decoder, `tokenizers` puts spaces between the tokens
            return name.encode() if first else f" {name}".encode()
        if first:
            return self._decoder.decode([name]).encode()
        return self._decoder.decode([_ANCHOR, name])[len(_ANCHOR) :].encode()


def find_missing_bytes(table: Mapping[str, Any]) -> frozenset[int] | None:
    """Return the bytes of UTF-8 that a vocabulary lacks; None for a vocabulary of characters or words, without byte tokens."""
    vocabulary = table["model"]["vocab"]
    names = {entry[0] for entry in vocabulary} if isinstance(vocabulary, list) else vocabulary.keys()
    if find_entry([table.get("normalizer"), table.get("pre_tokenizer")], "type", "ByteLevel"):
        return frozenset(byte for name, byte in make_byte_alphabet().items() if byte in IN_UTF8 and name not in names)
    if table["model"].get("byte_fallback"):
        return frozenset(byte for byte in IN_UTF8 if f"<0x{byte:02X}>" not in names)
    return None


def make_byte_alphabet() -> dict[str, int]:
    """Return GPT-2's mapping of characters to bytes: printable characters to themselves, U+0100 onward to other bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(unprintable)}


def find_entry(tree: Any, key: str, value: object) -> bool:
    """Return whether `key` has `value` anywhere in nested JSON."""
    if isinstance(tree, Mapping):
        return tree.get(key) == value or any(find_entry(branch, key, value) for branch in tree.values())
    return isinstance(tree, list) and any(find_entry(branch, key, value) for branch in tree)
