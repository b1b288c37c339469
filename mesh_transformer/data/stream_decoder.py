# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Decodes token ids to text incrementally."""

import codecs
from collections.abc import Iterable
from typing import Protocol

EACH_BYTE = "replace each byte"  # name of the error handler below: U+FFFD for each invalid byte
# Replacements (old, new) of transformers' clean_up_tokenization, in order.
_REPLACEMENTS = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class DecodesTokens(Protocol):
    """Interface of tokenizers that `StreamDecoder` uses."""

    @property
    def utf8_errors(self) -> str:
        """Name of the error handler for bytes that are not UTF-8."""
        ...

    @property
    def clean_up_spaces(self) -> bool:
        """True if decoding removes spaces before punctuation, as the tokenizer files of BERT require."""
        ...

    def decode_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> bytes:
        """Return the bytes of ids that do not begin a text; the bytes of consecutive ids can be concatenated."""
        ...

    def decode_first(self, token: int, *, skip_special_tokens: bool = True) -> bytes | None:
        """Return the bytes of an id that begins a text, or None if the id is skipped, so that the next id begins the text."""
        ...


class StreamDecoder:
    """Decodes ids incrementally to complete characters; the joined texts of all calls equal the text of `decode`.

    With `continues`, the ids follow a prompt, so a leading space is kept.
    """

    def __init__(self, tokenizer: DecodesTokens, *, continues: bool = False, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors=tokenizer.utf8_errors)
        self._starts_text = not continues
        self._clean_up = SpaceCleanUp() if tokenizer.clean_up_spaces else None

    def push(self, ids: Iterable[int]) -> str:
        """Return the characters that `ids` complete, possibly none."""
        rest, data = iter(ids), b""
        while self._starts_text and (token := next(rest, None)) is not None:
            first = self._tokenizer.decode_first(token, skip_special_tokens=self._skip_special_tokens)
            self._starts_text, data = first is None, first or b""
        data += self._tokenizer.decode_bytes(rest, skip_special_tokens=self._skip_special_tokens)
        text = self._decoder.decode(data)
        return text if self._clean_up is None else self._clean_up.push(text)

    def finish(self) -> str:
        """Return the remaining text: U+FFFD for an incomplete character, and text retained for `clean_up_spaces`."""
        text = self._decoder.decode(b"", final=True)
        return text if self._clean_up is None else self._clean_up.push(text) + self._clean_up.finish()


def decode_all(tokenizer: DecodesTokens, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
    """Return the text of ids, the first of which begins the text."""
    stream = StreamDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
    return stream.push(ids) + stream.finish()


class SpaceCleanUp:
    """Incremental `clean_up_spaces`: the joined texts of all calls equal the text of transformers."""

    def __init__(self) -> None:
        self._pending = ""

    def push(self, text: str) -> str:
        """Return the text that no later text can change."""
        self._pending += text
        cut = self._find_cut()
        done, self._pending = self._pending[:cut], self._pending[cut:]
        return clean_up_spaces(done)

    def finish(self) -> str:
        """Return the remaining text."""
        done, self._pending = self._pending, ""
        return clean_up_spaces(done)

    def _find_cut(self) -> int:
        """Return the index of the last space before a word that no replacement can span, or 0."""
        pending = self._pending
        for cut in range(len(pending) - 3, 0, -1):
            separate = pending[cut] == " " and pending[cut - 1] != " " and pending[cut : cut + 3] != " ' "
            if separate and not pending[:cut].endswith((" '", " n", " n'")):
                return cut
        return 0


def clean_up_spaces(text: str) -> str:
    """Return a text without the spaces that transformers' clean_up_tokenization removes."""
    for old, new in _REPLACEMENTS:
        text = text.replace(old, new)
    return text


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)
