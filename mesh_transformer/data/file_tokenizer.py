# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizer with the vocabulary of a tokenizer.json, through the package `tokenizers`."""

import contextlib
import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers as hf

from mesh_transformer.data.stream_decoder import EACH_BYTE, decode_all
from mesh_transformer.data.token_bytes import IN_UTF8, TokenBytes, find_entry, find_missing_bytes
from mesh_transformer.data.vocabularies import (
    END_OF_TEXT,
    TokenizerError,
    can_split,
    find_end_of_text,
    find_unknown,
    make_deterministic,
    make_digest,
    make_library,
    mark_special,
    merge_additions,
    rename_tokens,
    to_utf8,
)

UNKNOWN = "\ufffd".encode()  # decoded bytes of an id outside the vocabulary
# A vocabulary loses text if it changes more than the case and Unicode form of this text.
_PROBE = "two  words,\n\u4e2d \U0001f600"
_PART = 1 << 20  # characters in a part of a long text, and in all texts of one call
# Boundary at which ByteLevel's pattern always ends a word and begins the next word, whatever the surrounding text.
_WORD_BOUNDARY = re.compile(r"[A-Za-z0-9.,;] (?=[A-Za-z])")


class FileTokenizer:
    """Tokenizer with the vocabulary of a `tokenizer.json`: BPE, Unigram, WordPiece or WordLevel."""

    def __init__(
        self, table: Mapping[str, Any], additions: Mapping[str, Any] | None = None, *, where: str = "tokenizer"
    ) -> None:
        """Prepare encoding and decoding. Raises TokenizerError.

        `table` is the content of a tokenizer.json, and `additions` come from other files of its folder (tokenizer_files.py).
        Error messages begin with `where`.
        """
        self._table = make_deterministic(table, where)
        self._additions = dict(additions or {})
        self.tokenizer_json = merge_additions(self._table, self._additions)
        library = _share_library(json.dumps(self.tokenizer_json), where, parse_special=True)
        self._vocabulary: dict[str, int] = library.get_vocab(with_added_tokens=True)
        self._prefix, self._suffix = _measure_added_tokens(library)
        end = self._name_end_of_text(library, where)
        self.n_vocab = max(self._vocabulary.values()) + 1
        added = {token["id"] for token in self.tokenizer_json["added_tokens"]}
        self.n_base_vocab = max({*self._vocabulary.values()} - added, default=self.n_vocab - 1) + 1
        self.begin_of_text = self._prefix[0] if self._prefix else None
        self.end_of_text = self._vocabulary[end]
        self.fingerprint = make_digest(_select_encoding(self.to_json()))
        self.clean_up_spaces = bool(self._additions.get("clean_up_tokenization_spaces"))
        self.utf8_errors = "replace" if find_entry(self._table.get("decoder"), "type", "ByteLevel") else EACH_BYTE
        self._part = _PART if can_split(self.tokenizer_json) else None
        self._source = json.dumps(mark_special(self.tokenizer_json, end, self.end_of_text))
        self._bytes = TokenBytes(self._table, _share_library(self._source, where, parse_special=True))
        self._library = self._make_plain_library(where)
        self._missing = find_missing_bytes(self._table)
        self.loss = self._describe_loss()
        self.lossy = self.loss is not None

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        if parse_special:
            library = _share_library(self._source, "tokenizer", parse_special=True)
            ids = _encode_strictly(library, [text])[0].tolist()
        else:
            ids = self.encode_batch([text])[0].tolist()
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Return the ids of two texts as one input of an encoder, and their token types, which identify the text of each id.

        The tokenizer's files say which special tokens are added and what the types are. Special tokens written in the texts
        become their ids. Raises TokenizerError at lone surrogates.
        """
        library = _share_library(self._source, "tokenizer", parse_special=True)
        with _explain_errors([first, second]):
            encoding = library.encode(first, second)
        return encoding.ids, encoding.type_ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # Long texts are encoded in parts, because `tokenizers` needs about 120 bytes of memory per character.
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _group_parts(texts, self._part):
            encoded = _encode_strictly(self._library, [part for _, part in group])
            for (index, _), part in zip(group, encoded, strict=True):
                ids[index].append(part)
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in ids]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        return decode_all(self, ids, skip_special_tokens=skip_special_tokens)

    def decode_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> bytes:
        skipped = self._bytes.special if skip_special_tokens else ()
        return b"".join(self._find_bytes(int(i)) for i in ids if i not in skipped)

    def decode_first(self, token: int, *, skip_special_tokens: bool = True) -> bytes | None:
        if skip_special_tokens and token in self._bytes.special:
            return None
        return self._find_bytes(int(token), first=True)

    def name_token(self, token: int | None) -> str | None:
        """Return the name of an id in the vocabulary, or None."""
        return next((name for name, i in self._vocabulary.items() if i == token), None)

    def count_lost(self, text: str, ids: np.ndarray) -> int:
        """Return the number of characters of `text` that `ids` do not represent, because the vocabulary lacks them."""
        if self._missing is not None:
            lost = {c: n for c, n in Counter(text).items() if c not in self._vocabulary} if self._missing else {}
            return sum(n for c, n in lost.items() if not self._missing.isdisjoint(c.encode()))
        unknown = find_unknown(self._table)
        if unknown is not None and unknown not in ids:
            return 0
        encoding = self._library.encode(text, add_special_tokens=False)
        known = {
            index
            for i, span in zip(encoding.ids, encoding.offsets, strict=True)
            if i != unknown
            for index in range(*span)
        }
        return sum(not character.isspace() and index not in known for index, character in enumerate(text))

    def to_json(self) -> dict[str, Any]:
        return {"type": "file", "tokenizer": self._table, **self._additions}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the vocabulary only: the state of the `tokenizers` object lacks the properties of this class."""
        return FileTokenizer, (self._table, self._additions)

    def _name_end_of_text(self, library: hf.Tokenizer, where: str) -> str:
        named = self._additions.get("end_of_text") or find_end_of_text(self.tokenizer_json, self._vocabulary)
        end = named or (library.id_to_token(self._suffix[-1]) if self._suffix else None)
        if end not in self._vocabulary:
            raise TokenizerError(
                f"{where}: this tokenizer has no end-of-text token; set eos_token in the tokenizer_config.json of its folder, or "
                f"add one of {', '.join(END_OF_TEXT)} to added_tokens with special=true"
            )
        return end

    def _make_plain_library(self, where: str) -> hf.Tokenizer:
        """Return the library that encodes special tokens as text.

        Special tokens that the vocabulary itself produces from text are renamed to names that no text contains.
        """
        library = _share_library(self._source, where, parse_special=False)
        names = {i: token.content for i, token in library.get_added_tokens_decoder().items() if token.special}
        names = {i: name for i, name in names.items() if i != find_unknown(self._table)}  # it represents any text
        encoded = _encode_strictly(library, list(names.values()))
        reached = [name for (i, name), ids in zip(names.items(), encoded, strict=True) if i in ids]
        if not reached:
            return library
        try:
            return _share_library(
                json.dumps(rename_tokens(json.loads(self._source), reached)), where, parse_special=False
            )
        except TokenizerError:
            raise TokenizerError(
                f"{where}: the text {reached[0]} would be encoded as the special token of that name, because the merges of the "
                "vocabulary produce it; use another vocabulary"
            ) from None

    def _find_bytes(self, token: int, *, first: bool = False) -> bytes:
        data = self._bytes.find(token, first=first)
        return UNKNOWN if data is None else data

    def _describe_loss(self) -> str | None:
        """Return a description of the text that this vocabulary cannot encode, or None if it encodes every text."""
        if self._missing is None:
            unknown = find_unknown(self._table)
            effect = "is dropped" if unknown is None else f"becomes {self._library.id_to_token(unknown)}"
            return f"the vocabulary has no byte tokens: text that it lacks {effect}"
        if self._missing:
            return f"the vocabulary lacks {len(self._missing)} of the {len(IN_UTF8)} byte values of UTF-8: text with them is lost"
        decoded = self.decode(self.encode(_PROBE)).removeprefix(" ")
        if unicodedata.normalize("NFKC", decoded).casefold() != _PROBE:
            return f"the vocabulary does not preserve all text: {_PROBE!r} becomes {decoded!r}"
        return None


@functools.lru_cache(maxsize=4)
def _share_library(source: str, where: str, *, parse_special: bool) -> hf.Tokenizer:
    """Return one shared `tokenizers` object per vocabulary, because each object that has encoded text leaks 5 to 8 MB.

    Workers load or unpickle a tokenizer for every part of a dataset; without sharing, every load would leak that memory.
    There is one object for each value of `parse_special`, so that threads can use both.
    """
    library = make_library(json.loads(source), where)
    library.encode_special_tokens = not parse_special
    return library


def _measure_added_tokens(library: hf.Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor adds before and after a text."""
    with _explain_errors(["a"]):
        encoding = library.encode("a")
    text_indices = [i for i, added in enumerate(encoding.special_tokens_mask) if not added]
    if not text_indices:  # the vocabulary cannot encode the text
        return encoding.ids, []
    return encoding.ids[: text_indices[0]], encoding.ids[text_indices[-1] + 1 :]


def _select_encoding(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a stored tokenizer on which the ids of training texts depend."""
    kept = {name: value for name, value in record.items() if name in ("type", "tokenizer", "end_of_text")}
    ordinary = [token for token in record.get("added_tokens", []) if not token["special"]]
    return kept | ({"added_tokens": ordinary} if ordinary else {})


def _encode_strictly(library: hf.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the ids of texts, int32. Raises TokenizerError at lone surrogates."""
    with _explain_errors(texts):
        encoded = library.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encoded]


@contextlib.contextmanager
def _explain_errors(texts: Sequence[str]) -> Iterator[None]:
    """Raise TokenizerError for the errors of `tokenizers` on encoding `texts`."""
    try:
        yield
    except TypeError:  # raised by `tokenizers` for lone surrogates
        for text in texts:
            to_utf8(text)
        raise
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"the vocabulary cannot encode a text: {error}; use another tokenizer") from None


def _group_parts(texts: Sequence[str], max_characters: int | None) -> Iterator[list[tuple[int, str]]]:
    """Yield groups of about _PART characters: parts of all texts in order, as (index of the text, part)."""
    group: list[tuple[int, str]] = []
    characters = 0
    for index, text in enumerate(texts):
        for part in _split_text(text, max_characters):
            group.append((index, part))
            characters += len(part)
            if characters >= _PART:
                yield group
                group, characters = [], 0
    if group:
        yield group


def _split_text(text: str, max_characters: int | None) -> Iterator[str]:
    start = 0
    while max_characters is not None and len(text) - start > max_characters:
        boundary = _WORD_BOUNDARY.search(text, start + max_characters)
        if boundary is None:
            break
        yield text[start : boundary.start() + 1]
        start = boundary.start() + 1
    yield text[start:]
