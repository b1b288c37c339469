# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself: metrics.jsonl always; TensorBoard and Weights & Biases when installed and asked for.

One JSON object a line, in order of steps, one history however often the run was resumed:

    {"step": 10, "kind": "train", "time": <unix seconds>, "loss": ..., "grad_norm": ..., "learning_rate": ...,
     "tokens_per_s": ..., "mfu": <share of the measured product peak>, "step_ms": ..., "skipped": <so far>,
     "batch_size": ..., "epoch": ..., "noise_scale": ..., "layer_grad_norms": [...]}
    {"step": 100, "kind": "evaluation", "set": "stdlib", "loss": ..., "perplexity": ..., "bits_per_byte": ...,
     "gzip_bits_per_byte": ..., "xz_bits_per_byte": ...}
    {"step": 100, "kind": "event", "event": "resumed" | "checkpoint" | "skipped" | "samples" | "done", "text": ...}

`step` counts steps taken. A number that is not finite is null.
"""

import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mesh_transformer.config import ConfigError, TrackConfig

FILE = "metrics.jsonl"
QUEUE_LINES = 1000  # lines a tracker may lag behind before the newest are dropped


class MetricsLog:
    """Appends to metrics.jsonl and feeds the trackers; `with` it, so that they are closed."""

    def __init__(self, run_dir: Path, track: TrackConfig, *, config: Mapping[str, Any], first_step: int):
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE
        _truncate_after(self.path, first_step)
        self._trackers = [Tracker(name, make) for name, make in _find_trackers(run_dir, track, config)]
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Metrics of the step that made `step` steps taken."""
        self._write({"step": step, "kind": "train", **values})

    def evaluation(self, step: int, name: str, values: Mapping[str, Any]) -> None:
        """The score on validation set `name`."""
        self._write({"step": step, "kind": "evaluation", "set": name, **values})

    def event(self, step: int, event: str, text: str) -> None:
        """Something that happened."""
        self._write({"step": step, "kind": "event", "event": event, "text": text})

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, line: dict[str, Any]) -> None:
        line = {"time": round(time.time(), 3), **{name: _finite(value) for name, value in line.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.put(line)


class Tracker:
    """A tracker's own thread: neither its speed nor its failure reaches training."""

    def __init__(self, name: str, make: Callable[[], tuple[Callable[[dict[str, Any]], None], Callable[[], None]]]):
        self.name = name
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_LINES)
        self._write, self._close = make()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, line: dict[str, Any]) -> None:
        """Hand over a line; dropped if the tracker is far behind."""
        if self._thread.is_alive() and not self._lines.full():
            self._lines.put_nowait(line)

    def close(self, seconds: float = 10.0) -> None:
        """Give the tracker some time to finish."""
        if self._thread.is_alive():
            self._lines.put(None)
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while (line := self._lines.get()) is not None:
                self._write(line)
            self._close()
        except Exception as error:
            print(f"{self.name} failed and is off from here on: {error}", file=sys.stderr, flush=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        if text.endswith("\n"):
            lines.append(json.loads(text))
    return lines


def _truncate_after(path: Path, step: int) -> None:
    """Drop what an earlier attempt wrote after the step that training starts from."""
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] <= step]
    if not path.exists() or (len(kept) == len(lines) and path.read_bytes().endswith(b"\n")):
        return
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _find_trackers(run_dir: Path, track: TrackConfig, config: Mapping[str, Any]) -> list[tuple[str, Callable[[], Any]]]:
    found: list[tuple[str, Callable[[], Any]]] = []
    if track.tensorboard:
        found.append(("TensorBoard", lambda: _open_tensorboard(run_dir)))
    if track.wandb_project:
        found.append(("Weights & Biases", lambda: _open_wandb(run_dir, str(track.wandb_project), config)))
    return found


def _open_tensorboard(run_dir: Path) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError(
            "track.tensorboard = true needs tensorboardX: pip install 'mesh-transformer[track]'"
        ) from None
    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(line: dict[str, Any]) -> None:
        for name, value in _numbers(line).items():
            writer.add_scalar(name, value, line["step"], walltime=line["time"])

    return write, writer.close


def _open_wandb(
    run_dir: Path, project: str, config: Mapping[str, Any]
) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    try:
        import wandb
    except ImportError:
        raise ConfigError("track.wandb_project needs wandb: pip install 'mesh-transformer[track]'") from None
    run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=dict(config))
    # The step travels as a value: a resumed run may log a step again, which wandb's own counter would drop.
    return (lambda line: run.log({**_numbers(line), "step": line["step"]})), run.finish


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """Scalars of a line under "kind/name", or "evaluation/set/name"."""
    prefix = "/".join([line["kind"], *([line["set"]] if "set" in line else [])])
    return {f"{prefix}/{name}": value for name, value in line.items() if isinstance(value, float) and name != "time"}
