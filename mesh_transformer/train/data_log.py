# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Data log: the sequences in the batch of each step, for every attempt of a run, in chronological order.

sequences.jsonl is written if `track.sequences` is set. It is never truncated, so it also records steps whose result
was discarded:

    {"from_step": 4}                                                    an attempt starts: steps 5, 6, ... follow
    {"step": 5, "first": 32, "sequences": [[<dataset>, <sequence>], ...], "digest": <xxh3-64 of the tokens>}

`step` counts steps taken, as in metrics.jsonl. `digest` is computed from the tokens of the batch (process 0's part of
the batch), so that the sequences can be checked against the data.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from mesh_transformer.storage.atomic_files import LineFile

FILE = "sequences.jsonl"


class BatchRecord(NamedTuple):
    """The batch of one step."""

    first: int  # index of the batch's first sequence in the run's order
    sequences: tuple[tuple[int, int], ...]  # (dataset, sequence of the dataset) of each row
    digest: str


class DataLog:
    """Writer of sequences.jsonl; a line is passed to the operating system before its step starts."""

    def __init__(self, run_dir: Path, from_step: int):
        self._file = LineFile(run_dir / FILE)
        self._write({"from_step": from_step})

    def write(self, step: int, batch: BatchRecord) -> None:
        """Record the batch of step number `step`, counted from 1."""
        self._write({"step": step, **batch._asdict()})

    def close(self) -> None:
        """Close the file. Raises OSError if a full disk has not accepted every line."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode())


def digest_tokens(tokens: np.ndarray) -> str:
    """Return the xxh3-64 digest of int32 tokens [B, T]."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(tokens, np.int32).tobytes())


def read_log(run_dir: Path) -> list[tuple[int, dict[int, BatchRecord]]]:
    """Return `from_step` and the batch of each step, for every attempt; an incomplete last line is skipped."""
    path = run_dir / FILE
    *complete, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    attempts: list[tuple[int, dict[int, BatchRecord]]] = []
    for line in map(json.loads, filter(None, complete)):
        if "from_step" in line:
            attempts.append((line["from_step"], {}))
        else:
            sequences = tuple((dataset, sequence) for dataset, sequence in line["sequences"])
            attempts[-1][1][line["step"]] = BatchRecord(line["first"], sequences, line["digest"])
    return attempts


def effective_history(attempts: Sequence[tuple[int, dict[int, BatchRecord]]]) -> dict[int, BatchRecord]:
    """Return the batches that trained the final state, by step: each attempt's steps up to the next attempt's start."""
    steps: dict[int, BatchRecord] = {}
    for from_step, batches in attempts:
        steps = {step: batch for step, batch in steps.items() if step <= from_step} | batches
    return dict(sorted(steps.items()))
