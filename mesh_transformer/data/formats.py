# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Texts in one file, line by line or whole, and what is wrong with those that are damaged."""

import io
import json
import tokenize
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mesh_transformer.data.compression import COMPRESSED, check_length, read_chunks, split_lines
from mesh_transformer.data.errors import DataError, DocumentError

_LINES = {".jsonl", ".ndjson", ".json"}
_REMEDIES = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "an archive of files; unpack it first"),
    **dict.fromkeys((".bz2", ".xz", ".lz4", ".br"), "compressed in a way that is not read; use .zst or .gz"),
    **dict.fromkeys((".bin", ".idx"), "a token shard; name the pair by its prefix, without .bin or .idx"),
}

Item = tuple[int | None, str | DocumentError]  # line or row, its text or what is wrong with it


def read_items(file: Path, text_key: str, max_bytes: int | None = None) -> Iterator[Item]:
    """Every item of a file; damage that ends the reading comes as the last one, a line of more bytes as a DocumentError."""
    try:
        yield from _pick_reader(file, text_key, max_bytes)()
    except DocumentError as flaw:
        yield flaw.line, flaw
    except OSError as error:
        yield None, DocumentError("unreadable file", f"cannot be read: {error.strerror or error}")


def _pick_reader(file: Path, text_key: str, longest: int | None) -> Callable[[], Iterator[Item]]:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compressed = suffixes[-1] if suffixes and suffixes[-1] in COMPRESSED else None
    kind = "".join((suffixes[:-1] if compressed else suffixes)[-1:])
    if kind in _REMEDIES:
        raise DocumentError("unreadable type", f"{kind} is {_REMEDIES[kind]}")
    if kind == ".parquet":
        if compressed:
            raise DocumentError("unreadable type", "Parquet inside an archive; decompress it first")
        return partial(_read_parquet, file, text_key)
    if kind in _LINES:
        return partial(_read_lines, read_chunks(file, compressed), text_key, longest)
    return partial(_read_text, read_chunks(file, compressed), is_python=kind == ".py")


def _read_text(chunks: Iterator[bytes], *, is_python: bool) -> Iterator[Item]:
    data = bytearray()
    for chunk in chunks:
        data += chunk
        check_length(len(data))
    text = decode_python(bytes(data)) if is_python else decode_utf8(bytes(data).removeprefix(b"\xef\xbb\xbf"))
    check_characters(text)
    yield None, text.replace("\r\n", "\n")


def _read_lines(chunks: Iterator[bytes], text_key: str, longest: int | None) -> Iterator[Item]:
    number = 0
    for number, line in enumerate(split_lines(chunks, longest), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line or line.isspace():
            continue
        try:
            if longest is not None and len(line) > longest:
                raise DocumentError("too long", f"more than {longest:,} bytes")
            item = _parse_line(line, text_key)
        except DocumentError as flaw:
            item = flaw
        yield number, item
    if not number:
        raise DocumentError("empty file", "an empty file; was it written to its end?")


def _read_parquet(file: Path, text_key: str) -> Iterator[Item]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file}: reading Parquet needs pyarrow: pip install 'mesh-transformer[parquet]'") from None
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        names = table.schema_arrow.names
        if text_key not in names:
            raise DocumentError("no text", f"no column {text_key!r}; columns here: {_list(names)} (text_key chooses one)")
        for batch in table.iter_batches(batch_size=256, columns=[text_key]):
            for value in batch.column(0):
                row += 1
                yield row, _check_value(value)
    except (pyarrow.ArrowException, OSError) as error:  # damage is either; only an error of the system has a number
        if getattr(error, "errno", None):
            raise
        detail = " ".join(str(error).split())
        raise DocumentError("broken Parquet", f"not a whole Parquet file: {detail}", row or None) from None


def _check_value(value: Any) -> str | DocumentError:
    """The text of one cell of a Parquet column."""
    try:
        return _check_text(value.as_py())
    except UnicodeDecodeError as error:
        return DocumentError("bad UTF-8", f"byte {error.start} of the text is not UTF-8")
    except DocumentError as flaw:
        return flaw


def _parse_line(line: bytes, text_key: str) -> str:
    """The text in one line of JSON."""
    source = decode_utf8(line)
    try:
        record = json.loads(source)
    except RecursionError:
        raise DocumentError("broken JSON", "JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise DocumentError("broken JSON", f"not one JSON object per line: {error.msg}, column {error.pos + 1}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DocumentError("broken JSON", f"JSON that cannot be read: {error}") from None
    if not isinstance(record, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(record), "a number or boolean")
        raise DocumentError("not an object", f"{kind} where a JSON object with {text_key!r} is wanted, one per line")
    if text_key not in record:
        raise DocumentError("no text", f"no key {text_key!r}; keys here: {_list(list(record))} (text_key chooses one)")
    return _check_text(record[text_key])


def _check_text(text: object) -> str:
    if not isinstance(text, str):
        raise DocumentError("not text", f"{'null' if text is None else type(text).__name__} where text is wanted")
    check_characters(text)
    return text


def check_characters(text: str) -> None:
    """Raises DocumentError at NUL and at a lone surrogate."""
    nul = text.find("\0")
    if nul >= 0:
        line = text.count("\n", 0, nul) + 1
        raise DocumentError("NUL", f"NUL at character {nul} (line {line} of the text): binary or damaged, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise DocumentError("lone surrogate", f"lone surrogate {code} at character {error.start}: not Unicode") from None


def decode_utf8(data: bytes) -> str:
    """Text of UTF-8; raises DocumentError with the line of what is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        hint = "UTF-16; convert it" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "binary, damaged or another encoding"
        detail = f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8: {hint}"
        raise DocumentError("bad UTF-8", detail, line if b"\n" in data else None) from None


def decode_python(data: bytes) -> str:
    """Source code in the encoding that it declares, as the interpreter would read it."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (SyntaxError, LookupError, ValueError) as error:
        why = " ".join(str(error).split())
        raise DocumentError("bad encoding", f"not Python source in UTF-8 or its declared encoding: {why}") from None


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
