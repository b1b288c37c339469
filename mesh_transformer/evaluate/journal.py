# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Answers of a model as they come, kept in a file until an evaluation is whole: killed, it goes on where it was.

evaluation_<step>.partial.jsonl: {"model": <what answers>}, then a line for each answer, {"key": <digest of what was
asked>, "is": <the answer>}. Answers of another model, or of this one computed in another type, are thrown away.
"""

import json
from pathlib import Path
from typing import Any

from mesh_transformer.storage.atomic_files import LineFile


class Journal:
    """`with Journal(path, model) as journal:`; the file goes when `finish` says that its answers are no longer needed."""

    def __init__(self, path: Path, model: str):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Any] = {}
        is_same = self._read(model)
        if not is_same:
            path.unlink(missing_ok=True)
        self.taken = len(self._known)  # answers of an earlier try
        self._file = LineFile(path)
        if not is_same:
            self._file.write(json.dumps({"model": model}).encode())

    def _read(self, model: str) -> bool:
        """Take the answers that are there; false for those of another model. A last line that is not whole is none."""
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return False
        try:
            if not lines or json.loads(lines[0]) != {"model": model}:
                return False
            self._known = {entry["key"]: entry["is"] for entry in map(json.loads, lines[1:])}
        except (ValueError, KeyError, TypeError):  # damaged: everything is asked again
            self._known = {}
            return False
        return True

    def get(self, key: str) -> Any | None:
        """The answer to what this is the digest of."""
        return self._known.get(key)

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer, plain enough for JSON."""
        self._known[key] = answer
        self._file.write(json.dumps({"key": key, "is": answer}).encode())

    def finish(self) -> None:
        """The evaluation is whole, and kept elsewhere."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
