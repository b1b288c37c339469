# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Pre-tokenizers of byte-level vocabularies, by their names in tokenizer.ggml.pre of GGUF files, for tokenizer.json.

llama.cpp implements each of them (llama-vocab.cpp); the regular expressions are from the tokenizer.json of the models.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_END_SLASH = _END.replace("[\\r\\n]*", "[\\r\\n/]*")
_CASED = (  # X is replaced by the expression for contractions
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+X"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*X"
)
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _END
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _END
TEKKEN = _CASED.replace("X", "") + r"|\p{N}" + _END_SLASH
GPT4O = _CASED.replace("X", CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _END_SLASH
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


class PreTokenizer(NamedTuple):
    """Division of a text into words, within which the tokens are merged."""

    split: tuple[str, ...] = ()  # regular expressions, applied in order; empty: the regular expression of GPT-2
    digits: bool = False  # whether each digit becomes a word before GPT-2's expression is applied
    nfc: bool = False  # whether the text is normalized to Unicode's form C
    ignore_merges: bool = False  # whether a word that is in the vocabulary becomes one token without merges
    adds_bos: bool = False  # whether llama.cpp adds the BOS token if the metadata has no add_bos_token

    @property
    def table(self) -> dict[str, Any]:
        """The "pre_tokenizer" of a tokenizer.json."""
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=not self.split)
        steps = [
            dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False) for pattern in self.split
        ]
        if self.digits:
            steps = [dict(type="Digits", individual_digits=True)]
        return {"type": "Sequence", "pretokenizers": [*steps, level]} if steps else level


GPT2_LIKE, DIGITS = PreTokenizer(), PreTokenizer(digits=True)
# If several names have equal values, the first of these names is written.
PRE_TOKENIZERS = {
    "gpt-2": GPT2_LIKE, "phi-2": GPT2_LIKE, "mpt": GPT2_LIKE, "jais": GPT2_LIKE, "exaone4": GPT2_LIKE,
    "olmo": PreTokenizer(nfc=True),
    "smollm": DIGITS, "starcoder": DIGITS, "refact": DIGITS, "codeshell": DIGITS, "minerva-7b": DIGITS,
    "command-r": PreTokenizer(digits=True, nfc=True),
    "llama-bpe": PreTokenizer((LLAMA3,), ignore_merges=True, adds_bos=True),
    "llama3": PreTokenizer((LLAMA3,), ignore_merges=True, adds_bos=True),
    "llama-v3": PreTokenizer((LLAMA3,), ignore_merges=True, adds_bos=True),
    "falcon3": PreTokenizer((LLAMA3,), ignore_merges=True, adds_bos=True),
    "dbrx": PreTokenizer((LLAMA3,)), "smaug-bpe": PreTokenizer((LLAMA3,)),
    "qwen2": PreTokenizer((QWEN2,), nfc=True), "deepseek-r1-qwen": PreTokenizer((QWEN2,), nfc=True),
    "stablelm2": PreTokenizer((QWEN2,)),
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True),
    "gpt-4o": PreTokenizer((GPT4O,)), "llama4": PreTokenizer((GPT4O,)), "kanana2": PreTokenizer((GPT4O,)),
    "deepseek-v3": PreTokenizer(DEEPSEEK3),
}  # fmt: skip


def name_pre_tokenizer(tokenizer: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json, or None if llama.cpp has no equivalent.

    Steps and `ignore_merges` must be equal. A name with equal normalization is preferred, but not required, because
    llama.cpp does not normalize texts.
    """
    steps = _steps(tokenizer.get("pre_tokenizer"))
    ignores = bool(tokenizer["model"].get("ignore_merges"))
    has_nfc = (tokenizer.get("normalizer") or {}).get("type") == "NFC"
    equal = [
        (each.nfc == has_nfc, name)
        for name, each in PRE_TOKENIZERS.items()
        if _steps(each.table) == steps and each.ignore_merges == ignores
    ]
    exact = [name for same, name in equal if same]
    return next(iter([*exact, *(name for _, name in equal)]), None)


def _steps(table: Any) -> list[str]:
    """Return the steps of a pre-tokenizer as JSON, without options that do not change the words."""
    parts = table["pretokenizers"] if table and table["type"] == "Sequence" else [table or {}]
    defaults = {"invert": False, "add_prefix_space": False, "use_regex": True}
    relevant = [{k: v for k, v in part.items() if k != "trim_offsets" and defaults.get(k) is not v} for part in parts]
    return [json.dumps(part, sort_keys=True) for part in relevant]
