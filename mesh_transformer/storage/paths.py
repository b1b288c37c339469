# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint or a model folder lies: a path of this machine, or s3://bucket/path, or gs://bucket/path.

A local place is a pathlib.Path. A remote one is a RemotePath, which has as much of Path's vocabulary as reading needs,
so that whoever only reads does not ask which it is. What it takes to reach a store is taken from where the stores' own
programs take it: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL (a store that speaks
S3's language elsewhere); GOOGLE_APPLICATION_CREDENTIALS (and, for another server that speaks
its language, both STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL). Small objects and byte ranges are read through fsspec (the
extra `remote`), arrays through TensorStore; both try again a few times, with growing pauses, before an error is one.
"""

import atexit
import contextlib
import dataclasses
import errno
import functools
import io
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self

import numpy as np
import tensorstore as ts

from mesh_transformer.storage.errors import CheckpointError, StorageError, explain_error, one_line

SCHEMES = {"s3": "s3fs", "gs": "gcsfs"}  # and the package that fsspec needs for each
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
ATTEMPTS = 5  # of a request, before its error is one
BODY_ATTEMPTS = 3  # of a request whose answer broke off
FIRST_PAUSE = "200ms"  # TensorStore's before it asks again; later ones are longer
BLOCK_BYTES = 1 << 22  # of a file, read at once where all of it is read
OBJECT_BLOCK_BYTES = 1 << 24  # and of an object
PAGE_BYTES = 1 << 16  # of an object that is opened as a file: at most this is fetched at once
CACHED_PAGES = 8  # of one such object, kept
# Which of these change decides whom we talk to, and as whom.
ENVIRONMENT_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION",
             "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "GOOGLE_APPLICATION_CREDENTIALS",
             "STORAGE_EMULATOR_HOST")  # fmt: skip


class ObjectStat(NamedTuple):
    """What is known of an object without reading it."""

    st_size: int  # bytes


@dataclasses.dataclass(frozen=True, order=True)
class RemotePath:
    """An object of an object store, or a folder: all objects whose names begin with its own and a slash.

    Errors of the network and the store are StorageError, in one line with the URL and the remedy.
    """

    scheme: str
    parts: tuple[str, ...]  # the bucket, then the key's

    def __str__(self) -> str:
        return f"{self.scheme}://{self.full_name}"

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.scheme, (*self.parts, *str(name).split("/")))

    @property
    def full_name(self) -> str:
        """With the bucket, as fsspec wants it."""
        return "/".join(self.parts)

    @property
    def name(self) -> str:
        """The last part."""
        return self.parts[-1]

    @property
    def parent(self) -> Self:
        """The folder that this is in; of a bucket itself."""
        return type(self)(self.scheme, self.parts[:-1] or self.parts)

    def with_name(self, name: str) -> Self:
        """What is called `name` in the same folder."""
        return self.parent / name

    def relative_to(self, folder: "RemotePath") -> PurePosixPath:
        """Its name from there."""
        return PurePosixPath(self.full_name).relative_to(folder.full_name)

    def absolute(self) -> Self:
        """Itself, as everything here is."""
        return self

    def resolve(self) -> Self:
        """Itself: there are no links."""
        return self

    def is_dir(self) -> bool:
        """Whether there is an object in it."""
        return any(True for _ in self.iterdir())

    def is_file(self) -> bool:
        """Whether it is an object."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def exists(self) -> bool:
        """Whether it is an object or a folder."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[Self]:
        """The objects and folders right in it, by name; none if there is no such folder."""
        try:
            with self.filesystem() as files:
                found = files.ls(self.full_name, detail=True)
        except FileNotFoundError:
            return iter(())
        names = {entry["name"].rstrip("/") for entry in found} - {self.full_name}
        return iter([type(self)(self.scheme, tuple(name.split("/"))) for name in sorted(names)])

    def glob(self, pattern: str) -> Iterator[Self]:
        """What is right in it and matches."""
        return (path for path in self.iterdir() if PurePosixPath(path.name).match(pattern))

    def stat(self) -> ObjectStat:
        """The object's size; FileNotFoundError if it is none."""
        with self.filesystem() as files:
            found = files.info(self.full_name)
        if found["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return ObjectStat(found["size"])

    def read_bytes(self) -> bytes:
        """All of it."""
        return self.read_range(None, None)

    def read_range(self, start: int | None, stop: int | None) -> bytes:
        """Some bytes of it; FileNotFoundError if it is not there."""
        if start is not None and start == stop:
            return b""
        with self.filesystem() as files:
            return files.cat_file(self.full_name, start=start, end=stop)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """As a file to read and seek in."""
        if mode != "rb":
            raise ValueError(f"{self}: opened with mode {mode!r}, where only 'rb' can be")
        return io.BufferedReader(_PagedReader(self), PAGE_BYTES)

    @contextlib.contextmanager
    def filesystem(self) -> Iterator[Any]:
        """fsspec's view of the store; its errors become StorageError, but what is not there stays FileNotFoundError."""
        try:
            yield _filesystem(self.scheme, tuple(os.environ.get(name) for name in ENVIRONMENT_VARIABLES))
        except CheckpointError:
            raise
        except Exception as error:  # whatever kind the libraries below have for it
            reason = explain_error(self, error)
            if reason is None and isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "no such object", str(self)) from error
            if reason is None and not isinstance(error, OSError):
                raise
            raise StorageError(f"{self}: {reason or one_line(error)}") from error


AnyPath = Path | RemotePath


def parse_path(path: str | AnyPath) -> AnyPath:
    """The place that a user's word means; CheckpointError if it is a URL of a kind that is not known."""
    match = URL.fullmatch(path) if isinstance(path, str) else None
    if match:
        parts = [part for part in match[2].split("/") if part]
        if match[1] not in SCHEMES or not parts:
            kinds = ", ".join(f"{scheme}://bucket/path" for scheme in SCHEMES)
            raise CheckpointError(f"{path}: not a place that is known: {kinds}, or a path of this machine")
        if {".", ".."} & set(parts):
            raise CheckpointError(f"{path}: a URL has no . and .. in it")
        return RemotePath(match[1], tuple(parts))
    if not isinstance(path, RemotePath) and Path(path).parts[:1] in {(f"{scheme}:",) for scheme in SCHEMES}:
        raise CheckpointError(f"{path}: a URL that has become a path of this machine; only checkpoints can be remote")
    return path if isinstance(path, RemotePath) else Path(path)


def read_small(path: AnyPath, max_bytes: int) -> bytes:
    """All of a plain file or an object of which no more than `most` bytes are expected."""
    if isinstance(path, RemotePath):
        return path.read_bytes()
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
        raise CheckpointError(f"{path}: a link, not a plain file, or larger than {max_bytes} bytes")
    return path.read_bytes()


def read_blocks(path: AnyPath, size: int | None = None) -> Iterator[bytes | memoryview]:
    """A file a block at a time, each valid until the next; of an object the first `size` bytes (default: all)."""
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
    """Bytes of a file, mapped, or a range of an object, of which the last ones are kept; ValueError if it is shorter."""
    if isinstance(path, RemotePath):
        raw = np.frombuffer(_read_cached(path, start, stop), np.uint8)
        found = start + len(raw)
    else:
        found = path.stat().st_size
        raw = np.memmap(path, np.uint8, "r", start, (stop - start,)) if found >= stop else np.zeros(0, np.uint8)
    if found < stop:
        raise ValueError(f"{path}: cut short: {found:,} bytes, an array ends at {stop:,}")
    return raw


def read_into(path: Path, start: int, values: np.ndarray) -> None:
    """Fill an array in C order from a file of this machine; ValueError if that is shorter."""
    target = values.reshape(-1).view(np.uint8).data
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while target and (count := file.readinto(target)):
            target = target[count:]
    if target:
        found = path.stat().st_size
        raise ValueError(f"{path}: cut short: {found:,} bytes, an array ends at {start + values.nbytes:,}")


@functools.lru_cache(2)
def _read_cached(path: RemotePath, start: int, stop: int) -> bytes:
    """An array that is wanted column by column comes as the same rows again and again."""
    return path.read_range(start, stop)


def local_copy(folder: AnyPath, names: tuple[str, ...]) -> Path:
    """A folder of this machine with the small files `names` of `folder`: itself, or a copy that goes when we exit."""
    if isinstance(folder, Path):
        return folder
    copy = Path(tempfile.mkdtemp(prefix="mesh-transformer-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for path in folder.iterdir():
        if path.name in names:
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def kvstore_spec(folder: RemotePath) -> dict[str, Any]:
    """Where TensorStore finds the objects of `folder`."""
    bucket, *key = folder.parts
    spec: dict[str, Any] = {"bucket": bucket, "path": "".join(f"{part}/" for part in key)}
    if folder.scheme == "gs":
        return {"driver": "gcs", **spec}
    return {"driver": "s3", **spec, **{key: value for key, value in _find_s3().items() if value}}


def kvstore_context() -> ts.Context:
    """How patiently, and as whom; the same object for the same answer, so that connections are shared."""
    return _make_context("AWS_ACCESS_KEY_ID" in os.environ)


@functools.cache
def _make_context(has_keys: bool) -> ts.Context:
    retries = {"max_retries": max(ATTEMPTS - 1, 1), "initial_delay": FIRST_PAUSE, "max_delay": "8s"}
    # The default looks for keys in files too, and complains on stderr where there are none.
    credentials = {"aws_credentials": {"type": "environment"}} if has_keys else {}
    return ts.Context({"s3_request_retries": retries, "gcs_request_retries": retries, **credentials})


def _find_s3() -> dict[str, str | None]:
    """Endpoint and region by TensorStore's names; it asks the bucket for its region if that is neither given nor needed."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return {"endpoint": endpoint, "aws_region": region or ("us-east-1" if endpoint else None)}


@functools.cache
def _filesystem(scheme: str, _environment: tuple[str | None, ...]) -> Any:
    """fsspec's for one scheme, made once for an environment; it may be used from all threads."""
    try:
        import fsspec

        if scheme == "gs":
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of what we say in a line
            return fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)
        import s3fs.core

        s3fs.core.set_custom_error_handler(lambda error: "(429)" in str(error))  # too many requests: known by code only
        found = _find_s3()
        client = {"endpoint_url": found["endpoint"], "region_name": found["aws_region"]}
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
            f"{scheme}:// needs the package {SCHEMES[scheme]}: pip install 'mesh-transformer[remote]' ({error})"
        ) from error


class _PagedReader(io.RawIOBase):
    """An object as a file, of which a few pages are kept: an archive is read at its end, then here and there."""

    def __init__(self, path: RemotePath):
        super().__init__()
        self._path, self._size, self._at = path, path.stat().st_size, 0
        self._read_page = functools.lru_cache(CACHED_PAGES)(self._fetch)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        page, start = divmod(self._at, PAGE_BYTES)
        data = self._read_page(page)[start : start + len(buffer)] if self._at < self._size else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _fetch(self, page: int) -> bytes:
        return self._path.read_range(page * PAGE_BYTES, min((page + 1) * PAGE_BYTES, self._size))
