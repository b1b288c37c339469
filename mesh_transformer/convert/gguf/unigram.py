# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""SentencePiece's Unigram and BERT's WordPiece in GGUF metadata, as parts of a tokenizer.json, and back.

llama.cpp calls them "t5" and "bert" (llama-vocab.cpp: llm_tokenizer_ugm and llm_tokenizer_wpm).
"""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType

from mesh_transformer.storage.errors import CheckpointError

SPACE = "\u2581"  # SentencePiece's character for a space; llama.cpp also puts it before the words of WordPiece
CHARSMAP = "tokenizer.ggml.precompiled_charsmap"
SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
EXTRA_SPACES = "tokenizer.ggml.remove_extra_whitespaces"
CONTINUATION = "##"
UNCASED = {
    "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True,
}  # fmt: skip
RUNS_OF_SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
STRIP_ENDS = {"type": "Strip", "strip_left": True, "strip_right": True}


def make_unigram(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """Return a tokenizer.json for the metadata of a Unigram vocabulary, without added tokens."""
    normalizers: list[dict[str, Any]] = []
    if charsmap := metadata.get(CHARSMAP):
        data = base64.b64encode(bytes(value & 255 for value in charsmap)).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": data})
    if metadata.get(EXTRA_SPACES, False):
        normalizers += [STRIP_ENDS, RUNS_OF_SPACES]
    scheme = "always" if metadata.get(SPACE_PREFIX, False) else "never"
    space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown is None:
        unknown = next((i for i, kind in enumerate(types) if kind == TokenType.UNKNOWN), None)
    scores = metadata["tokenizer.ggml.scores"][: len(tokens)]
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": space,
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[token, score] for token, score in zip(tokens, scores, strict=True)],
            "byte_fallback": TokenType.BYTE in types,
        },
    }


def write_unigram(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries for the scores and the normalization of a Unigram vocabulary; the inverse of `make_unigram`.

    Raises CheckpointError if llama.cpp has no tokenizer that divides texts in the same way.
    """
    normalizers = _steps(table.get("normalizer"), "normalizers")
    pre_tokenizers = _steps(table.get("pre_tokenizer"), "pretokenizers")
    values: dict[str, Any] = {"tokenizer.ggml.model": "t5", "tokenizer.ggml.pre": "default"}
    if normalizers and normalizers[0]["type"] == "Precompiled":
        values[CHARSMAP] = base64.b64decode(normalizers.pop(0)["precompiled_charsmap"])
    # After SentencePiece's map, which replaces all whitespace with spaces, WhitespaceSplit has the effect of STRIP_ENDS and
    # RUNS_OF_SPACES.
    splits_whitespace = CHARSMAP in values and pre_tokenizers and pre_tokenizers[0]["type"] == "WhitespaceSplit"
    if splits_whitespace:
        pre_tokenizers.pop(0)
    metaspace = pre_tokenizers[-1] if len(pre_tokenizers) == 1 and pre_tokenizers[0]["type"] == "Metaspace" else {}
    scheme = metaspace.get("prepend_scheme", "always")
    supported = [[STRIP_ENDS, RUNS_OF_SPACES]] if not splits_whitespace else []
    if not metaspace or (normalizers and normalizers not in supported) or scheme == "first":
        raise CheckpointError(
            "llama.cpp has no Unigram tokenizer that divides texts as the tokenizer of this model, whose normalizer and "
            f"pre_tokenizer are {json.dumps([table.get('normalizer'), table.get('pre_tokenizer')])[:300]}; export the model "
            "with --format huggingface"
        )
    values[SPACE_PREFIX] = scheme == "always"
    values[EXTRA_SPACES] = bool(splits_whitespace or normalizers)
    model = table["model"]
    if model.get("unk_id") is not None:
        values["tokenizer.ggml.unknown_token_id"] = model["unk_id"]
    return values


def _steps(table: Any, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer."""
    if not table:
        return []
    return list(table[key]) if table["type"] == "Sequence" else [table]


def make_wordpiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """Return a tokenizer.json for the metadata of a WordPiece vocabulary, without added tokens.

    llama.cpp's converter stores "word" as SPACE + "word" and "##s" as "s".
    """
    special = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED, TokenType.UNUSED)
    vocabulary: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        is_bracketed = token.startswith("[") and token.endswith("]")
        if token.startswith(SPACE):
            token = token.removeprefix(SPACE)
        elif kind not in special and not is_bracketed:
            token = CONTINUATION + token
        vocabulary[token] = i
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    return {
        "version": "1.0",
        "normalizer": UNCASED,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": CONTINUATION, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]" if unknown is None else tokens[unknown],
            "continuing_subword_prefix": CONTINUATION,
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }


def write_wordpiece(table: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """Return the entries for a WordPiece vocabulary; the inverse of `make_wordpiece`.

    Raises CheckpointError unless the tokenizer converts texts to lower case, as llama.cpp does.
    """
    normalizer = table.get("normalizer") or {}
    if normalizer not in (UNCASED, UNCASED | {"strip_accents": True}):
        raise CheckpointError(
            "llama.cpp has no WordPiece tokenizer with the normalizer of this model's tokenizer, which is "
            f"{json.dumps(normalizer)[:300]}; export the model with --format huggingface"
        )
    stored: list[str] = []
    for token, kind in zip(tokens, types, strict=True):
        is_special = kind != TokenType.NORMAL or (token.startswith("[") and token.endswith("]"))
        is_continued = token.startswith(CONTINUATION) and len(token) > len(CONTINUATION)
        stored.append(token if is_special else token.removeprefix(CONTINUATION) if is_continued else SPACE + token)
    values: dict[str, Any] = {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": stored}
    names = {"unknown": table["model"]["unk_token"], "cls": "[CLS]", "seperator": "[SEP]", "mask": "[MASK]"}
    ids = {f"tokenizer.ggml.{key}_token_id": tokens.index(token) for key, token in names.items() if token in tokens}
    return values | ids
