# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: text <-> token ids, as raw bytes or with a vocabulary from Hugging Face `tokenizers` files.

Nothing is downloaded. Every tokenizer has these properties:

- Text never becomes a special token. "<|endoftext|>" in a document is encoded as its characters; to end a document,
  append the id `end_of_text`.
- Special tokens decode to nothing. An id outside the vocabulary (models may have more rows than tokens) decodes to
  U+FFFD, as do bytes that are not UTF-8.
- A vocabulary can encode every text: one that lacks bytes, or drops spaces, is rejected, because the loss would go
  unnoticed. Changes by its normalizer are allowed (GPT-NeoX's composes accents, NFC).
- `fingerprint` is a digest of the vocabulary file's content, so it is the same with every version of `tokenizers`.
"""

import codecs
import difflib
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers as hf

from mesh_transformer.data.tokenizer_files import read_additions, token_ids
from mesh_transformer.data.vocabularies import (
    END_OF_TEXT,
    TokenizerError,
    can_split,
    find_end_of_text,
    make_byte_table,
    make_deterministic,
    make_library,
    read_gpt2,
    read_json,
    writes_leading_space,
)

_UNKNOWN = "\ufffd".encode()
_PROBE = "two  words,\n\u4e2d \U0001f600"  # must survive encoding and decoding, up to case and Unicode form
_PART = 1 << 20  # characters in one part of a long text, and in all texts that are encoded in one call
# ByteLevel's pattern always ends a word here and begins the next one, whatever the surrounding text.
_WORD_BOUNDARY = re.compile(r"[A-Za-z0-9.,;] (?=[A-Za-z])")


@runtime_checkable
class Tokenizer(Protocol):
    """Interface of all tokenizers."""

    @property
    def n_vocab(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def begin_of_text(self) -> int | None:
        """The id that the tokenizer's files add in front of a text (beginning of sequence), or None if they add none."""
        ...

    @property
    def end_of_text(self) -> int:
        """The id appended to every document."""
        ...

    @property
    def lossy(self) -> bool:
        """True if the vocabulary cannot encode every text: other characters become the unknown token or are lost."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of everything the ids depend on, 64 hexadecimal digits."""
        ...

    @property
    def leading_space(self) -> bool:
        """True if encoding adds a space before the first word, which decoding drops at the start of a text."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """Return the ids of a text. Raises TokenizerError at lone surrogates.

        With `add_special_tokens`, those that the tokenizer's files add to a text: begin_of_text, an end, both or none.
        With `parse_special`, special tokens written in the text become their ids; otherwise they are text.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text, int32, encoded in parallel; equal to `encode` of each."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids that begin a text."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of any run of ids; the bytes of consecutive runs concatenate to the bytes of all."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the complete tokenizer for storage in a checkpoint; `tokenizer_from_json` reads it."""
        ...


class StreamDecoder:
    """Decodes ids incrementally: returns only complete characters, in total the same text as `decode`.

    With `continues`, the ids follow a prompt, so a leading space is part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.leading_space and not continues

    def push(self, ids: Iterable[int]) -> str:
        """Return the characters that are complete with these ids, possibly none."""
        data = self._tokenizer.decode_bytes(ids)
        if data and self._drop_space:
            data, self._drop_space = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Return U+FFFD if the last character is incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """Tokenizer of UTF-8 bytes: ids 0 to 255 are bytes, 256 is the end of text. Needs no file."""

    n_vocab = 257
    begin_of_text = None
    end_of_text = 256
    leading_space = False
    lossy = False

    @property
    def fingerprint(self) -> str:
        return _digest(self.to_json())

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        return list(_to_utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(_to_utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return _decode(self, ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(bytes([i]) if 0 <= i < 256 else b"" if i == 256 else _UNKNOWN for i in ids)

    def to_json(self) -> dict[str, Any]:
        return {"type": "bytes"}


class FileTokenizer:
    """Tokenizer with the vocabulary of a `tokenizer.json`: byte-level BPE (like GPT-2), or with byte fallback (Llama)."""

    lossy = False

    def __init__(
        self, table: Mapping[str, Any], additions: Mapping[str, Any] | None = None, *, where: str = "tokenizer"
    ) -> None:
        """Prepare the libraries for encoding, and the table for decoding.

        `table` is the content of a tokenizer.json, `additions` what other files of its folder add (tokenizer_files.py);
        `where` begins error messages. Raises TokenizerError.
        """
        self._table = make_deterministic(table, where)
        self._additions = dict(additions or {})
        self._end_name = _name_end_of_text(self._table, self._additions, where)
        self._source = json.dumps(self._table)
        self._library = _share_library(self._source, self._end_name, where, parse_special=False)
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.n_vocab = max(vocabulary.values()) + 1
        self.end_of_text = vocabulary[self._end_name]
        self.fingerprint = _digest(self.to_json())
        self.leading_space = writes_leading_space(self._table)
        self._part = _PART if can_split(self._table) else None
        self._bytes = make_byte_table(self._table, vocabulary, self._library.get_added_tokens_decoder(), where)
        self._prefix, self._suffix = _measure_added_tokens(self._library)
        self.begin_of_text = self._prefix[0] if self._prefix else None
        if self.end_of_text in self.encode(self._end_name):
            raise TokenizerError(
                f"{where}: the text {self._end_name} would be encoded as the end of text, because the vocabulary merges "
                "it; use another vocabulary"
            )
        back = self.decode(self.encode(_PROBE))
        if unicodedata.normalize("NFKC", back).casefold() != _PROBE:
            raise TokenizerError(
                f"{where}: does not preserve text: the ids of {_PROBE!r} decode to {back!r}; use another vocabulary"
            )

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        if parse_special:
            library = _share_library(self._source, self._end_name, "tokenizer", parse_special=True)
            ids = _encode_strictly(library, [text])[0].tolist()
        else:
            ids = self.encode_batch([text])[0].tolist()
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # Long texts are encoded in parts, because `tokenizers` needs about 120 bytes of memory per character.
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _group_parts(texts, self._part):
            encoded = _encode_strictly(self._library, [part for _, part in group])
            for (index, _), part in zip(group, encoded, strict=True):
                ids[index].append(part)
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in ids]

    def decode(self, ids: Iterable[int]) -> str:
        return _decode(self, ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes.get(int(i), _UNKNOWN) for i in ids)

    def to_json(self) -> dict[str, Any]:
        return {"type": "file", "tokenizer": self._table, **self._additions}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the vocabulary only: the state of the `tokenizers` object lacks the properties of this class."""
        return FileTokenizer, (self._table, self._additions)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load a tokenizer: "bytes", a tokenizer.json, or a folder with it or with vocab.json and merges.txt.

    Of a folder, what its other files say about special tokens is used too; of a file, nothing but the file.
    Raises TokenizerError if files are missing or damaged, or the vocabulary lacks a property stated in this module.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            where, table = path / "tokenizer.json", read_json(path / "tokenizer.json")
        elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
            where, table = path, read_gpt2(path)
        else:
            raise TokenizerError(f"{path}: this folder has neither tokenizer.json nor vocab.json with merges.txt")
        table = make_deterministic(table, str(where))
        return FileTokenizer(table, read_additions(path, table), where=str(where))
    if not path.exists():
        names = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, [*names, "bytes"], n=1)
        hint = f"; did you mean {near[0] if near[0] == 'bytes' else path.parent / near[0]}?" if near else ""
        raise TokenizerError(f'{path}: no such tokenizer file or folder, and not "bytes"{hint}')
    return FileTokenizer(read_json(path), where=str(path))


def tokenizer_from_json(record: Mapping[str, Any], *, where: str = "checkpoint") -> Tokenizer:
    """Return the tokenizer stored by `to_json` in `record`; `where` begins error messages."""
    if record.get("type") == "bytes":
        return ByteTokenizer()
    if record.get("type") == "file" and isinstance(record.get("tokenizer"), dict):
        additions = {name: value for name, value in record.items() if name not in ("type", "tokenizer")}
        return FileTokenizer(record["tokenizer"], additions, where=where)
    raise TokenizerError(f"{where}: not a stored tokenizer (type {record.get('type')!r}); known: bytes, file")


@functools.lru_cache(maxsize=4)
def _share_library(source: str, end_of_text: str, where: str, *, parse_special: bool) -> hf.Tokenizer:
    """Return one shared `tokenizers` object per vocabulary, because each one that has encoded leaks 5 to 8 MB.

    Workers load or unpickle a tokenizer for every part of a dataset, and would grow by that much each time. There is one
    for each value of `parse_special`, so that threads can use both.
    """
    library = make_library(json.loads(source), where)
    library.add_special_tokens([hf.AddedToken(end_of_text, normalized=False, special=True)])
    library.encode_special_tokens = not parse_special
    return library


def _name_end_of_text(table: Mapping[str, Any], additions: Mapping[str, Any], where: str) -> str:
    name = additions.get("end_of_text") or find_end_of_text(table, token_ids(table))
    if name is None:
        raise TokenizerError(
            f"{where}: no end-of-text token; name it as eos_token in tokenizer_config.json beside it, or add one of "
            f"{', '.join(END_OF_TEXT)} to added_tokens, as special"
        )
    return name


def _measure_added_tokens(library: hf.Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor adds before and after a text."""
    encoding = library.encode("a")
    own = [i for i, added in enumerate(encoding.special_tokens_mask) if not added]
    return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]


def _encode_strictly(library: hf.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the ids of texts, int32. Raises TokenizerError at lone surrogates."""
    try:
        encoded = library.encode_batch_fast(texts, add_special_tokens=False)
    except TypeError:  # raised by `tokenizers` for lone surrogates
        for text in texts:
            _to_utf8(text)
        raise
    return [np.array(encoding.ids, np.int32) for encoding in encoded]


def _group_parts(texts: Sequence[str], size: int | None) -> Iterator[list[tuple[int, str]]]:
    """Yield groups of about _PART characters: parts of all texts in order, each with the index of its text."""
    group: list[tuple[int, str]] = []
    length = 0
    for index, text in enumerate(texts):
        for part in _split_text(text, size):
            group.append((index, part))
            length += len(part)
            if length >= _PART:
                yield group
                group, length = [], 0
    if group:
        yield group


def _split_text(text: str, size: int | None) -> Iterator[str]:
    start = 0
    while size is not None and len(text) - start > size:
        boundary = _WORD_BOUNDARY.search(text, start + size)
        if boundary is None:
            break
        yield text[start : boundary.start() + 1]
        start = boundary.start() + 1
    yield text[start:]


def _to_utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise TokenizerError(
            f"lone surrogate {code} at character {error.start} of the text: not valid Unicode"
        ) from None


def _decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    stream = StreamDecoder(tokenizer)
    return stream.push(ids) + stream.finish()


def _digest(record: Mapping[str, Any]) -> str:
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
