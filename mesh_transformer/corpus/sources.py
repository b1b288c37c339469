# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Files of a component, cut into parts, and the documents in them; damage is counted with file and line.

A new kind of source is a function from a file to its texts, and a row in KINDS.
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
from mesh_transformer.data.errors import SkippedDocuments, DataError, Document, DocumentError
from mesh_transformer.data.formats import check_characters, decode_python, decode_utf8, read_items
from mesh_transformer.data.readers import find_files

MB = 1_000_000
_COMPRESSED = {".gz": ".gz", ".dz": ".gz", ".zst": ".zst"}  # .dz: dictzip, which is gzip
_LINES = (".jsonl", ".ndjson", ".json")

Item = tuple[int | None, str | DocumentError]  # line, row or number of a message or page; its text or what is wrong with it


class SourceFile(NamedTuple):
    """A file as it was when the build began."""

    path: str
    size: int
    changed: int  # ns; -1 of a link that leads nowhere


class Part(NamedTuple):
    """Files of one component that are worked on together."""

    component: str
    files: tuple[SourceFile, ...]


class Reading:
    """What one part's reading came to, besides its documents."""

    def __init__(self) -> None:
        self.bad = SkippedDocuments()
        self.decoded: Counter[str] = Counter()  # files that were in another encoding
        self.digests: dict[str, str] = {}


def find_parts(recipe: Recipe) -> tuple[list[Part], list[str]]:
    """Parts of all components in the order of the recipe, and names of optional components without files.

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
                    f"{file.path} is in components {owners[file.path]} and {name}; exclude it from one of them"
                )
            owners[file.path] = name
        parts += [Part(name, tuple(group)) for group in _group(files, recipe.corpus.part_mb * MB)]
    if not parts:
        raise DataError("no component has any file; see origin of each for where to get it")
    return parts, missing


def _find_files(name: str, component: ComponentConfig) -> list[SourceFile]:
    found: dict[str, SourceFile] = {}
    for pattern in component.paths:
        for path in sorted(_expand(name, component, pattern)):
            real = os.path.realpath(path)  # a file that is there twice by links is one file
            if real not in found and not any(fnmatch.fnmatch(path, one) for one in component.exclude):
                if os.path.exists(path):
                    status = os.stat(path)
                    found[real] = SourceFile(path, status.st_size, status.st_mtime_ns)
                else:
                    found[real] = SourceFile(path, 0, -1)
    if not found and not component.optional:
        where = f"; where to get it: {component.origin}" if component.origin else ""
        raise DataError(f"component {name}: no file in {', '.join(component.paths)}{where}; or set its optional = true")
    return list(found.values())


def _expand(name: str, component: ComponentConfig, pattern: str) -> list[str]:
    if glob.has_magic(pattern):
        return [path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if not os.path.isdir(path)]
    try:
        return [str(path) for path in find_files(pattern)]
    except DataError as error:
        if component.optional:
            return []
        where = f"; where to get it: {component.origin}" if component.origin else ""
        raise DataError(f"component {name}: {error}{where}") from None


def _group(files: list[SourceFile], size: int) -> Iterator[list[SourceFile]]:
    group: list[SourceFile] = []
    total = 0
    for file in files:
        if group and total + file.size > size:
            yield group
            group, total = [], 0
        group.append(file)
        total += file.size
    if group:
        yield group


def read_part(part: Part, recipe: Recipe, reading: Reading) -> Iterator[Document]:
    """Documents of a part, named by file and place; `reading` gets what was left out, and digests of the files.

    Raises DataError for a file that is no longer as it was, and at damage if the recipe wants that.
    """
    component = recipe.components[part.component]
    limit = recipe.corpus.max_document_mb * MB
    for file in part.files:
        for place, text in _read_source(file, component, limit, reading):
            name = file.path if place is None else f"{file.path}:{place}"
            if isinstance(text, DocumentError):
                if recipe.corpus.on_bad_document == "error":
                    raise DataError(f"component {part.component}: {name}: {text.detail}")
                reading.bad.add(text.kind, f"{name}: {text.detail}")
            elif text.strip():
                yield Document(text, name)
            else:
                reading.bad.add("empty text", f"{name}: empty text")


def _read_source(file: SourceFile, component: ComponentConfig, limit: int, reading: Reading) -> Iterator[Item]:
    """Texts and damage of a file that is as it was when the build began."""
    if file.changed < 0:
        yield None, DocumentError("broken link", "a link that leads nowhere; exclude it")
        return
    _check_unchanged(file)
    try:
        reading.digests[file.path] = digest_file(file.path)
    except OSError as error:
        yield None, _unreadable(error)
        return
    if damage := _find_damage(Path(file.path)):
        yield None, damage
        return
    yield from _read_file(Path(file.path), component, limit, reading)
    _check_unchanged(file)


def _find_damage(path: Path) -> DocumentError | None:
    """What is wrong inside an archive, for gzip's check stands at its end; a truncated one is right as far as it goes."""
    if suffix := _COMPRESSED.get(path.suffix.lower()):
        try:
            for _ in read_chunks(path, suffix):
                pass
        except DocumentError as flaw:
            if flaw.kind == "damaged archive":
                return DocumentError(flaw.kind, f"{flaw.detail}; nothing of it is read")
        except OSError as error:
            return _unreadable(error)
    return None


def _unreadable(error: OSError) -> DocumentError:
    return DocumentError("unreadable file", f"cannot be read: {error.strerror or error}")


def _check_unchanged(file: SourceFile) -> None:
    try:
        status = os.stat(file.path)
    except OSError as error:
        raise DataError(f"{file.path}: was there when the build began: {error.strerror}; put it back") from None
    if (status.st_size, status.st_mtime_ns) != (file.size, file.changed):
        raise DataError(f"{file.path}: has changed since the build began; build again")


def _read_file(file: Path, component: ComponentConfig, limit: int, reading: Reading) -> Iterator[Item]:
    try:
        for place, text in KINDS[component.kind](file, component, limit, reading):
            yield place, _too_long(f"{len(text):,} characters") if isinstance(text, str) and len(text) > limit else text
    except DocumentError as flaw:  # damage that ends the file
        yield flaw.line, flaw
    except OSError as error:
        yield None, _unreadable(error)


def _too_long(what: str) -> DocumentError:
    return DocumentError("too long", f"{what} in one document: more than corpus.max_document_mb; cut it up, or raise that")


def _chunks(file: Path) -> Iterator[bytes]:
    return read_chunks(file, _COMPRESSED.get(file.suffix.lower()))


def _read_whole(file: Path, component: ComponentConfig, limit: int, reading: Reading) -> str:
    chunks: list[bytes] = []
    size = 0
    for chunk in _chunks(file):
        chunks.append(chunk)
        size += len(chunk)
        check_length(size)
        if size > limit and not component.pieces_kb:  # what is cut up is no one document
            raise _too_long(f"more than {limit:,} bytes")
    data = b"".join(chunks)
    del chunks  # a file of a gigabyte is no more than twice in memory
    if component.kind == "info":  # whose marks for readers begin with a NUL byte
        data = INFO_MARK.sub(b"", data)
    if b"\0" in data[:8192]:
        raise DocumentError("binary", "has NUL bytes: binary, not text")
    text = _decode(data, file, component, reading)
    del data
    check_characters(text)
    return text.replace("\r\n", "\n")


def _decode(data: bytes, file: Path, component: ComponentConfig, reading: Reading) -> str:
    try:
        if component.kind == "source" and file.suffix == ".py":
            return decode_python(data)
        return decode_utf8(data.removeprefix(b"\xef\xbb\xbf"))
    except DocumentError:
        if not component.encoding:
            raise
    try:
        text = data.decode(component.encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise DocumentError("bad encoding", f"neither UTF-8 nor {component.encoding}: {error}") from None
    reading.decoded[component.encoding] += 1
    return text


def _read_text(file: Path, component: ComponentConfig, limit: int, reading: Reading) -> Iterator[Item]:
    yield from _pieces(_read_whole(file, component, limit, reading), component)


def _pieces(text: str, component: ComponentConfig) -> Iterator[Item]:
    most = component.pieces_kb * 1000
    if most and len(text) > most:
        yield from enumerate(_cut(text, most), 1)
    else:
        yield None, text


def _cut(text: str, most: int) -> Iterator[str]:
    """Pieces of at most so many characters that together are the text, ended by an empty line, else a line, else anywhere."""
    start = 0
    while start < len(text):
        end = start + most
        if end < len(text):
            ends = (text.rfind(mark, start, end) + len(mark) for mark in ("\n\n", "\n"))
            end = next((place for place in ends if place > start + most // 2), end)
        yield text[start:end]
        start = end


def _read_markup(file: Path, component: ComponentConfig, limit: int, reading: Reading) -> Iterator[Item]:
    yield from _pieces(TO_TEXT[component.kind](_read_whole(file, component, limit, reading)), component)


def _read_rows(file: Path, component: ComponentConfig, limit: int, reading: Reading) -> Iterator[Item]:
    suffixes = {suffix.lower() for suffix in file.suffixes[-2:]}
    if not suffixes & ({".parquet"} if component.kind == "parquet" else set(_LINES)):
        raise DocumentError("unreadable type", f"not named like {component.kind}; choose another kind, or exclude it")
    for place, item in read_items(file, component.text_key, limit):
        yield place, _too_long(item.detail) if isinstance(item, DocumentError) and item.kind == "too long" else item


def _read_mbox(file: Path, component: ComponentConfig, limit: int, reading: Reading) -> Iterator[Item]:
    """Messages of a mailbox, each after a line "From ..."; a file without such lines is one message."""
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
    except DocumentError as flaw:
        return flaw


def _read_warc(file: Path, component: ComponentConfig, limit: int, reading: Reading) -> Iterator[Item]:
    """Pages among the responses of a web archive."""
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
                yield number, DocumentError("truncated page", f"{record.raw_stream.limit:,} bytes of it are missing at the end")
            else:
                yield number, html_to_text(bytes_to_str(body, detect_encoding(body) or "utf-8")).replace("\0", "")
    except (ArchiveLoadFailed, zlib.error) as error:
        raise DocumentError("broken WARC", f"not a web archive from here on: {error}", number or None) from None


Reader = Callable[[Path, ComponentConfig, int, Reading], Iterator[Item]]
KINDS: dict[str, Reader] = {
    "text": _read_text,
    "source": _read_text,
    "jsonl": _read_rows,
    "parquet": _read_rows,
    "warc": _read_warc,
    "mbox": _read_mbox,
    "latex": _read_markup,
    "html": _read_markup,
    "man": _read_markup,
    "rst": _read_markup,
    "info": _read_markup,
}
