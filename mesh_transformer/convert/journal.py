# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What is done of a conversion, so that one that was killed goes on where it was."""

import collections
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.commit import BLOCKS_IN_FLIGHT
from mesh_transformer.convert.lazy import FileArray
from mesh_transformer.convert.tensor_files import write_values

JOURNAL = "journal.jsonl"


class Journal:
    """What is done of a conversion; another conversion than the one that was begun starts from nothing."""

    def __init__(self, partial: Path, identity: Mapping[str, Any]):
        self.path, self.done = partial / JOURNAL, {}
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        first = json.dumps({"conversion": identity})
        if not lines or lines[0] != first:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            self.path.write_text(first + "\n")
        for line in lines[1:] if lines and lines[0] == first else ():
            try:
                key, value = json.loads(line)
            except ValueError:  # the last line of a killed process
                break
            self.done[key] = value

    def add(self, key: str, value: Any) -> None:
        """A block is on disk."""
        self.done[key] = value
        with open(self.path, "a") as file:
            file.write(json.dumps([key, value]) + "\n")


class RowWriter:
    """Makes rows of tensors, writes and syncs them, several blocks side by side; the journal hears of what is on disk."""

    def __init__(self, journal: Journal):
        self._journal, self._flying = journal, collections.deque[tuple[str, Future[None]]]()
        self._writers = ThreadPoolExecutor(BLOCKS_IN_FLIGHT)

    def write(self, key: str, place: FileArray, first: int, make: Callable[[], np.ndarray]) -> None:
        """Returns before it is done, with some blocks on their way."""
        self._flying.append((key, self._writers.submit(lambda: write_values(place, first, make()))))
        while len(self._flying) >= 2 * BLOCKS_IN_FLIGHT:
            self._land()

    def finish(self) -> None:
        """Until all is on disk."""
        while self._flying:
            self._land()

    def _land(self) -> None:
        key, future = self._flying.popleft()
        future.result()
        self._journal.add(key, True)
