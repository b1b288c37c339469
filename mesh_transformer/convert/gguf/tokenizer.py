# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Read the tokenizer and chat template from the metadata of a GGUF file, as the files of a Hugging Face folder.

Four values of tokenizer.ggml.model are supported: "gpt2", which is byte-level BPE with a named pre-tokenizer
(pre_tokenizers.py); "llama", SentencePiece's BPE with byte fallback, which stores scores instead of merges; "t5",
SentencePiece's Unigram; and "bert", WordPiece (unigram.py for both).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType

from mesh_transformer.convert.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from mesh_transformer.convert.gguf.unigram import SPACE, make_unigram, make_wordpiece
from mesh_transformer.data.tokenizer_files import token_ids
from mesh_transformer.data.tokenizers import tokenizer_from_json
from mesh_transformer.data.vocabulary_files import make_affix_processor
from mesh_transformer.storage.errors import CheckpointError

KINDS = ("gpt2", "llama", "t5", "bert")
ENDED_BY_DEFAULT = ("t5", "bert")  # llama.cpp puts a token after a text if the metadata has no add_eos_token
BERT_IDS = {
    "cls": "cls_token_id",
    "seperator": "sep_token_id",
    "mask": "mask_token_id",
}  # "seperator" is the spelling of the format
SPECIAL_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
END_OF_TURN = "tokenizer.ggml.eot_token_id"
GEMMA = ("gemma", "gemma2", "gemma3")
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
ADDED = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)


def read_tokenizer(metadata: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return the metadata of a native checkpoint: the tokenizer, IDs of special tokens and text files (text_files.py).

    The result is empty if the GGUF file has no tokenizer. Raises CheckpointError if the tokenizer is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return {}
    if kind not in KINDS:
        raise CheckpointError(
            f"{where}: tokenizer.ggml.model = {kind!r} is not supported; supported: {', '.join(map(repr, KINDS))}; "
            "convert the model's Hugging Face folder instead"
        )
    tokens, types = read_vocabulary(metadata, where)
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in SPECIAL_IDS.items()}
    all_ids = ids | {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in BERT_IDS.items()}
    named = {
        name.removesuffix("_id"): tokens[i] for name, i in all_ids.items() if i is not None and 0 <= i < len(tokens)
    }
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(metadata)))
    adds_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", kind in ENDED_BY_DEFAULT))
    first_and_last = ("cls_token", "sep_token") if kind == "bert" else ("bos_token", "eos_token")
    table = _make_table(metadata, tokens, types, where)
    added_types = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    table["added_tokens"] = [
        dict(id=i, content=token, **ADDED, special=kind != TokenType.USER_DEFINED)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in added_types
    ]
    before = named.get(first_and_last[0]) if adds_bos else None
    after = named.get(first_and_last[1]) if adds_eos else None
    adds_none = before is None and after is None
    table["post_processor"] = None if adds_none else make_affix_processor(token_ids(table), before, after)
    special = {key: value for key, value in ids.items() if value is not None and key != "unk_token_id"}
    ends_of_text = [i for i in (ids["eos_token_id"], metadata.get(END_OF_TURN)) if i is not None]
    template = metadata.get("tokenizer.chat_template")
    config = named | {
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {key: special[key] for key in ("bos_token_id", "pad_token_id") if key in special}
    if ends_of_text:
        unique = list(dict.fromkeys(ends_of_text))
        generation["eos_token_id"] = unique if len(unique) > 1 else unique[0]
    carried = {
        "tokenizer_config.json": config | ({"chat_template": template} if template else {}),
        "generation_config.json": generation,
    }
    record = {"type": "file", "tokenizer": table}
    if "eos_token" in named:
        record["end_of_text"] = named["eos_token"]
    return {
        "tokenizer": tokenizer_from_json(record, where=str(where)).to_json(),
        "special_ids": special,
        "carried": {name: json.dumps(content, indent=1, ensure_ascii=False) for name, content in carried.items()},
    }


def read_vocabulary(metadata: Mapping[str, Any], where: object) -> tuple[list[str], list[int]]:
    """Return the tokens and their types, without the placeholders for unused embeddings at the end."""
    tokens = list(metadata.get("tokenizer.ggml.tokens", []))
    types = list(metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens)))
    if len(types) != len(tokens) or not tokens:
        raise CheckpointError(
            f"{where}: tokenizer.ggml.tokens has {len(tokens)} elements and tokenizer.ggml.token_type {len(types)}; both must "
            "have the same number, at least one; convert the model's Hugging Face folder instead"
        )
    while tokens and types[-1] == TokenType.UNUSED and tokens[-1] == f"[PAD{len(tokens) - 1}]":
        tokens.pop()
        types.pop()
    return tokens, types


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Return whether llama.cpp puts the BOS token before a text if the metadata has no add_bos_token."""
    if metadata["tokenizer.ggml.model"] in ("llama", "bert"):
        return True
    return PRE_TOKENIZERS.get(metadata.get("tokenizer.ggml.pre", ""), PreTokenizer()).adds_bos


def _make_table(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: object
) -> dict[str, Any]:
    """Return a tokenizer.json without added tokens and post-processor."""
    match metadata["tokenizer.ggml.model"]:
        case "gpt2":
            return _make_byte_level(metadata, tokens, where)
        case "t5":
            return make_unigram(metadata, tokens, types)
        case "bert":
            return make_wordpiece(metadata, tokens, types)
        case _:
            return _make_sentencepiece(metadata, tokens, types)


def _make_byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], where: object) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{where}: tokenizer.ggml.pre = {name!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}; "
            "convert the model's Hugging Face folder instead"
        )
    pre_tokenizer = PRE_TOKENIZERS[name]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [merge.split(" ") for merge in metadata.get("tokenizer.ggml.merges", [])]
    merges = [pair for pair in pairs if "".join(pair) in vocabulary]  # llama.cpp ignores other merges
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"} if pre_tokenizer.nfc else None,
        "pre_tokenizer": pre_tokenizer.table,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": pre_tokenizer.ignore_merges},
    }


def _make_sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    adds_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    # Tokens of Gemma that consist of several spaces are stored with plain spaces
    spelled = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocabulary = {token: i for i, token in enumerate(spelled)}
    is_gemma = metadata.get("general.architecture") in GEMMA
    # Gemma's merges follow the order of its vocabulary, not the scores
    scores = [-i for i in range(len(tokens))] if is_gemma else metadata["tokenizer.ggml.scores"][: len(tokens)]
    replace = dict(type="Replace", pattern={"String": " "}, content=SPACE)
    steps = [
        dict(type="Replace", pattern={"String": SPACE}, content=" "), dict(type="ByteFallback"), dict(type="Fuse"),
    ]  # fmt: skip
    if adds_prefix:
        steps.append(dict(type="Strip", content=" ", start=1, stop=0))
    unknown = next((token for token, kind in zip(spelled, types, strict=True) if kind == TokenType.UNKNOWN), None)
    normal = [token for token, kind in zip(spelled, types, strict=True) if kind in (TokenType.NORMAL, TokenType.UNUSED)]
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [dict(type="Prepend", prepend=SPACE), replace]}
        if adds_prefix
        else replace,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": derive_merges(normal, vocabulary, scores),
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def derive_merges(tokens: Sequence[str], vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[list[str]]:
    """Return the ordered merges of a vocabulary with scores: for each token, all pairs of tokens that form this token.

    Pairs that form a token with a higher score come first, as SentencePiece merges the pair with the highest score.
    """
    allowed = set(tokens)
    keyed: list[tuple[float, int, int, str, str]] = []  # (sorting key, pair)
    for token in tokens:
        score = scores[vocabulary[token]]
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in allowed and right in allowed:
                keyed.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [[left, right] for *_, left, right in sorted(keyed)]
