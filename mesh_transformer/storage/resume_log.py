# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What is done of a conversion, so that one that was killed goes on where it was."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        """A block is written; should a power cut undo that, the proof finds it."""
        self.done[key] = value
        with open(self.path, "a") as file:
            file.write(json.dumps([key, value]) + "\n")
