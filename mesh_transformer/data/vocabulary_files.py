# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Converts vocab.json with merges.txt, and vocab.txt, to a tokenizer.json, as the classes of transformers do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.data.vocabularies import TokenizerError, make_added_token, read_json

_GPT2_END = "<|endoftext|>"
# Pattern of Qwen2Tokenizer: words, single digits, punctuation, line ends, spaces.
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BERT_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Special tokens that the classes of transformers have if a model's files do not name them.
CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _GPT2_END),
    "GPTNeoXTokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _GPT2_END)
    | {"pad_token": "<|padding|>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), _GPT2_END),
    "BertTokenizer": _BERT_TOKENS,
    "DistilBertTokenizer": _BERT_TOKENS,
    "ElectraTokenizer": _BERT_TOKENS,
    "AlbertTokenizer": _BERT_TOKENS
    | {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "<unk>", "pad_token": "<pad>"},
    "LlamaTokenizer": _LLAMA_TOKENS,
    "GemmaTokenizer": {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")},
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
}
# Classes of the model types whose files may not name a class.
MODEL_CLASSES = {
    **dict.fromkeys(("gpt2", "gptj", "gpt_neo"), "GPT2Tokenizer"),
    **dict.fromkeys(("bert", "distilbert", "electra"), "BertTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("t5", "mt5", "switch_transformers"), "T5Tokenizer"),
    "albert": "AlbertTokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "llama": "LlamaTokenizer",
}


def read_byte_level(folder: Path, class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the vocab.json and merges.txt of GPT2Tokenizer or Qwen2Tokenizer; `config` is tokenizer_config.json."""
    vocabulary = read_json(folder / "vocab.json")
    byte_level = dict(
        type="ByteLevel", add_prefix_space=bool(config.get("add_prefix_space")), trim_offsets=True, use_regex=True
    )
    normalizer, pre_tokenizer = None, byte_level
    if class_name == "Qwen2Tokenizer":
        split = dict(type="Split", pattern={"Regex": _QWEN2_PATTERN}, behavior="Isolated", invert=False)
        normalizer, pre_tokenizer = (
            {"type": "NFC"},
            {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]},
        )
    return {
        "version": "1.0",
        "added_tokens": [make_added_token(token, vocabulary[token]) for token in [_GPT2_END] if token in vocabulary],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": _read_merges(folder / "merges.txt")},
    }


def read_bert(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the vocab.txt of BertTokenizer, one token per line; `config` is tokenizer_config.json."""
    path = folder / "vocab.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from None
    vocabulary = {line.rstrip("\r"): i for i, line in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    special = {name: config.get(f"{name}_token", f"[{name.upper()}]") for name in ("pad", "unk", "cls", "sep", "mask")}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
    if missing := [
        token for name, token in special.items() if name in ("unk", "cls", "sep") and token not in vocabulary
    ]:
        raise TokenizerError(f"{path}: the tokens {', '.join(missing)} are missing; give the vocab.txt of a BERT model")
    return {
        "version": "1.0",
        "added_tokens": [
            make_added_token(token, vocabulary[token]) for token in special.values() if token in vocabulary
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
            "strip_accents": config.get("strip_accents"),
            "lowercase": config.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": make_affix_processor(vocabulary, special["cls"], special["sep"]),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": special["unk"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }


def make_affix_processor(ids: Mapping[str, int], before: str | None, after: str | None) -> dict[str, Any]:
    """Return the post-processor of a tokenizer.json that puts the tokens `before` and `after` around a text, if given."""

    def affix(name: str | None, sequence: int) -> list[dict[str, Any]]:
        return [] if name is None else [{"SpecialToken": {"id": name, "type_id": sequence}}]

    text = [*affix(before, 0), {"Sequence": {"id": "A", "type_id": 0}}, *affix(after, 0)]
    return {
        "type": "TemplateProcessing",
        "single": text,
        "pair": [*text, {"Sequence": {"id": "B", "type_id": 1}}, *affix(after, 1)],
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (before, after) if name is not None
        },
    }


def _read_merges(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        pair = line.rstrip("\r").split(" ")
        if pair == [""] or (number == 1 and line.startswith("#version")):
            continue
        if len(pair) != 2:
            raise TokenizerError(
                f"{path}:{number}: got {line!r}, expected two tokens separated by a space; copy the file again"
            )
        merges.append(pair)
    return merges
