# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Small vocabularies in the form of a tokenizer.json, for tests."""

import copy
from typing import Any

from mesh_transformer.data.token_bytes import make_byte_alphabet
from mesh_transformer.data.vocabulary_files import make_affix_processor

END = "<|endoftext|>"


def special(index: int, content: str, **changes: Any) -> dict[str, Any]:
    fixed = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return dict(fixed, id=index, content=content) | changes


def small_table(**changes: Any) -> dict[str, Any]:
    """Return a byte-level BPE with "th", "the", " the" and the end of text."""
    tokens = [*sorted(make_byte_alphabet()), "th", "the", "\u0120the"]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    table = {
        "version": "1.0",
        "added_tokens": [special(len(tokens), END)],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": ["t h", "th e", "\u0120 the"],
        },
    }
    return copy.deepcopy(table) | changes


def llama_table() -> dict[str, Any]:
    """Return a BPE with byte fallback and a space before the first word, as converted from SentencePiece."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "h", "i", "hi", "\u2581hi"]
    return {
        "version": "1.0",
        "added_tokens": [special(i, token) for i, token in enumerate(tokens[:3])],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": ["h i", "\u2581 hi"],
        },
    }


def unigram_table(**changes: Any) -> dict[str, Any]:
    """Return a Unigram vocabulary as T5's tokenizer.json has it."""
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "\u2581": -2.5, "\u2581the": -3.0, "\u2581hi": -4.0, "th": -5.0}
    scores |= {"er": -5.5, "o": -6.0, "h": -6.5, "e": -6.25, "t": -7.0, "i": -7.5, "r": -8.0, "\u2581other": -9.0}
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    table = {
        "version": "1.0",
        "added_tokens": [special(i, token) for i, token in enumerate(("<pad>", "</s>", "<unk>"))],
        "normalizer": None,
        "pre_tokenizer": space,
        "decoder": space,
        "post_processor": make_affix_processor({"</s>": 1}, None, "</s>"),
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [list(item) for item in scores.items()]},
    }
    return table | changes
