# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""sequences.jsonl: which sequences each step was given, by every attempt of a run, in the order in which it happened.

Written where `track.sequences` asks for it, and never cut, so that it also tells what was done in vain:

    {"from_step": 4}                                                    an attempt begins: steps 5, 6, ... come next
    {"step": 5, "first": 32, "sequences": [[<source>, <number>], ...], "digest": <xxh3-64 of the tokens>}

`step` counts steps taken, as in metrics.jsonl. `digest` is of the tokens that the step was given (of this process's
part of the batch), so that the numbers can be held against the data itself.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from mesh_transformer.storage.atomic_files import LineFile

FILE = "sequences.jsonl"


class Given(NamedTuple):
    """What one step was given."""

    first: int  # number of the batch's first sequence in the run's order
    sequences: tuple[tuple[int, int], ...]  # (source, its sequence) of each
    digest: str


class SequenceLog:
    """Appends to sequences.jsonl; every line is with the system before its step begins."""

    def __init__(self, run_dir: Path, from_step: int):
        self._file = LineFile(run_dir / FILE)
        self._write({"from_step": from_step})

    def given(self, step: int, given: Given) -> None:
        """The step that makes `step` steps taken is given this."""
        self._write({"step": step, **given._asdict()})

    def close(self) -> None:
        """No more lines; OSError if a full disk has not taken them all."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode())


def digest_tokens(tokens: np.ndarray) -> str:
    """Of int32 tokens [B, T]."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(tokens, np.int32).tobytes())


def read_attempts(run_dir: Path) -> list[tuple[int, dict[int, Given]]]:
    """Of every attempt, the step it began from, and what each of its steps was given; a cut last line is left out."""
    path = run_dir / FILE
    *whole, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    attempts: list[tuple[int, dict[int, Given]]] = []
    for line in map(json.loads, filter(None, whole)):
        if "from_step" in line:
            attempts.append((line["from_step"], {}))
        else:
            sequences = tuple((source, number) for source, number in line["sequences"])
            attempts[-1][1][line["step"]] = Given(line["first"], sequences, line["digest"])
    return attempts


def what_counts(attempts: Sequence[tuple[int, dict[int, Given]]]) -> dict[int, Given]:
    """What the state at the end has been trained on, by step: each attempt's steps up to where the next one began."""
    steps: dict[int, Given] = {}
    for from_step, given in attempts:
        steps = {step: it for step, it in steps.items() if step <= from_step} | given
    return dict(sorted(steps.items()))
