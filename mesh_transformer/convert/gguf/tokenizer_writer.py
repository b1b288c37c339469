# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint's tokenizer, special tokens and chat template as metadata of a GGUF file; the inverse of tokenizer.py."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType

from mesh_transformer.convert.gguf.pre_tokenizers import name_pre_tokenizer
from mesh_transformer.convert.gguf.tokenizer import END_OF_TURN, ENDED_BY_DEFAULT, derive_merges
from mesh_transformer.convert.gguf.unigram import write_unigram, write_wordpiece
from mesh_transformer.data.file_tokenizer import FileTokenizer
from mesh_transformer.data.token_bytes import make_byte_alphabet
from mesh_transformer.data.tokenizer_files import token_ids
from mesh_transformer.data.tokenizers import tokenizer_from_json
from mesh_transformer.data.vocabularies import END_OF_TEXT
from mesh_transformer.storage.errors import CheckpointError

PREFIX = "tokenizer.ggml"


def write_tokenizer(meta: Mapping[str, Any], n_vocab: int) -> dict[str, Any]:
    """Return GGUF metadata for the tokenizer, special tokens and chat template in a checkpoint's metadata `meta`.

    `n_vocab` is the number of token embeddings; an embedding without a token gets a placeholder token. Raises CheckpointError if no
    tokenizer of llama.cpp gives the same IDs.
    """
    record = meta.get("tokenizer") or {}
    if not record:
        return {f"{PREFIX}.model": "no_vocab"}
    tokenizer = tokenizer_from_json(record)
    values = _write_vocabulary(tokenizer.tokenizer_json) if isinstance(tokenizer, FileTokenizer) else _write_bytes()
    tokens, types = values[f"{PREFIX}.tokens"], values[f"{PREFIX}.token_type"]
    for i in range(len(tokens), n_vocab):
        tokens.append(f"[PAD{i}]")
        types.append(int(TokenType.UNUSED))
    if f"{PREFIX}.scores" in values:
        values[f"{PREFIX}.scores"] += [0.0] * (n_vocab - len(values[f"{PREFIX}.scores"]))
    values |= _write_special(meta, tokenizer.end_of_text, n_vocab)
    if tokenizer.begin_of_text is not None:
        values[f"{PREFIX}.bos_token_id"] = tokenizer.begin_of_text
    values[f"{PREFIX}.add_bos_token"] = tokenizer.begin_of_text is not None
    after = tokenizer.encode("", add_special_tokens=True)[values[f"{PREFIX}.add_bos_token"] :]
    if after or values[f"{PREFIX}.model"] in ENDED_BY_DEFAULT:
        values[f"{PREFIX}.add_eos_token"] = bool(after)
    if template := _find_template(meta.get("carried") or {}):
        values["tokenizer.chat_template"] = template
    return values


def _write_special(meta: Mapping[str, Any], end_of_text: int, n_vocab: int) -> dict[str, int]:
    """Return the IDs of special tokens; if several tokens end a text, the second one is the end-of-turn token."""
    carried = meta.get("carried") or {}
    ids = dict(meta.get("special_ids") or {})
    ids |= {key: value for key, value in json.loads(carried.get("generation_config.json", "{}")).items() if key in ids}
    ends = ids.get("eos_token_id", end_of_text)
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    entries = {f"{PREFIX}.eos_token_id": ends[0], END_OF_TURN: next(iter(ends[1:]), None)}
    entries |= {
        f"{PREFIX}.bos_token_id": ids.get("bos_token_id"),
        f"{PREFIX}.padding_token_id": ids.get("pad_token_id"),
    }
    return {key: value for key, value in entries.items() if isinstance(value, int) and 0 <= value < n_vocab}


def _find_template(carried: Mapping[str, str]) -> str | None:
    """Return the chat template; of several named templates, the one named "default"."""
    if text := carried.get("chat_template.jinja"):
        return text
    template = json.loads(carried.get("tokenizer_config.json", "{}")).get("chat_template")
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template


def _write_bytes() -> dict[str, Any]:
    """Return the tokenizer of UTF-8 bytes as a byte-level BPE.

    llama.cpp requires merges. The only merge here does not form a token of the vocabulary, so it does not change the IDs.
    """
    alphabet = make_byte_alphabet()
    characters = sorted(alphabet, key=alphabet.__getitem__)
    return {
        f"{PREFIX}.model": "gpt2",
        f"{PREFIX}.pre": "gpt-2",
        f"{PREFIX}.tokens": [*characters, END_OF_TEXT[0]],
        f"{PREFIX}.token_type": [*[int(TokenType.NORMAL)] * 256, int(TokenType.CONTROL)],
        f"{PREFIX}.merges": [f"{characters[0]} {characters[1]}"],
    }


def _write_vocabulary(table: Mapping[str, Any]) -> dict[str, Any]:
    model = table["model"]
    kind = model.get("type", "BPE")
    if kind not in ("BPE", "Unigram", "WordPiece"):
        raise CheckpointError(
            f"a tokenizer with the model type {kind!r} cannot be written as GGUF; supported: 'BPE', 'Unigram', 'WordPiece'; "
            "export the model with --format huggingface"
        )
    tokens, types = _list_tokens(table)
    values: dict[str, Any] = {f"{PREFIX}.tokens": tokens, f"{PREFIX}.token_type": types}
    if kind == "WordPiece":
        return values | write_wordpiece(table, tokens, types)
    if kind == "Unigram":
        scores = dict(enumerate(score for _, score in model["vocab"]))
        return values | write_unigram(table) | {f"{PREFIX}.scores": [scores.get(i, 0.0) for i in range(len(tokens))]}
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    if not model.get("byte_fallback"):
        name = name_pre_tokenizer(table)
        if name is None:
            raise CheckpointError(
                "llama.cpp has no pre-tokenizer that is equal to the tokenizer's pre_tokenizer, "
                f"{json.dumps(table.get('pre_tokenizer'))[:300]}; export the model with --format huggingface"
            )
        values |= {f"{PREFIX}.model": "gpt2", f"{PREFIX}.pre": name}
        return values | {f"{PREFIX}.merges": [" ".join(merge) for merge in merges]}
    steps = json.dumps([table.get("normalizer"), table.get("pre_tokenizer")])
    adds_prefix = any(
        text in steps for text in ('"Prepend"', '"prepend_scheme": "always"', '"prepend_scheme": "first"')
    )
    scores = _score_tokens(tokens, types, merges, model["vocab"])
    return values | {f"{PREFIX}.model": "llama", f"{PREFIX}.scores": scores, f"{PREFIX}.add_space_prefix": adds_prefix}


def _list_tokens(table: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Return the tokens in the order of their IDs, and the type of each."""
    model = table["model"]
    added = {token["id"]: token for token in table.get("added_tokens") or []}
    by_id = {i: token for token, i in token_ids(table).items()} | {i: token["content"] for i, token in added.items()}
    unknown = model.get("unk_token") if model.get("byte_fallback") else None
    if model.get("unk_id") is not None:
        unknown = by_id[model["unk_id"]]
    tokens, types = [], []
    for i in range(max(by_id) + 1):
        token = by_id.get(i, f"[PAD{i}]")
        kind = TokenType.NORMAL
        if i not in by_id:
            kind = TokenType.UNUSED
        elif token == unknown:
            kind = TokenType.UNKNOWN
        elif i in added:
            kind = TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            kind = TokenType.BYTE
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _score_tokens(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]], vocabulary: Mapping[str, int]
) -> list[float]:
    """Return scores for which SentencePiece merges in the order of `merges`. Raise CheckpointError if none exist."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    normal = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL]
    given, derived = ({tuple(pair) for pair in pairs} for pairs in (merges, derive_merges(normal, vocabulary, scores)))
    if given != derived:
        raise CheckpointError(
            f"{len(given ^ derived)} merges of this tokenizer are not those that SentencePiece makes from the vocabulary, "
            f"for example {' + '.join(next(iter(given ^ derived)))}; llama.cpp would encode texts differently; "
            "export the model with --format huggingface"
        )
    return scores
