# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Source files of a component, grouped into parts, and the documents in them; damage is counted with file and line.

To add a kind of source, write a function from a file to its texts and add it to KINDS.
"""

import fnmatch
import glob
import io
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mesh_transformer.corpus.markup import INFO_MARK, TO_TEXT, html_to_text, install_hint, mail_to_text
from mesh_transformer.corpus.parts import digest_file
from mesh_transformer.corpus.recipe import ComponentConfig, Recipe
from mesh_transformer.data.compression import ChunkStream, check_length, read_chunks, split_lines
from mesh_transformer.data.errors import DataError, Document, DocumentError, SkippedDocuments
from mesh_transformer.data.formats import check_characters, decode_python, decode_utf8, read_items
from mesh_transformer.data.readers import find_files

MB = 1_000_000
_COMPRESSED = {".gz": ".gz", ".dz": ".gz", ".zst": ".zst"}  # .dz: dictzip, which is gzip
_LINES = (".jsonl", ".ndjson", ".json")

# (number of the line, row, message or page, or None for the whole file; its text or error)
Item = tuple[int | None, str | DocumentError]


class SourceFile(NamedTuple):
    """State of a file at the start of the build."""

    path: str
    size: int
    changed: int  # modification time in ns; -1: a broken link


class Part(NamedTuple):
    """Files of one component that are processed together."""

    component: str
    files: tuple[SourceFile, ...]


class ReadStats:
    """Skipped documents, decoded files and file digests of one part."""

    def __init__(self) -> None:
        self.bad = SkippedDocuments()
        self.decoded: Counter[str] = Counter()  # encoding -> number of files decoded from it
        self.digests: dict[str, str] = {}


def find_parts(recipe: Recipe) -> tuple[list[Part], list[str]]:
    """Return the parts of all components in the order of the recipe, and the optional components without files.

    Raises DataError for a component without files, and for a file in two components.
    """
    parts: list[Part] = []
    missing: list[str] = []
    owners: dict[str, str] = {}
    for name, component in recipe.components.items():
        files = _find_files(name, component)
        if not files:
            missing.append(name)
        for file in files:
            if file.path in owners:
                raise DataError(
                    f"{file.path} is in the components {owners[file.path]} and {name}; add it to `exclude` of one of them"
                )
            owners[file.path] = name
        parts += [Part(name, tuple(group)) for group in _group(files, recipe.corpus.part_mb * MB)]
    if not parts:
        raise DataError(
            f"no files match the paths of any component ({', '.join(missing)}); correct components.*.paths, or download the "
            "files from the sources in components.*.origin"
        )
    return parts, missing


def _find_files(name: str, component: ComponentConfig) -> list[SourceFile]:
    files: dict[str, SourceFile] = {}
    for pattern in component.paths:
        for path in sorted(_expand(name, component, pattern)):
            real = os.path.realpath(path)  # a file that several links point to counts once
            if real not in files and not any(fnmatch.fnmatch(path, excluded) for excluded in component.exclude):
                if os.path.exists(path):
                    status = os.stat(path)
                    files[real] = SourceFile(path, status.st_size, status.st_mtime_ns)
                else:
                    files[real] = SourceFile(path, 0, -1)
    if not files and not component.optional:
        raise DataError(
            f"component {name}: no files match {', '.join(component.paths)}{_origin(component)}; correct "
            f"components.{name}.paths, or set components.{name}.optional = true"
        )
    return list(files.values())


def _expand(name: str, component: ComponentConfig, pattern: str) -> list[str]:
    if glob.has_magic(pattern):
        return [path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if not os.path.isdir(path)]
    try:
        return [str(path) for path in find_files(pattern)]
    except DataError as error:
        if component.optional:
            return []
        raise DataError(f"component {name}: {error}{_origin(component)}") from None


def _origin(component: ComponentConfig) -> str:
    return f"; origin: {component.origin}" if component.origin else ""


def _group(files: list[SourceFile], max_bytes: int) -> Iterator[list[SourceFile]]:
    group: list[SourceFile] = []
    n_bytes = 0
    for file in files:
        if group and n_bytes + file.size > max_bytes:
            yield group
            group, n_bytes = [], 0
        group.append(file)
        n_bytes += file.size
    if group:
        yield group


def read_part(part: Part, recipe: Recipe, stats: ReadStats) -> Iterator[Document]:
    """Yield the documents of a part, named by file and number; record skipped documents and file digests in `stats`.

    Raises DataError for a file that changed during the build, and for damage if corpus.on_bad_document = "error".
    """
    component = recipe.components[part.component]
    limit = recipe.corpus.max_document_mb * MB
    for file in part.files:
        for number, text in _read_source(file, component, limit, stats):
            name = file.path if number is None else f"{file.path}:{number}"
            if isinstance(text, DocumentError):
                if recipe.corpus.on_bad_document == "error":
                    raise DataError(
                        f"component {part.component}: {name}: {text.detail}; correct or exclude the file, or set "
                        'corpus.on_bad_document = "skip"'
                    )
                stats.bad.add(text.kind, f"{name}: {text.detail}")
            elif text.strip():
                yield Document(text, name)
            else:
                stats.bad.add("empty text", f"{name}: empty text")


def _read_source(file: SourceFile, component: ComponentConfig, limit: int, stats: ReadStats) -> Iterator[Item]:
    """Yield the texts and errors of a file; raise DataError if the file changed since the build began."""
    if file.changed < 0:
        yield None, DocumentError("broken link", "broken link; restore its target or exclude it")
        return
    _check_unchanged(file)
    try:
        stats.digests[file.path] = digest_file(file.path)
    except OSError as error:
        yield None, _unreadable(error)
        return
    if damage := _find_damage(Path(file.path)):
        yield None, damage
        return
    yield from _read_file(Path(file.path), component, limit, stats)
    _check_unchanged(file)


def _find_damage(path: Path) -> DocumentError | None:
    """Return the error of a damaged archive. The archive is read in full first, because its checksum is at the end.

    A truncated archive is not an error here: the documents before the end are intact.
    """
    if suffix := _COMPRESSED.get(path.suffix.lower()):
        try:
            for _ in read_chunks(path, suffix):
                pass
        except DocumentError as error:
            if error.kind == "damaged archive":
                return DocumentError(error.kind, f"{error.detail}; the whole file is skipped")
        except OSError as error:
            return _unreadable(error)
    return None


def _unreadable(error: OSError) -> DocumentError:
    return DocumentError(
        "unreadable file", f"cannot be read: {error.strerror or error}; check its permissions or exclude it"
    )


def _check_unchanged(file: SourceFile) -> None:
    try:
        status = os.stat(file.path)
    except OSError as error:
        raise DataError(
            f"{file.path}: removed during the build ({error.strerror}); restore it and build again"
        ) from None
    if (status.st_size, status.st_mtime_ns) != (file.size, file.changed):
        raise DataError(
            f"{file.path}: changed during the build ({file.size:,} bytes at the start, {status.st_size:,} now); build again"
        )


def _read_file(file: Path, component: ComponentConfig, limit: int, stats: ReadStats) -> Iterator[Item]:
    try:
        for number, text in KINDS[component.kind](file, component, limit, stats):
            yield (
                number,
                _too_long(f"{len(text):,} characters") if isinstance(text, str) and len(text) > limit else text,
            )
    except DocumentError as error:  # damage that makes the rest of the file unreadable
        yield error.line, error
    except OSError as error:
        yield None, _unreadable(error)


def _too_long(length: str) -> DocumentError:
    return DocumentError(
        "too long",
        f"{length} in one document: more than corpus.max_document_mb; split the document, or raise corpus.max_document_mb",
    )


def _chunks(file: Path) -> Iterator[bytes]:
    return read_chunks(file, _COMPRESSED.get(file.suffix.lower()))


def _read_whole(file: Path, component: ComponentConfig, limit: int, stats: ReadStats) -> str:
    chunks: list[bytes] = []
    size = 0
    for chunk in _chunks(file):
        chunks.append(chunk)
        size += len(chunk)
        check_length(size)
        if size > limit and not component.chunk_kb:  # with chunk_kb, the file is several documents
            raise _too_long(f"more than {limit:,} bytes")
    data = b"".join(chunks)
    del chunks  # so that at most two copies of a large file are in memory
    if component.kind == "info":  # markers of images and indexes in Info files begin with a NUL byte
        data = INFO_MARK.sub(b"", data)
    if b"\0" in data[:8192]:
        raise DocumentError("binary", "contains NUL bytes: a binary file, not text; exclude it")
    text = _decode(data, file, component, stats)
    del data
    check_characters(text)
    return text.replace("\r\n", "\n")


def _decode(data: bytes, file: Path, component: ComponentConfig, stats: ReadStats) -> str:
    try:
        if component.kind == "code" and file.suffix == ".py":
            return decode_python(data)
        return decode_utf8(data.removeprefix(b"\xef\xbb\xbf"))
    except DocumentError:
        if not component.encoding:
            raise
    try:
        text = data.decode(component.encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise DocumentError(
            "bad encoding", f"neither UTF-8 nor {component.encoding} ({error}); correct the component's `encoding`"
        ) from None
    stats.decoded[component.encoding] += 1
    return text


def _read_text(file: Path, component: ComponentConfig, limit: int, stats: ReadStats) -> Iterator[Item]:
    yield from _chunk(_read_whole(file, component, limit, stats), component)


def _chunk(text: str, component: ComponentConfig) -> Iterator[Item]:
    size = component.chunk_kb * 1000
    if size and len(text) > size:
        yield from enumerate(_split(text, size), 1)
    else:
        yield None, text


def _split(text: str, size: int) -> Iterator[str]:
    """Split a text into chunks of at most `size` characters, preferably at an empty line, else at the end of a line."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            ends = (text.rfind(mark, start, end) + len(mark) for mark in ("\n\n", "\n"))
            end = next((offset for offset in ends if offset > start + size // 2), end)
        yield text[start:end]
        start = end


def _read_markup(file: Path, component: ComponentConfig, limit: int, stats: ReadStats) -> Iterator[Item]:
    yield from _chunk(TO_TEXT[component.kind](_read_whole(file, component, limit, stats)), component)


def _read_records(file: Path, component: ComponentConfig, limit: int, stats: ReadStats) -> Iterator[Item]:
    suffixes = {suffix.lower() for suffix in file.suffixes[-2:]}
    if not suffixes & ({".parquet"} if component.kind == "parquet" else set(_LINES)):
        raise DocumentError(
            "unreadable type",
            f"unexpected file extension {''.join(file.suffixes[-2:])!r} for kind {component.kind}; choose another kind, or "
            "exclude the file",
        )
    for number, item in read_items(file, component.text_key, limit):
        yield number, _too_long(item.detail) if isinstance(item, DocumentError) and item.kind == "too long" else item


def _read_mbox(file: Path, component: ComponentConfig, limit: int, stats: ReadStats) -> Iterator[Item]:
    """Yield the messages of a mailbox, each after a line "From ..."; a file without such lines is one message."""
    message: list[bytes] = []
    number, size, blank = 0, 0, True
    for line in split_lines(_chunks(file), limit):
        if blank and line.startswith(b"From "):
            if message:
                number += 1
                yield number, _parse_mail(message, size, limit)
            message, size = [], 0
        else:
            size += len(line) + 1
            if size <= limit:
                message.append(line.removeprefix(b">") if line.startswith(b">From ") else line)
        blank = not line.strip()
    if message:
        yield number + 1, _parse_mail(message, size, limit)


def _parse_mail(message: list[bytes], size: int, limit: int) -> str | DocumentError:
    try:
        if size > limit:
            raise _too_long(f"more than {limit:,} bytes")
        text = mail_to_text(b"\n".join(message))
        check_characters(text)
        return text
    except DocumentError as error:
        return error


def _read_warc(file: Path, component: ComponentConfig, limit: int, stats: ReadStats) -> Iterator[Item]:
    """Yield the HTML pages among the responses of a web archive."""
    try:
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError:
        raise install_hint("warcio and resiliparse") from None
    number = 0
    try:
        for number, record in enumerate(ArchiveIterator(io.BufferedReader(ChunkStream(_chunks(file)))), 1):
            headers = record.http_headers
            if record.rec_type != "response" or headers is None or "html" not in (headers["Content-Type"] or ""):
                continue
            body = record.content_stream().read(limit + 1)
            if len(body) > limit:
                yield number, _too_long(f"more than {limit:,} bytes")
            elif record.raw_stream.limit > 0:
                yield (
                    number,
                    DocumentError(
                        "truncated page", f"the last {record.raw_stream.limit:,} bytes of the page are missing"
                    ),
                )
            else:
                yield number, html_to_text(bytes_to_str(body, detect_encoding(body) or "utf-8")).replace("\0", "")
    except (ArchiveLoadFailed, zlib.error) as error:
        raise DocumentError(
            "broken WARC", f"invalid WARC data ({error}); the rest of the file is skipped", number or None
        ) from None


Reader = Callable[[Path, ComponentConfig, int, ReadStats], Iterator[Item]]
KINDS: dict[str, Reader] = {
    "text": _read_text,
    "code": _read_text,
    "jsonl": _read_records,
    "parquet": _read_records,
    "warc": _read_warc,
    "mbox": _read_mbox,
    "latex": _read_markup,
    "html": _read_markup,
    "man": _read_markup,
    "rst": _read_markup,
    "info": _read_markup,
}
