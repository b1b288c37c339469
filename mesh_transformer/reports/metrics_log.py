# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The metrics log of a run: metrics.jsonl, and the optional trackers that receive the same lines.

The file has one JSON object per line, in order of steps. A resumed run continues the same file:

    {"step": 10, "kind": "train", "time": <unix seconds>, ...}          values: TRAIN_METRICS of metrics_table.py
    {"step": 100, "kind": "evaluation", "set": "stdlib", ...}           values: VALIDATION_METRICS of metrics_table.py
    {"step": 100, "kind": "benchmark", "hellaswag.acc": ..., "text:stdlib.bits_per_byte": ...}   TASK.METRIC of [evaluate]
    {"step": 100, "kind": "event", "event": "started" | "resumed" | "checkpoint" | "save failed" | "skipped" | "stopped" |
     "samples" | "done", "text": ...}

`step` counts finished steps. The event of a checkpoint is written once the checkpoint is on disk, so it may follow lines
of later steps. A number that is not finite is null, and `"not_finite": {"loss": "nan"}` holds its value. An event may have
values, such as `parameters`, the number of parameters. Values in files of version 1.0 are renamed when they are read.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mesh_transformer.config import TrackConfig
from mesh_transformer.distributed.coordination import process_index
from mesh_transformer.reports.metrics_table import translate_names
from mesh_transformer.reports.trackers import Tracker, find_trackers
from mesh_transformer.storage.atomic_files import LineFile, replace_file

FILE = "metrics.jsonl"
SYNC_SECONDS = (
    30.0  # a power failure loses at most the lines of this many seconds; a crash of the program loses no line
)


class MetricsError(ValueError):
    """A metrics.jsonl of another program, or a metrics.jsonl with damage before its last line."""


class MetricsLog:
    """Appends lines to metrics.jsonl and sends them to the trackers. Use it in a `with` block, which closes the file and trackers.

    Lines after `first_step`, where training resumes, are removed from the file first. Raises ConfigError if `track` needs a
    package that is not installed, and MetricsError for a damaged file. Only process 0 writes; other processes ignore all calls.
    """

    def __init__(self, run_dir: Path, track: TrackConfig, *, config: Mapping[str, Any], first_step: int):
        self._file = None
        if process_index() > 0:
            return
        trackers = find_trackers(run_dir, track, config, first_step)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE
        _truncate_after(self.path, first_step)
        self._file = LineFile(self.path)
        self._synced = time.monotonic()
        self._trackers = [Tracker(name, start) for name, start in trackers.items()]

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the metrics of a training step; `step` includes this step."""
        self._write({"step": step, "kind": "train", **values})

    def evaluation(self, step: int, name: str, values: Mapping[str, Any]) -> None:
        """Log the scores on validation set `name`."""
        self._write({"step": step, "kind": "evaluation", "set": name, **values})

    def benchmark(self, step: int, values: Mapping[str, float]) -> None:
        """Log results of the tasks of [evaluate] by "TASK.METRIC"."""
        self._write({"step": step, "kind": "benchmark", **values})

    def event(self, step: int, event: str, text: str, values: Mapping[str, Any] | None = None) -> None:
        """Log an event, such as a checkpoint or a skipped step."""
        self._write({"step": step, "kind": "event", "event": event, "text": text, **(values or {})})

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        for tracker in self._trackers:
            tracker.close()
        try:
            self._file.close()
        except OSError as close_error:
            if kind is None:
                raise
            print(
                f"{self.path}: the last lines may be missing: {close_error}", file=sys.stderr, flush=True
            )  # `error` is raised

    def _write(self, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        line = _to_json({"time": round(time.time(), 3), **values})
        now = time.monotonic()
        sync = now - self._synced > SYNC_SECONDS
        self._file.write(json.dumps(line, allow_nan=False).encode(), sync=sync)
        self._synced = now if sync else self._synced
        for tracker in self._trackers:
            tracker.put(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all lines of a metrics.jsonl with current names of values; an incomplete last line is ignored.

    The result is empty if the file does not exist. Raises MetricsError, with file and line, for a line that does not have
    the format of this module's docstring.
    """
    return [_translate(line) for _, line in _read_lines(path)]


def _translate(line: dict[str, Any]) -> dict[str, Any]:
    if line["kind"] != "train":
        return line
    line = translate_names(line)
    if isinstance(line.get("not_finite"), dict):
        line["not_finite"] = translate_names(line["not_finite"])
    return line


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return (bytes, parsed object) of every complete line."""
    *complete, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines = []
    for number, raw in enumerate(complete, start=1):
        try:
            line = json.loads(raw)
            is_valid = isinstance(line["step"], int) and isinstance(line["kind"], str)
        except (ValueError, KeyError, TypeError):
            is_valid = False
        if not is_valid:
            raise MetricsError(
                f'{path}:{number}: not a metrics line, a JSON object with "step" and "kind": {raw[:60]!r}; remove the line, '
                "or move the file out of the run folder"
            )
        lines.append((raw + b"\n", line))
    return lines


def _truncate_after(path: Path, step: int) -> None:
    """Remove an incomplete last line, and the lines after `step`, where training resumes."""
    if not path.exists():
        return
    retained = b"".join(raw for raw, line in _read_lines(path) if line["step"] <= step)
    if path.read_bytes().startswith(retained):
        os.truncate(path, len(retained))  # works also on a full disk
    else:
        replace_file(path, retained)


def _to_json(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line with plain Python numbers; non-finite numbers become null and are listed in "not_finite"."""
    plain = {}
    not_finite = {}
    for name, value in line.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, float) and not math.isfinite(value):
            not_finite[name] = str(value)
        plain[name] = _finite_or_none(value)
    return plain | ({"not_finite": not_finite} if not_finite else {})


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
