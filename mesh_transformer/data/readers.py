# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Documents out of files and folders, each with the place it came from; nothing damaged passes silently.

What is read, by suffix; every kind but Parquet also as `.gz` or `.zst`:

- `.jsonl`, `.ndjson`, `.json`: one JSON object per line, its text under `text_key`; blank lines are no documents;
- `.parquet`: the column `text_key` (needs pyarrow);
- `.tfrecords`, and `.index`, a list of them with a path per line: tokens, which build.py takes from tfrecords.py;
- everything else is text, one document per file, in UTF-8; `.py` may declare another encoding (PEP 263).

A byte order mark is dropped. Text files get Unix line ends (CRLF becomes LF, a lone CR stays); strings inside JSON and
Parquet stay as they are. Empty text is no document: it is counted, never an error, unless a source has nothing else.
Folders are read recursively in the order of their paths, without hidden files and __pycache__; links are followed,
each folder once.

Damage is bad UTF-8, a lone surrogate, NUL, JSON that is not an object with text under `text_key`, an archive that
breaks off, fails its checksum or has something behind its end, and any file that cannot be read. It raises DataError,
or with on_bad="skip" is left out and counted in a SkippedDocuments; whole lines before the damage in an archive are used.
Checksums stand at the end of what they cover: if one fails, lines with the damage in them may be among those used. A
.zst without checksums does not reveal every flipped bit: the `zstd` program writes them, libraries often do not.

The source "python-stdlib" is the source code of the running interpreter's standard library, present on every machine,
without installed packages and tests. A file there that is no valid text is always left out and counted.
"""

import difflib
import os
import sysconfig
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Literal

from mesh_transformer.data.errors import SkippedDocuments, DataError, Document, DocumentError
from mesh_transformer.data.formats import read_items

OnBad = Literal["error", "skip"]
TFRECORDS = (".tfrecords", ".tfrecord")

STDLIB = "python-stdlib"
_STDLIB_WITHOUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def find_root(path: str | Path) -> Path:
    """The folder that names of documents are relative to: the standard library's, `path` itself, or a file's folder."""
    if str(path) == STDLIB:
        return Path(sysconfig.get_path("stdlib")).resolve()
    path = Path(os.path.expanduser(path))
    return path if path.is_dir() else path.parent


def find_files(path: str | Path) -> list[Path]:
    """All files of a source, sorted by their path below `find_root(path)`; those an index names in its order.

    Raises DataError if there is no such path (with the nearest name), or no file in the folder.
    """
    if not str(path):
        raise DataError(f"an empty path names no documents; give a file, a folder or {STDLIB!r}")
    if str(path) == STDLIB:
        files = _walk(find_root(path), without=_STDLIB_WITHOUT, suffix=".py")
    else:
        path = Path(os.path.expanduser(path))
        if is_index(path):
            return read_index(path)
        if path.is_file():
            return [path]
        if not path.exists():
            raise DataError(f"{path}: no such file or folder{_suggest(path)}")
        if not path.is_dir():
            raise DataError(f"{path} is neither a file nor a folder")
        files = _walk(path)
        if any(map(is_tfrecords, files)):  # an index beside them is no document
            files = [file for file in files if not is_index(file)]
    if not files:
        raise DataError(f"{path}: no files in this folder (hidden ones do not count)")
    return files


def is_tfrecords(path: Path) -> bool:
    """Whether a file is named like TFRecords."""
    return path.suffix.lower() in TFRECORDS


def is_index(path: Path) -> bool:
    """Whether a file is named like a list of TFRecords."""
    return path.suffix.lower() == ".index" and path.is_file()


def read_index(path: Path) -> list[Path]:
    """The files an index names: relative paths from its own folder, else from the working directory.

    Raises DataError, with the line, for a file that is not there.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of files: {error}") from None
    files = []
    for number, line in enumerate(lines, 1):
        if name := line.strip():
            if "://" in name:
                raise DataError(f"{path}:{number}: {name} is not on this machine; copy it here and put its path there")
            places = [path.parent / os.path.expanduser(name), Path(os.path.expanduser(name))]
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                looked = " and ".join(dict.fromkeys(str(place) for place in places))
                raise DataError(f"{path}:{number}: no such file: {name} (looked for {looked})")
            files.append(found)
    if not files:
        raise DataError(f"{path}: names no files; it holds one path per line")
    return files


def read_documents(
    path: str | Path, *, text_key: str = "text", on_bad: OnBad = "error", skipped: SkippedDocuments | None = None
) -> Iterator[Document]:
    """All documents of a source (file, folder or "python-stdlib") in a fixed order, in bounded memory.

    `bad` counts what is left out; on_bad="skip" requires it. Raises DataError at once if there is nothing to read, and
    on the way at the first damage, or at the end if not one document was good.
    """
    _check_on_bad(on_bad, skipped)
    return _read_all(find_files(path), path, text_key, on_bad, SkippedDocuments() if skipped is None else skipped)


def read_file(
    file: Path, root: Path, *, text_key: str = "text", on_bad: OnBad = "error", skipped: SkippedDocuments | None = None
) -> Iterator[Document]:
    """The documents of one file of `find_files`, for reading files in parallel; `root` is from `find_root`.

    Unlike read_documents it may give nothing: the caller sees to it that the source as a whole gives something.
    """
    _check_on_bad(on_bad, skipped)
    return _read_one(file, root, text_key, on_bad, SkippedDocuments() if skipped is None else skipped)


def _check_on_bad(on_bad: str, bad: SkippedDocuments | None) -> None:
    if on_bad not in ("error", "skip"):
        raise ValueError(f'on_bad={on_bad!r} must be "error" or "skip"')
    if on_bad == "skip" and bad is None:
        raise ValueError('on_bad="skip" needs bad=SkippedDocuments(), so that what is left out is counted')


def _suggest(path: Path) -> str:
    names = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*names, STDLIB], n=1)
    return f"; did you mean {near[0] if near[0] == STDLIB else path.parent / near[0]}?" if near else ""


def _walk(root: Path, *, without: Set[str] = frozenset({"__pycache__"}), suffix: str = "") -> list[Path]:
    """Files below `root` whose names end in `suffix`, outside folders named in `without`; no folder twice."""
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise_unreadable):
        real = os.path.realpath(folder)
        folders[:] = sorted(n for n in folders if n not in without and not n.startswith(".") and real not in seen)
        files = [Path(folder, n) for n in names if not n.startswith(".") and n.endswith(suffix) and real not in seen]
        found.update((file.relative_to(root).as_posix(), file) for file in files)
        seen.add(real)
    return [found[name] for name in sorted(found)]


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot list this folder: {error.strerror}")


def _read_all(
    files: list[Path], path: str | Path, text_key: str, on_bad: OnBad, bad: SkippedDocuments
) -> Iterator[Document]:
    root, count = find_root(path), 0
    for file in files:
        for document in _read_one(file, root, text_key, on_bad, bad):
            count += 1
            yield document
    if not count:
        why = "; ".join(bad.summary_lines()) or "nothing but blank lines"
        raise DataError(f"{path}: not one document to use; {why}")


def _read_one(file: Path, root: Path, text_key: str, on_bad: OnBad, bad: SkippedDocuments) -> Iterator[Document]:
    place, name = _show(file), _show(file.relative_to(root))
    strict = on_bad == "error" and root != find_root(STDLIB)
    for line, text in read_items(file, text_key):
        suffix = "" if line is None else f":{line}"
        if isinstance(text, DocumentError):
            message = f"{place}{suffix}: {text.detail}"
            if strict:
                raise DataError(message)
            bad.add(text.kind, message)
        elif text:
            yield Document(text, name + suffix)
        else:
            bad.add("empty text", f"{place}{suffix}: empty text")


def _show(path: Path) -> str:
    """The path in Unicode, also where the file system's bytes are none."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
