# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Local paths and object-store URLs (s3://bucket/path, gs://bucket/path) behind one interface for reading.

A local path is a pathlib.Path. A URL is a RemotePath, which has the methods of Path that reading needs, so that readers
do not distinguish local and remote paths. Credentials and endpoints come from the standard environment variables:

    s3    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_REGION;
          AWS_ENDPOINT_URL for another store with an S3 interface
    gs    GOOGLE_APPLICATION_CREDENTIALS;
          STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL together, for another store with a GCS interface

Small objects and byte ranges are read through fsspec (the extra `remote`), arrays through TensorStore. Both retry a few
times with growing pauses before they raise an error.
"""

import atexit
import contextlib
import dataclasses
import datetime
import errno
import functools
import io
import logging
import mmap
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self

import numpy as np
import tensorstore as ts

from mesh_transformer.storage.errors import CheckpointError, StorageError, explain_error, one_line
from mesh_transformer.storage.positioned_file import PositionedFile

SCHEMES = {"s3": "s3fs", "gs": "gcsfs"}  # URL scheme -> the package that fsspec needs for it
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
ATTEMPTS = 5  # per request
BODY_ATTEMPTS = 3  # per request whose response body was interrupted
FIRST_PAUSE = "200ms"  # TensorStore's pause before the first retry; later pauses are longer
BLOCK_BYTES = 1 << 22  # per read of a whole local file
OBJECT_BLOCK_BYTES = 1 << 24  # per read of a whole object
PAGE_BYTES = 1 << 16  # per read of an object that is opened as a file
CACHED_RANGES = 9  # of objects: three workers, each with the values, scales and zero points of a weight
CACHED_PAGES = 8  # of an object that is opened as a file
# Variables that select the server and the credentials; if one of them changes, a new connection is opened.
ENVIRONMENT_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "STORAGE_EMULATOR_HOST",
)


class ObjectStat(NamedTuple):
    """Metadata of an object, named as in os.stat_result."""

    st_size: int  # bytes


@dataclasses.dataclass(frozen=True, order=True)
class RemotePath:
    """An object of an object store, or a folder: all objects whose names begin with its name and a slash.

    Network and store errors are raised as StorageError, whose text is one line with the URL, the cause and the fix.
    """

    scheme: str
    parts: tuple[str, ...]  # the bucket, then the parts of the key

    def __str__(self) -> str:
        return f"{self.scheme}://{self.full_name}"

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.scheme, (*self.parts, *str(name).split("/")))

    @property
    def full_name(self) -> str:
        """Return bucket and key, as fsspec expects them."""
        return "/".join(self.parts)

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def parent(self) -> Self:
        """Return the containing folder; the parent of a bucket is the bucket itself."""
        return type(self)(self.scheme, self.parts[:-1] or self.parts)

    def with_name(self, name: str) -> Self:
        return self.parent / name

    def relative_to(self, folder: "RemotePath") -> PurePosixPath:
        return PurePosixPath(self.full_name).relative_to(folder.full_name)

    def absolute(self) -> Self:
        return self

    def resolve(self) -> Self:
        return self

    def is_dir(self) -> bool:
        """Return whether any object is in this folder."""
        return any(True for _ in self.iterdir())

    def is_file(self) -> bool:
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[Self]:
        """Yield the objects and folders directly in this folder, sorted by name; none if it does not exist."""
        try:
            with self.filesystem() as files:
                entries = files.ls(self.full_name, detail=True)
        except FileNotFoundError:
            return iter(())
        names = {entry["name"].rstrip("/") for entry in entries} - {self.full_name}
        return iter([type(self)(self.scheme, tuple(name.split("/"))) for name in sorted(names)])

    def glob(self, pattern: str) -> Iterator[Self]:
        """Yield the objects and folders directly in this folder whose names match."""
        return (path for path in self.iterdir() if PurePosixPath(path.name).match(pattern))

    def list_files(self) -> dict[str, tuple[int, float]]:
        """Return {name relative to this folder: (size in bytes, modification time)} of every object below it."""
        with self.filesystem() as files:
            entries = files.find(self.full_name, detail=True)
        start = len(self.full_name) + 1
        return {
            name[start:]: (entry["size"], _modification_time(entry))
            for name, entry in entries.items()
            if name[start:] and entry["type"] == "file"
        }

    def stat(self) -> ObjectStat:
        """Return the size of the object; raise FileNotFoundError if it does not exist."""
        with self.filesystem() as files:
            entry = files.info(self.full_name)
        if entry["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return ObjectStat(entry["size"])

    def read_bytes(self) -> bytes:
        return self.read_range(None, None)

    def read_range(self, start: int | None, stop: int | None) -> bytes:
        """Return bytes [start, stop) of the object; raise FileNotFoundError if it does not exist."""
        if start is not None and start == stop:
            return b""
        with self.filesystem() as files:
            return files.cat_file(self.full_name, start=start, end=stop)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Return a seekable file that reads the object in pages."""
        if mode != "rb":
            raise ValueError(f"{self}: mode is {mode!r}; remote files can only be opened with 'rb'")
        return io.BufferedReader(_PagedReader(self), PAGE_BYTES)

    @contextlib.contextmanager
    def filesystem(self) -> Iterator[Any]:
        """Yield the fsspec file system; its errors become StorageError, except FileNotFoundError for a missing object."""
        try:
            yield _filesystem(self.scheme, tuple(os.environ.get(name) for name in ENVIRONMENT_VARIABLES))
        except CheckpointError:
            raise
        except Exception as error:  # s3fs, gcsfs, botocore and aiohttp raise different types
            reason = explain_error(self, error)
            if reason is None and isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "no such object", str(self)) from error
            if reason is None and not isinstance(error, OSError):
                raise
            raise StorageError(f"{self}: {reason or one_line(error)}") from error


AnyPath = Path | RemotePath


def parse_path(path: str | AnyPath) -> AnyPath:
    """Convert a string to a local path or a RemotePath; raise CheckpointError for an unsupported URL."""
    match = URL.fullmatch(path) if isinstance(path, str) else None
    if match:
        parts = [part for part in match[2].split("/") if part]
        if match[1] not in SCHEMES or not parts:
            urls = ", ".join(f"{scheme}://bucket/path" for scheme in SCHEMES)
            raise CheckpointError(f"{path}: unsupported URL; use {urls} or a local path")
        if {".", ".."} & set(parts):
            raise CheckpointError(f"{path}: the URL contains . or ..; write the full path without them")
        return RemotePath(match[1], tuple(parts))
    if not isinstance(path, RemotePath) and Path(path).parts[:1] in {(f"{scheme}:",) for scheme in SCHEMES}:
        raise CheckpointError(
            f"{path}: a URL was converted to a local path; pass the URL as a string, or use a local path where URLs are not "
            "supported"
        )
    return path if isinstance(path, RemotePath) else Path(path)


def read_small(path: AnyPath, max_bytes: int) -> bytes:
    """Return the content of an object or of a local file; raise CheckpointError for a link or a local file above `max_bytes`."""
    if isinstance(path, RemotePath):
        return path.read_bytes()
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "a folder or a special file"
        raise CheckpointError(f"{path}: is {kind}, but must be a regular file; copy the file itself to this path")
    if status.st_size > max_bytes:
        raise CheckpointError(
            f"{path}: has {status.st_size:,} bytes, but must have at most {max_bytes:,}; copy the file again"
        )
    return path.read_bytes()


def read_blocks(path: AnyPath, size: int | None = None) -> Iterator[bytes | memoryview]:
    """Yield a file block by block, each valid until the next; of an object, only the first `size` bytes if `size` is given."""
    if isinstance(path, RemotePath):
        size = path.stat().st_size if size is None else size
        for start in range(0, size, OBJECT_BLOCK_BYTES):
            yield path.read_range(start, min(start + OBJECT_BLOCK_BYTES, size))
        return
    block = memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            yield block[:count]


def map_bytes(path: AnyPath, start: int, stop: int) -> np.ndarray:
    """Return bytes [start, stop) as uint8: a local file is memory-mapped, an object is read.

    Raises ValueError if the file or object is shorter than `stop` bytes.
    """
    if isinstance(path, RemotePath):
        raw = np.frombuffer(_read_cached(path, start, stop), np.uint8)
        nbytes = start + len(raw)
    else:
        first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with open(path, "rb", buffering=0) as file:
            nbytes = os.fstat(file.fileno()).st_size
            if start < stop <= nbytes:
                mapped = mmap.mmap(file.fileno(), stop - first, access=mmap.ACCESS_READ, offset=first)
                return np.frombuffer(mapped, np.uint8, offset=start - first)
        raw = np.zeros(0, np.uint8)
    if nbytes < stop:
        raise ValueError(_truncated(path, nbytes, stop))
    return raw


def read_into(path: Path, start: int, values: np.ndarray) -> None:
    """Fill an array in C order from a local file at byte `start`; raise ValueError if the file is too short."""
    target = values.reshape(-1).view(np.uint8).data
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while target and (count := file.readinto(target)):
            target = target[count:]
    if target:
        raise ValueError(_truncated(path, path.stat().st_size, start + values.nbytes))


def _truncated(path: AnyPath, nbytes: int, stop: int) -> str:
    return f"{path}: truncated: the file has {nbytes:,} bytes, but an array in it ends at byte {stop:,}; copy or download it again"


@functools.lru_cache(CACHED_RANGES)
def _read_cached(path: RemotePath, start: int, stop: int) -> bytes:
    """Read a byte range; cached, because reading an array in small parts requests the same range repeatedly."""
    return path.read_range(start, stop)


def describe_sibling_folders(path: AnyPath) -> str:
    """Return a phrase with the first ten folders in the parent of a missing `path`, for error messages."""
    parent = path.parent
    others = sorted(other.name for other in parent.iterdir() if other.is_dir()) if parent.is_dir() else []
    return f"folders in {parent}: {', '.join(others[:10]) or 'none'}"


def local_copy(folder: AnyPath, names: tuple[str, ...]) -> Path:
    """Return a local folder with the small files `names`: `folder` itself if it is local, else a copy deleted at exit."""
    if isinstance(folder, Path):
        return folder
    copy = Path(tempfile.mkdtemp(prefix="mesh-transformer-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for path in folder.iterdir():
        if path.name in names:
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def kvstore_spec(folder: RemotePath) -> dict[str, Any]:
    """Return the TensorStore specification of the key-value store that holds the objects of `folder`."""
    bucket, *key = folder.parts
    spec: dict[str, Any] = {"bucket": bucket, "path": "".join(f"{part}/" for part in key)}
    if folder.scheme == "gs":
        return {"driver": "gcs", **spec}
    return {"driver": "s3", **spec, **{key: value for key, value in _s3_options().items() if value}}


def kvstore_context() -> ts.Context:
    """Return TensorStore's retry and credential options; equal options share one context and its connections."""
    return _make_context("AWS_ACCESS_KEY_ID" in os.environ)


@functools.cache
def _make_context(has_keys: bool) -> ts.Context:
    retries = {"max_retries": max(ATTEMPTS - 1, 1), "initial_delay": FIRST_PAUSE, "max_delay": "8s"}
    # The default also looks for keys in files, and prints a warning if there are none.
    credentials = {"aws_credentials": {"type": "environment"}} if has_keys else {}
    return ts.Context({"s3_request_retries": retries, "gcs_request_retries": retries, **credentials})


def _s3_options() -> dict[str, str | None]:
    """Return endpoint and region under TensorStore's names; without a region, TensorStore asks the store for it."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return {"endpoint": endpoint, "aws_region": region or ("us-east-1" if endpoint else None)}


@functools.cache
def _filesystem(scheme: str, _environment: tuple[str | None, ...]) -> Any:
    """Return the fsspec file system of a scheme, cached per environment; all threads may use it."""
    try:
        import fsspec

        if scheme == "gs":
            # gcsfs logs tracebacks of errors that are raised here as StorageError.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
            return fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)
        import s3fs.core

        s3fs.core.set_custom_error_handler(lambda error: "(429)" in str(error))  # s3fs does not retry status 429 itself
        options = _s3_options()
        client = {"endpoint_url": options["endpoint"], "region_name": options["aws_region"]}
        files = fsspec.filesystem(
            "s3",
            use_listings_cache=False,
            skip_instance_cache=True,
            max_concurrency=2,  # parts of one upload in memory
            client_kwargs={key: value for key, value in client.items() if value},
            config_kwargs={"retries": {"mode": "standard", "max_attempts": ATTEMPTS}},
        )
        files.retries = BODY_ATTEMPTS
        return files
    except ImportError as error:
        raise StorageError(
            f"{scheme}:// URLs need the package {SCHEMES[scheme]}: pip install 'mesh-transformer[remote]' ({error})"
        ) from error


def _modification_time(entry: Mapping[str, Any]) -> float:
    """Return seconds since 1970 by the store's clock, or the current time if the store reports none."""
    when = entry.get("LastModified") or entry.get("mtime")
    return when.timestamp() if isinstance(when, datetime.datetime) else time.time()


class _PagedReader(PositionedFile):
    """An object as a seekable file; a few pages are cached, because archives are read at the end first, then at other offsets."""

    def __init__(self, path: RemotePath):
        super().__init__()
        self._path = path
        self._size = path.stat().st_size
        self._read_page = functools.lru_cache(CACHED_PAGES)(self._fetch)

    @property
    def size(self) -> int:
        return self._size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        page, start = divmod(self.position, PAGE_BYTES)
        data = self._read_page(page)[start : start + len(buffer)] if self.position < self._size else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def _fetch(self, page: int) -> bytes:
        return self._path.read_range(page * PAGE_BYTES, min((page + 1) * PAGE_BYTES, self._size))
