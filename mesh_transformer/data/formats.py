# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Readers of file formats, which yield the texts and errors of one file, line by line or as a whole."""

import io
import json
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.data.compression import COMPRESSED, check_length, read_chunks, split_lines
from mesh_transformer.data.errors import DataError, DocumentError

JSON_TYPES = {  # names for error messages
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
Item = tuple[int | None, str | DocumentError]  # (number of the line or row, or None for the whole file; text or error)


class InputFile(NamedTuple):
    """A file to read, and the options for reading it."""

    path: Path
    compressed: str | None  # suffix in COMPRESSED, or None
    text_key: str
    max_bytes: int | None  # maximum size of a line of JSON; longer lines are errors

    def chunks(self) -> Iterator[bytes]:
        """Yield the decompressed contents of the file."""
        return read_chunks(self.path, self.compressed)


def read_items(file: Path, text_key: str, max_bytes: int | None = None) -> Iterator[Item]:
    """Yield every item of a file. An error that ends the reading is the last item; a line over `max_bytes` is an error."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compressed = suffixes[-1] if suffixes and suffixes[-1] in COMPRESSED else None
    suffix = "".join((suffixes[:-1] if compressed else suffixes)[-1:])
    try:
        if suffix in UNSUPPORTED:
            raise DocumentError("unreadable type", f"a {suffix} file is {UNSUPPORTED[suffix]}")
        reader = READERS.get(suffix, _read_text)
        yield from reader(InputFile(file, compressed, text_key, max_bytes))
    except DocumentError as error:
        yield error.line, error
    except OSError as error:
        yield None, DocumentError("unreadable file", f"cannot be read: {error.strerror or error}")


def _read_text(file: InputFile) -> Iterator[Item]:
    yield None, _clean_text(decode_utf8(_read_all(file).removeprefix(b"\xef\xbb\xbf")))


def _read_python(file: InputFile) -> Iterator[Item]:
    yield None, _clean_text(decode_python(_read_all(file)))


def _read_all(file: InputFile) -> bytes:
    data = bytearray()
    for chunk in file.chunks():
        data += chunk
        check_length(len(data))
    return bytes(data)


def _clean_text(text: str) -> str:
    check_characters(text)
    return text.replace("\r\n", "\n")


def _read_json_lines(file: InputFile) -> Iterator[Item]:
    number = 0
    for number, line in enumerate(split_lines(file.chunks(), file.max_bytes), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line or line.isspace():
            continue
        try:
            if file.max_bytes is not None and len(line) > file.max_bytes:
                raise DocumentError("too long", f"more than {file.max_bytes:,} bytes")
            item = _parse_line(line, file.text_key)
        except DocumentError as error:
            item = error
        yield number, item
    if not number:
        raise DocumentError("empty file", "the file is empty; check that the program that wrote it finished")


def _read_parquet(file: InputFile) -> Iterator[Item]:
    if file.compressed:
        raise DocumentError("unreadable type", "a compressed Parquet file cannot be read; decompress it first")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{file.path}: reading Parquet needs pyarrow: pip install 'mesh-transformer[parquet]'"
        ) from None
    text_key, row_number = file.text_key, 0
    try:
        table = pyarrow.parquet.ParquetFile(file.path, page_checksum_verification=True)
        names = table.schema_arrow.names
        if text_key not in names:
            raise DocumentError(
                "no text", f"there is no column {text_key!r}; set text_key to one of the columns: {_list_names(names)}"
            )
        for batch in table.iter_batches(batch_size=256, columns=[text_key]):
            for value in batch.column(0):
                row_number += 1
                yield row_number, _check_value(value, text_key)
    except (pyarrow.ArrowException, OSError) as error:  # damaged data raises either; only an OS error has an errno
        if getattr(error, "errno", None):
            raise
        detail = " ".join(str(error).split())
        raise DocumentError(
            "broken Parquet", f"damaged or truncated Parquet file: {detail}; copy it again", row_number or None
        ) from None


# Readers by file suffix, without .gz and .zst; a file with another suffix is one document of UTF-8 text.
# To add a format: write a function from InputFile to items, and add a row.
READERS: dict[str, Callable[[InputFile], Iterator[Item]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
    ".py": _read_python,
}

# Suffixes of files that are not text -> description with a fix, for the error message.
UNSUPPORTED = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "an archive of files; unpack it first"),
    **dict.fromkeys((".bz2", ".xz", ".lz4", ".br"), "compressed in an unsupported format; use .zst or .gz"),
    **dict.fromkeys((".bin", ".idx"), "a token shard; give the prefix of the pair, without .bin or .idx"),
}


def _check_value(value: Any, text_key: str) -> str | DocumentError:
    """Return the text of one cell of a Parquet column, or its error."""
    try:
        return _check_text(value.as_py(), text_key)
    except UnicodeDecodeError as error:
        return DocumentError("bad UTF-8", f"byte {error.start} of the text is not valid UTF-8")
    except DocumentError as error:
        return error


def _parse_line(line: bytes, text_key: str) -> str:
    """Return the text in one line of JSON."""
    source = decode_utf8(line)
    try:
        record = json.loads(source)
    except RecursionError:
        raise DocumentError("broken JSON", "the JSON is nested too deeply to be parsed; reduce the nesting") from None
    except json.JSONDecodeError as error:
        raise DocumentError(
            "broken JSON", f"invalid JSON: {error.msg}, column {error.pos + 1}; each line must be one JSON object"
        ) from None
    except ValueError as error:  # for example, an integer of thousands of digits
        raise DocumentError("broken JSON", f"the JSON cannot be parsed: {error}") from None
    if not isinstance(record, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(record), "a number or boolean")
        raise DocumentError("not an object", f"got {kind}, expected a JSON object with {text_key!r} on each line")
    if text_key not in record:
        raise DocumentError(
            "no text", f"there is no key {text_key!r}; set text_key to one of the keys: {_list_names(list(record))}"
        )
    return _check_text(record[text_key], text_key)


def _check_text(text: object, text_key: str) -> str:
    if not isinstance(text, str):
        raise DocumentError(
            "not text", f"{text_key!r} is {JSON_TYPES.get(type(text), type(text).__name__)}, expected a string"
        )
    check_characters(text)
    return text


def check_characters(text: str) -> None:
    """Raise DocumentError at a NUL or a lone surrogate."""
    nul = text.find("\0")
    if nul >= 0:
        line = text.count("\n", 0, nul) + 1
        raise DocumentError(
            "NUL", f"the text has a NUL at character {nul} (line {line}), as in binary or damaged files; remove it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise DocumentError(
            "lone surrogate", f"lone surrogate {code} at character {error.start} is not valid Unicode; remove it"
        ) from None


def decode_utf8(data: bytes) -> str:
    """Decode UTF-8. Raises DocumentError with the line of the first invalid byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = (
            "UTF-16; convert it to UTF-8"
            if is_utf16
            else "binary, damaged or in another encoding; convert or remove it"
        )
        detail = f"byte {error.start} (0x{data[error.start]:02x}) is not valid UTF-8; the file is {hint}"
        raise DocumentError("bad UTF-8", detail, line if b"\n" in data else None) from None


def decode_python(data: bytes) -> str:
    """Decode Python source code in its declared encoding (PEP 263), as the interpreter does."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (SyntaxError, LookupError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DocumentError(
            "bad encoding",
            f"cannot be decoded as Python source in UTF-8 or its declared encoding: {reason}; convert or remove it",
        ) from None


def _list_names(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
