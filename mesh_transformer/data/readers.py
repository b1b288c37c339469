# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Dataset readers: a path in the configuration -> documents, each with a stable name.

File formats by suffix; JSON and text files are also read as `.gz` or `.zst`:

- `.jsonl`, `.ndjson`, `.json`: one JSON object per line, with the text under `text_key`; blank lines are ignored;
- `.parquet`: the column `text_key` (needs pyarrow);
- `.tfrecords`: token ids (tfrecords.py); `.index`: a list of .tfrecords files, one path per line;
- every other file is one document of UTF-8 text; a `.py` file may declare another encoding (PEP 263).

A byte order mark is removed. Text files get Unix line ends (CRLF becomes LF, a lone CR stays); strings inside JSON and
Parquet stay as they are. An empty text is not a document: it is counted, and is an error only if a dataset has nothing
else. Folders are read recursively in the order of their paths, without hidden files and __pycache__. Links are
followed, and each folder is read once.

These are errors: bad UTF-8, a lone surrogate, NUL, JSON that is not an object with text under `text_key`, an archive
that is truncated, fails its checksum or is followed by other bytes, and any file that cannot be read. They raise
DataError; with on_bad="skip", they are counted in a SkippedDocuments instead. Complete lines before damage in an archive
are used. The checksum of an archive comes after the data it covers: if it fails, damaged lines may be among the lines
already used. A .zst file without checksums does not reveal every flipped bit; the `zstd` program writes checksums,
libraries often do not.

The dataset "python-stdlib" is the source code of the running interpreter's standard library, available on every
machine, without installed packages and tests. A file in it that is not valid text is always skipped and counted.
"""

import difflib
import os
import sysconfig
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from mesh_transformer.data.errors import DataError, Document, DocumentError, SkippedDocuments
from mesh_transformer.data.formats import read_items

if TYPE_CHECKING:
    import numpy as np

OnBad = Literal["error", "skip"]
TFRECORDS = (".tfrecords", ".tfrecord")

STDLIB = "python-stdlib"
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class Partition(NamedTuple):
    """A part of a dataset that one worker reads independently, such as a file. The cache key depends on all fields."""

    location: str  # path or URL
    n_bytes: int  # used for progress and to balance the work
    version: int  # a number that changes with the content, such as the modification time


class ReadOptions(NamedTuple):
    """Options for reading the documents of a dataset."""

    path: str  # path of the dataset, as in the configuration
    text_key: str = "text"
    on_bad: OnBad = "error"


class TokenRecord(NamedTuple):
    """A sequence of token ids, with the name by which it is assigned to training or validation."""

    name: str
    tokens: "np.ndarray"
    location: str  # file and record, with which error messages begin


class DatasetReader(NamedTuple):
    """One kind of dataset: the paths it handles, its partitions, and their documents or token sequences."""

    matches: Callable[[str], bool]
    list_partitions: Callable[[str], list[Partition]]
    read_documents: Callable[[Partition, ReadOptions, SkippedDocuments], Iterator[Document]]
    read_tokens: Callable[[Partition], Iterator[TokenRecord]]
    holds_tokens: Callable[[Partition], bool]


def find_reader(path: str) -> DatasetReader:
    """Return the first reader of DATASETS for a path."""
    return next(reader for reader in DATASETS if reader.matches(path))


def list_partitions(path: str) -> list[Partition]:
    """List the partitions of a dataset. Raises DataError if the dataset does not exist."""
    return find_reader(path).list_partitions(path)


def holds_tokens(path: str) -> bool:
    """Return whether any partition of a dataset holds token ids instead of text."""
    reader = find_reader(path)
    return any(map(reader.holds_tokens, reader.list_partitions(path)))


def find_root(path: str | Path) -> Path:
    """Return the folder that document names are relative to: the standard library, `path` itself, or a file's folder."""
    if str(path) == STDLIB:
        return Path(sysconfig.get_path("stdlib")).resolve()
    path = Path(os.path.expanduser(path))
    return path if path.is_dir() else path.parent


def find_files(path: str | Path) -> list[Path]:
    """List the files of a dataset, sorted by path below `find_root(path)`, or in the order of an index.

    Raises DataError if the path does not exist (and suggests the nearest name), or if the folder has no files.
    """
    if not str(path):
        raise DataError(f"the dataset path is empty; give a file, a folder or {STDLIB!r}")
    if str(path) == STDLIB:
        files = _walk(find_root(path), exclude=_STDLIB_EXCLUDED, suffix=".py")
    else:
        path = Path(os.path.expanduser(path))
        if is_index(path):
            return read_index(path)
        if path.is_file():
            return [path]
        if not path.exists():
            raise DataError(f"{path}: no such file or folder{_suggest(path)}")
        if not path.is_dir():
            raise DataError(f"{path}: this is a device or socket; give a file or a folder")
        files = _walk(path)
        if any(map(is_tfrecords, files)):  # an index next to TFRecords is not a document
            files = [file for file in files if not is_index(file)]
    if not files:
        raise DataError(f"{path}: this folder has no files, apart from hidden ones; add files, or give another path")
    return files


def is_tfrecords(path: Path) -> bool:
    """Return whether a path has the suffix of TFRecords."""
    return path.suffix.lower() in TFRECORDS


def is_index(path: Path) -> bool:
    """Return whether a path is an existing index, a file that lists TFRecords."""
    return path.suffix.lower() == ".index" and path.is_file()


def read_index(path: Path) -> list[Path]:
    """Read the list of files in an index; relative paths are relative to the index's folder, or else to the working directory.

    Raises DataError, with the line, for a file that does not exist.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of files: {error}") from None
    files = []
    for number, line in enumerate(lines, 1):
        if name := line.strip():
            if "://" in name:
                raise DataError(f"{path}:{number}: {name} is a URL; copy it to this machine and give its local path")
            candidates = [path.parent / os.path.expanduser(name), Path(os.path.expanduser(name))]
            file = next((candidate for candidate in candidates if candidate.is_file()), None)
            if file is None:
                tried = " and ".join(dict.fromkeys(map(str, candidates)))
                raise DataError(f"{path}:{number}: no such file: {name} (looked for {tried}); correct the path")
            files.append(file)
    if not files:
        raise DataError(f"{path}: this index lists no files; write one path per line")
    return files


def read_documents(
    path: str | Path, *, text_key: str = "text", on_bad: OnBad = "error", skipped: SkippedDocuments | None = None
) -> Iterator[Document]:
    """Read all documents of a dataset in a fixed order, in bounded memory.

    `skipped` counts skipped documents; on_bad="skip" requires it. Raises DataError immediately if there is nothing to
    read, and during iteration at the first error, or at the end if no document was usable.
    """
    _check_on_bad(on_bad, skipped)
    options = ReadOptions(str(path), text_key, on_bad)
    partitions = list_partitions(options.path)
    return _read_all(partitions, options, SkippedDocuments() if skipped is None else skipped)


def read_file(
    file: Path, root: Path, *, text_key: str = "text", on_bad: OnBad = "error", skipped: SkippedDocuments | None = None
) -> Iterator[Document]:
    """Read the documents of one of the files that `find_files` lists; `root` is the result of `find_root`.

    Unlike `read_documents`, it may yield nothing: the caller checks that the whole dataset is not empty.
    """
    _check_on_bad(on_bad, skipped)
    return _read_one(file, root, text_key, on_bad, SkippedDocuments() if skipped is None else skipped)


def _check_on_bad(on_bad: str, skipped: SkippedDocuments | None) -> None:
    if on_bad not in ("error", "skip"):
        raise ValueError(f'on_bad={on_bad!r} must be "error" or "skip"')
    if on_bad == "skip" and skipped is None:
        raise ValueError('on_bad="skip" needs skipped=SkippedDocuments(), to count skipped documents')


def _suggest(path: Path) -> str:
    names = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*names, STDLIB], n=1)
    if not near:
        return f"; give an existing file or folder, or {STDLIB!r}"
    return f"; did you mean {near[0] if near[0] == STDLIB else path.parent / near[0]}?"


def _walk(root: Path, *, exclude: Set[str] = frozenset({"__pycache__"}), suffix: str = "") -> list[Path]:
    """List files below `root` whose names end in `suffix`, outside folders with a name in `exclude`; each folder is listed once."""
    files_by_name: dict[str, Path] = {}
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise_unreadable):
        real = os.path.realpath(folder)
        folders[:] = sorted(n for n in folders if n not in exclude and not n.startswith(".") and real not in visited)
        files = [Path(folder, n) for n in names if not n.startswith(".") and n.endswith(suffix) and real not in visited]
        files_by_name.update((file.relative_to(root).as_posix(), file) for file in files)
        visited.add(real)
    return [files_by_name[name] for name in sorted(files_by_name)]


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot list this folder: {error.strerror}")


def _read_all(partitions: list[Partition], options: ReadOptions, skipped: SkippedDocuments) -> Iterator[Document]:
    reader, count = find_reader(options.path), 0
    for partition in partitions:
        for document in reader.read_documents(partition, options, skipped):
            count += 1
            yield document
    if not count:
        reason = "; ".join(skipped.summary_lines()) or "only blank lines"
        raise DataError(f"{options.path}: this dataset has no usable document: {reason}")


def _read_one(file: Path, root: Path, text_key: str, on_bad: OnBad, skipped: SkippedDocuments) -> Iterator[Document]:
    location, name = _to_unicode(file), _to_unicode(file.relative_to(root))
    strict = on_bad == "error" and root != find_root(STDLIB)
    for line, text in read_items(file, text_key):
        suffix = "" if line is None else f":{line}"
        if isinstance(text, DocumentError):
            message = f"{location}{suffix}: {text.detail}"
            if strict:
                raise DataError(message)
            skipped.add(text.kind, message)
        elif text:
            yield Document(text, name + suffix)
        else:
            skipped.add("empty text", f"{location}{suffix}: empty text")


def _to_unicode(path: Path) -> str:
    """Return the path as valid Unicode, with backslash escapes for other bytes of the file system."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _any_path(path: str) -> bool:
    return True


def _list_files(path: str) -> list[Partition]:
    return [_describe_file(file) for file in find_files(path)]


def _describe_file(file: Path) -> Partition:
    try:
        status = file.stat()
    except OSError:  # for example, a broken link, which the reader reports
        return Partition(str(file), 0, 0)
    return Partition(str(file), status.st_size, status.st_mtime_ns)


def _read_file_documents(partition: Partition, options: ReadOptions, skipped: SkippedDocuments) -> Iterator[Document]:
    file = Path(partition.location)
    return _read_one(file, find_root(options.path), options.text_key, options.on_bad, skipped)


def _read_file_tokens(partition: Partition) -> Iterator[TokenRecord]:
    from mesh_transformer.data.tfrecords import read_sequences  # imports NumPy, which reading text does not need

    file = Path(partition.location)
    for number, sequence in enumerate(read_sequences(file)):
        yield TokenRecord(f"{file.name}:{number}", sequence, f"{file}: record {number}")


def _is_token_file(partition: Partition) -> bool:
    return is_tfrecords(Path(partition.location))


FILES = DatasetReader(_any_path, _list_files, _read_file_documents, _read_file_tokens, _is_token_file)

# Readers by dataset path; the first that matches is used. To add a kind of dataset that is not files on this machine or
# in an object store (for example Hugging Face datasets as "hf://NAME"): write its five functions in a separate module
# and add a row before FILES. Shards, caching, parallel builds, holdout and evaluation then work unchanged.
DATASETS: tuple[DatasetReader, ...] = (FILES,)
