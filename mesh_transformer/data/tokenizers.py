# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: text <-> token ids, as raw bytes or with the vocabulary of a model in the formats of Hugging Face.

Nothing is downloaded. Ids and decoded texts equal those of transformers, because the same package, `tokenizers`, computes
them, with these differences:

- By default, text never becomes a special token: "<|endoftext|>" in a document is encoded as its characters; to end a
  document, append the id `end_of_text`. `encode(..., parse_special=True)` gives the ids of transformers.
- An id outside the vocabulary (models may have more embedding rows than tokens) decodes to U+FFFD; in transformers, to nothing.
- In a run of byte tokens, valid UTF-8 decodes to its characters and every other byte to U+FFFD; in transformers, the whole
  run decodes to U+FFFD if any part of the run is invalid.
- An ordinary added token of a byte-level vocabulary decodes to itself; in transformers, a token such as "\u00e9" decodes to
  U+FFFD.

A vocabulary that cannot encode every text (T5's, BERT's) is `lossy`, and `loss` describes its effect.
`fingerprint` is a digest of the content of the tokenizer's files, so it is the same with every version of `tokenizers`.
"""

import difflib
import json
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
        """One more than the largest id that is not an added token (such as padding): the embedding rows that a model must have."""
        ...

    @property
    def begin_of_text(self) -> int | None:
        """The id added before a text with add_special_tokens (beginning of sequence), or None if there is none."""
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
        """Description of the text that the vocabulary cannot encode, and of the effect on that text; None without loss."""
        ...

    @property
    def utf8_errors(self) -> str:
        """Name of the codecs' error handler for bytes that are not UTF-8."""
        ...

    @property
    def clean_up_spaces(self) -> bool:
        """True if decoding removes spaces before punctuation, as the tokenizer files of BERT require."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """Return the ids of a text. Raises TokenizerError at lone surrogates.

        With `add_special_tokens`, the ids include the tokens that the tokenizer's files add before and after a text. With
        `parse_special`, special tokens written in the text become their ids; otherwise they are encoded as text.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text, int32, encoded in parallel; equal to `encode` of each."""
        ...

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids, the first of which begins the text."""
        ...

    def decode_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> bytes:
        """Return the bytes of ids that do not begin a text; the bytes of consecutive ids can be concatenated."""
        ...

    def decode_first(self, token: int, *, skip_special_tokens: bool = True) -> bytes | None:
        """Return the bytes of an id that begins a text, or None if the id is skipped, so that the next id begins the text."""
        ...

    def count_lost(self, text: str, ids: np.ndarray) -> int:
        """Return the number of characters of `text` that `ids` do not represent, because the vocabulary lacks them."""
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
    """Load a tokenizer: "bytes", a tokenizer.json, or a folder with the files of a tokenizer (tokenizer_files.py).

    For a folder, the special tokens in its other files are used as well; for a file, only that file is read.

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
        raise TokenizerError(
            f'{path}: no such file or folder; give a tokenizer.json, a folder with one, or "bytes"{hint}'
        )
    return FileTokenizer(read_json(path), where=str(path))


def tokenizer_from_json(record: Mapping[str, Any], *, where: str = "checkpoint") -> Tokenizer:
    """Return the tokenizer that `to_json` stored in `record`; error messages begin with `where`."""
    if record.get("type") == "bytes":
        return ByteTokenizer()
    if record.get("type") == "file" and isinstance(record.get("tokenizer"), dict):
        additions = {name: value for name, value in record.items() if name not in ("type", "tokenizer")}
        return FileTokenizer(record["tokenizer"], additions, where=where)
    raise TokenizerError(
        f"{where}: the stored tokenizer has type {json.dumps(record.get('type'))}; supported types: bytes, file"
    )
