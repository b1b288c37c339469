# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself: metrics.jsonl always; TensorBoard and Weights & Biases when installed and asked for.

One JSON object a line, in order of steps, one history however often the run was resumed:

    {"step": 10, "kind": "train", "time": <unix seconds>, "loss": ..., "grad_norm": ..., "learning_rate": ...,
     "tokens_per_s": ..., "mfu": <share of the measured product peak>, "step_ms": ..., "skipped": <so far>,
     "batch_size": ..., "epoch": ..., "noise_scale": ..., "layer_grad_norms": [...]}
     with experts: "balance_loss": <1 where even>, "router_z_loss": ..., "router_entropy": <nats>, "dropped_share": ...,
     "expert_load": [[<multiples of an even load>], ... <of `pick_layers`>], "largest_expert_load": <of any layer>,
     "unused_experts": <in all layers>
    {"step": 100, "kind": "evaluation", "set": "stdlib", "loss": ..., "perplexity": ..., "bits_per_byte": ...,
     "gzip_bits_per_byte": ..., "xz_bits_per_byte": ...}
    {"step": 100, "kind": "benchmark", "hellaswag.acc": ..., "text:stdlib.bits_per_byte": ...}   TASK.METRIC of [evaluate]
    {"step": 100, "kind": "event", "event": "started" | "resumed" | "checkpoint" | "save failed" | "skipped" | "stopped" |
     "samples" | "done", "text": ...}

`step` counts steps taken; the event of a checkpoint comes once it is on disk, a few lines late. A number that is not
finite is null, and `"not_finite": {"loss": "nan"}` says what it was. An event may carry values as well: `parameters`, the
number of learned values, belongs to the headline of the report.
"""

import importlib
import json
import math
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from mesh_transformer.config import ConfigError, TrackConfig
from mesh_transformer.distributed.coordination import process_index
from mesh_transformer.storage.atomic_files import LineFile, replace_file

FILE = "metrics.jsonl"
QUEUE_LINES = 1000  # lines a tracker may lag behind before the newest are dropped
CLOSE_SECONDS = 10.0  # a tracker has at the end of a run
SYNC_SECONDS = 30.0  # of lines that a power failure may take; a crash of the program takes none


def representative_layers(count: int) -> list[int]:
    """Up to four of so many layers, the first and the last among them: those of which a page shows more than a mean."""
    return sorted({0, count // 3, 2 * count // 3, count - 1})


class MetricsError(ValueError):
    """A metrics.jsonl that is not ours, or damaged elsewhere than at its end."""


class MetricsLog:
    """Appends to metrics.jsonl and feeds the trackers; `with` it, so that they are closed.

    What an earlier attempt wrote after `first_step`, where training now goes on, is cut off first. Raises ConfigError
    where `track` asks for a package that is not installed, MetricsError for a damaged file. In processes but the first
    it takes everything and writes nothing.
    """

    def __init__(self, run_dir: Path, track: TrackConfig, *, config: Mapping[str, Any], first_step: int):
        self._file = None
        if process_index() > 0:
            return
        trackers = _find_trackers(run_dir, track, config, first_step)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE
        _truncate_after(self.path, first_step)
        self._file = LineFile(self.path)
        self._synced = time.monotonic()
        self._trackers = [Tracker(name, start) for name, start in trackers.items()]

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Metrics of the step that made `step` steps taken."""
        self._write({"step": step, "kind": "train", **values})

    def evaluation(self, step: int, name: str, values: Mapping[str, Any]) -> None:
        """The score on validation set `name`."""
        self._write({"step": step, "kind": "evaluation", "set": name, **values})

    def benchmark(self, step: int, values: Mapping[str, float]) -> None:
        """Results of the tasks of [evaluate], "TASK.METRIC" -> value."""
        self._write({"step": step, "kind": "benchmark", **values})

    def event(self, step: int, event: str, text: str, values: Mapping[str, Any] | None = None) -> None:
        """Something that happened."""
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
        except OSError as lost:
            if kind is None:
                raise
            print(lost, file=sys.stderr, flush=True)  # what ends the run is told by its own error

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


class Sink(NamedTuple):
    """Where a tracker's lines go once it is started."""

    write: Callable[[dict[str, Any]], object]
    close: Callable[[], object]


class Tracker:
    """A tracker's own thread, which also starts it: neither its speed nor its failure reaches training."""

    def __init__(self, name: str, start: Callable[[], Sink]):
        self.name, self.dropped = name, 0
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_LINES)
        self._thread = threading.Thread(target=self._run, args=(start,), name=name, daemon=True)
        self._thread.start()

    def put(self, line: dict[str, Any]) -> None:
        """Hand over a line; dropped, and counted, if the tracker is far behind."""
        if self._thread.is_alive():
            try:
                self._lines.put_nowait(line)
            except queue.Full:
                self.dropped += 1

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Give the tracker some time to finish; say so if that was not enough, or if it had fallen behind before."""
        until = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < until:  # the thread may end while its queue is full
            try:
                self._lines.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self._thread.join(max(until - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._say(f"did not finish in {seconds:g} s; {FILE} has what it did not send")
        elif self.dropped:
            self._say(f"was too slow for {self.dropped} lines; {FILE} has them")

    def _run(self, start: Callable[[], Sink]) -> None:
        try:
            sink = start()
            while (line := self._lines.get()) is not None:
                sink.write(line)
            sink.close()
        except Exception as error:
            self._say(f"failed and is off from here on: {type(error).__name__}: {error}")

    def _say(self, text: str) -> None:
        print(f"{self.name} {text}", file=sys.stderr, flush=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl, none if there is no such file; a last line that a crash cut short is left out.

    Raises MetricsError, with file and line, for anything else that is not as this module's docstring says.
    """
    return [line for _, line in _read_lines(path)]


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every whole line, as it is written and as what it says."""
    *whole, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines = []
    for number, raw in enumerate(whole, start=1):
        try:
            line = json.loads(raw)
            known = isinstance(line["step"], int) and isinstance(line["kind"], str)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise MetricsError(f"{path}:{number}: not a line of metrics: {raw[:60]!r}; remove it, or the file")
        lines.append((raw + b"\n", line))
    return lines


def _truncate_after(path: Path, step: int) -> None:
    """Drop what an earlier attempt wrote after the step that training starts from, and what a crash cut short."""
    if not path.exists():
        return
    kept, data = b"".join(raw for raw, line in _read_lines(path) if line["step"] <= step), path.read_bytes()
    if data.startswith(kept):
        os.truncate(path, len(kept))  # possible on a full disk, too
    else:
        replace_file(path, kept)


def _to_json(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line that JSON can hold: NumPy's and JAX's numbers as Python's, those that are not finite as null and by name."""
    plain, strange = {}, {}
    for name, value in line.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, float) and not math.isfinite(value):
            strange[name] = str(value)
        plain[name] = _finite(value)
    return plain | ({"not_finite": strange} if strange else {})


def _finite(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _find_trackers(
    run_dir: Path, track: TrackConfig, config: Mapping[str, Any], first_step: int
) -> dict[str, Callable[[], Sink]]:
    """How to start each tracker that is asked for, by name."""
    found = {}
    if track.tensorboard:
        found["TensorBoard"] = _find_tensorboard(run_dir, first_step)
    if track.wandb_project:
        found["Weights & Biases"] = _find_wandb(run_dir, track.wandb_project, config)
    return found


def _find_tensorboard(run_dir: Path, first_step: int) -> Callable[[], Sink]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"track.tensorboard = true needs tensorboardX: pip install 'mesh-transformer[track]' ({error})"
        ) from None

    def start() -> Sink:
        writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)  # hides what was cut off

        def write(line: dict[str, Any]) -> None:
            for name, value in _numbers(line).items():
                writer.add_scalar(name, value, line["step"], walltime=line["time"])

        return Sink(write, writer.close)

    return start


def _find_wandb(run_dir: Path, project: str, config: Mapping[str, Any]) -> Callable[[], Sink]:
    try:
        wandb = importlib.import_module("wandb")  # by name: checked code need not have it installed
    except ImportError as error:
        raise ConfigError(f"track.wandb_project needs wandb: pip install 'mesh-transformer[track]' ({error})") from None

    def start() -> Sink:
        run = wandb.init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config) or None,
            id=_wandb_id(run_dir),
            resume="allow",
        )
        # The step travels as a value: a resumed run may log a step again, which wandb's own counter would drop.
        return Sink(lambda line: run.log({**_numbers(line), "step": line["step"]}), run.finish)

    return start


def _wandb_id(run_dir: Path) -> str:
    """The name under which a run goes on there after it was resumed; chosen once."""
    path = run_dir / "wandb_id"
    if not path.exists():
        replace_file(path, uuid.uuid4().hex.encode())
    return path.read_text(encoding="utf-8")


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of a line under "kind/name", or "evaluation/set/name"."""
    prefix = "/".join([line["kind"], *([line["set"]] if "set" in line else [])])
    numbers = {
        name: value for name, value in line.items() if isinstance(value, int | float) and name not in ("time", "step")
    }
    return {f"{prefix}/{name}": value for name, value in numbers.items()}
