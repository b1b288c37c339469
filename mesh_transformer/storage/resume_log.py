# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Progress log of a long job: an interrupted conversion or evaluation resumes where it stopped.

The file is JSON lines. The first line identifies the job, such as {"conversion": ...} or {"model": <digest>}. Each
following line is one finished item, [<key>, <result>]; version 1.0 wrote the items of an evaluation as
{"key": ..., "is": ...}, which is read as well. A damaged log, or the log of another job, is discarded.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.storage.atomic_files import LineFile

LOG_FILE = "journal.jsonl"  # in the staging folder of a conversion


class ResumeLog:
    """Results of the finished items by key. Use it in a `with` block; call `delete` once the results are stored elsewhere.

    An incomplete last line, left by a crash, is ignored.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path = path
        self.done = _read_done(path, header)
        self.n_resumed = len(self.done)  # results of earlier attempts
        if not self.done:
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = LineFile(path)
        if not self.done:
            self._file.write(json.dumps(header).encode())

    def get(self, key: str) -> Any | None:
        """Return the result of an item, or None if the item is not finished."""
        return self.done.get(key)

    def add(self, key: str, result: Any) -> None:
        """Record a finished item; the result must be JSON. The line is not forced to disk."""
        self.done[key] = result
        self._file.write(json.dumps([key, result]).encode())

    def close(self) -> None:
        self._file.close()

    def delete(self) -> None:
        """Remove the file: the job is complete."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> "ResumeLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_staging_log(staging: Path, conversion: Mapping[str, Any]) -> ResumeLog:
    """Return the log of a conversion in its staging folder; the folder of a different conversion is emptied first."""
    path = staging / LOG_FILE
    header = {"conversion": conversion}
    if staging.exists() and not _has_header(path, header):
        shutil.rmtree(staging)
    return ResumeLog(path, header)


def _has_header(path: Path, header: Mapping[str, Any]) -> bool:
    lines = _complete_lines(path)
    try:
        return bool(lines) and json.loads(lines[0]) == json.loads(json.dumps(header))
    except ValueError:
        return False


def _read_done(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded results; an empty dictionary if the log is missing, damaged or of another job."""
    if not _has_header(path, header):
        return {}
    done: dict[str, Any] = {}
    try:
        for line in map(json.loads, _complete_lines(path)[1:]):
            key, result = (line["key"], line["is"]) if isinstance(line, dict) else line
            done[key] = result
    except (ValueError, KeyError, TypeError):
        return {}
    return done


def _complete_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []
