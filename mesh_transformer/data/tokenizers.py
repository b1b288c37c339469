# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: text <-> token ids, as raw bytes or with the vocabulary of a model in the formats of Hugging Face.

Nothing is downloaded. The ids, and the texts decoded from them, are those of the package `tokenizers`, which does the
work, and so those of transformers, with these differences:

- Text never becomes a special token unless asked: "<|endoftext|>" in a document is encoded as its characters; to end a
  document, append the id `end_of_text`. `encode(..., parse_special=True)` gives the ids of transformers.
- An id outside the vocabulary (models may have more rows than tokens) decodes to U+FFFD, in transformers to nothing.
- Among tokens that are single bytes, what is UTF-8 decodes to its characters and each other byte to U+FFFD; in
  transformers, a whole run of such tokens decodes to U+FFFD if any of it is not UTF-8.
- An ordinary added token of a byte-level vocabulary decodes to itself; in transformers one such as "\u00e9" to U+FFFD.

A vocabulary that cannot write every text (T5's, BERT's) is `lossy`, and `loss` says what happens to the rest.
`fingerprint` is a digest of the files' content, so it is the same with every version of `tokenizers`.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mesh_transformer.data.file_tokenizer import UNKNOWN, FileTokenizer
from mesh_transformer.data.stream_decoder import decode_all
from mesh_transformer.data.tokenizer_files import read_folder
from mesh_transformer.data.vocabularies import TokenizerError, make_digest, read_json, to_utf8


@runtime_checkable
class Tokenizer(Protocol):
    """Interface of all tokenizers."""

    @property
    def n_vocab(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def n_base_vocab(self) -> int:
        """One more than the largest id that is not an added token, such as padding: the rows that a model must have."""
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
    def fingerprint(self) -> str:
        """Digest of everything that the ids of documents depend on, 64 hexadecimal digits."""
        ...

    @property
    def lossy(self) -> bool:
        """True if the vocabulary cannot encode every text."""
        ...

    @property
    def loss(self) -> str | None:
        """Description of the text that the vocabulary cannot encode, and what becomes of it; None if there is none."""
        ...

    @property
    def utf8_errors(self) -> str:
        """Name of the codecs' error handler for bytes that are not UTF-8."""
        ...

    @property
    def clean_up_spaces(self) -> bool:
        """True if decoding removes spaces before punctuation, as the files of BERT say."""
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

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids that begin a text."""
        ...

    def decode_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> bytes:
        """Return the bytes of any run of ids that does not begin a text; those of consecutive runs concatenate."""
        ...

    def decode_first(self, token: int, *, skip_special_tokens: bool = True) -> bytes | None:
        """Return the bytes of an id that begins a text, or None if it writes nothing, so that the next id begins it."""
        ...

    def count_lost(self, text: str, ids: np.ndarray) -> int:
        """Return the number of characters of a text that its `ids` do not contain: unknown to the vocabulary."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the complete tokenizer for storage in a checkpoint; `tokenizer_from_json` reads it."""
        ...


class ByteTokenizer:
    """Tokenizer of UTF-8 bytes: ids 0 to 255 are bytes, 256 is the end of text. Needs no file."""

    n_vocab = 257
    n_base_vocab = 257
    begin_of_text = None
    end_of_text = 256
    lossy = False
    loss = None
    utf8_errors = "replace"
    clean_up_spaces = False

    @property
    def fingerprint(self) -> str:
        return make_digest(self.to_json())

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        return list(to_utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(to_utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        return decode_all(self, ids)

    def decode_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> bytes:
        return b"".join(bytes([i]) if 0 <= i < 256 else b"" if i == 256 else UNKNOWN for i in ids)

    def decode_first(self, token: int, *, skip_special_tokens: bool = True) -> bytes | None:
        return self.decode_bytes([token])

    def count_lost(self, text: str, ids: np.ndarray) -> int:
        return 0

    def to_json(self) -> dict[str, Any]:
        return {"type": "bytes"}


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load a tokenizer: "bytes", a tokenizer.json, or a folder with the files of one (tokenizer_files.py).

    Of a folder, what its other files say about special tokens is used too; of a file, nothing but the file.

    Raises TokenizerError if files are missing or damaged, or the vocabulary cannot be used.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        files = read_folder(path)
        return FileTokenizer(files.table, files.additions, where=str(files.where))
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
