# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""TensorBoard and Weights & Biases: optional trackers that receive every line of metrics.jsonl on a background thread."""

import importlib
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.config import ConfigError, TrackConfig
from mesh_transformer.storage.atomic_files import replace_file

QUEUE_LINES = 1000  # maximum number of lines that wait for a slow tracker; further lines are dropped
CLOSE_SECONDS = 10.0  # time limit for a tracker to finish at the end of a run


class Sink(NamedTuple):
    """Functions that write to and close a started tracker."""

    write: Callable[[dict[str, Any]], object]
    close: Callable[[], object]


class Tracker:
    """Background thread that starts a tracker and sends it lines: a slow or failing tracker does not affect training."""

    def __init__(self, name: str, start: Callable[[], Sink]):
        self.name = name
        self.dropped = 0  # number of lines that were not sent
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_LINES)
        self._thread = threading.Thread(target=self._run, args=(start,), name=name, daemon=True)
        self._thread.start()

    def put(self, line: dict[str, Any]) -> None:
        """Enqueue a line; if the queue is full, drop the line and count it."""
        if self._thread.is_alive():
            try:
                self._lines.put_nowait(line)
            except queue.Full:
                self.dropped += 1

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait for the queue to drain, at most `seconds`; print a warning if lines were not sent."""
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < deadline:  # the thread may end while its queue is full
            try:
                self._lines.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._warn(
                f"did not finish within {seconds:g} s, so its last lines were not sent; metrics.jsonl has all lines"
            )
        elif self.dropped:
            self._warn(f"was too slow, so {self.dropped} lines were not sent; metrics.jsonl has all lines")

    def _run(self, start: Callable[[], Sink]) -> None:
        try:
            sink = start()
            while (line := self._lines.get()) is not None:
                sink.write(line)
            sink.close()
        except Exception as error:
            self._warn(
                f"failed and is disabled for the rest of the run ({type(error).__name__}: {error}); metrics.jsonl has all lines"
            )

    def _warn(self, text: str) -> None:
        print(f"{self.name} {text}", file=sys.stderr, flush=True)


def find_trackers(
    run_dir: Path, track: TrackConfig, config: Mapping[str, Any], first_step: int
) -> dict[str, Callable[[], Sink]]:
    """Return the start function of each configured tracker by name; raise ConfigError if a package is not installed."""
    trackers = {}
    if track.tensorboard:
        trackers["TensorBoard"] = _find_tensorboard(run_dir, first_step)
    if track.wandb_project:
        trackers["Weights & Biases"] = _find_wandb(run_dir, track.wandb_project, config)
    return trackers


def _find_tensorboard(run_dir: Path, first_step: int) -> Callable[[], Sink]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"track.tensorboard = true needs tensorboardX: pip install 'mesh-transformer[track]' ({error})"
        ) from None

    def start() -> Sink:
        # purge_step hides the lines that a resumed run removes from metrics.jsonl
        writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

        def write(line: dict[str, Any]) -> None:
            for name, value in _scalars(line).items():
                writer.add_scalar(name, value, line["step"], walltime=line["time"])

        return Sink(write, writer.close)

    return start


def _find_wandb(run_dir: Path, project: str, config: Mapping[str, Any]) -> Callable[[], Sink]:
    try:
        wandb = importlib.import_module("wandb")  # dynamic, so that type checking does not require wandb
    except ImportError as error:
        raise ConfigError(
            f"track.wandb_project = \"{project}\" needs wandb: pip install 'mesh-transformer[track]' ({error})"
        ) from None

    def start() -> Sink:
        run = wandb.init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config) or None,
            id=_wandb_id(run_dir),
            resume="allow",
        )
        # The step is sent as a value: a resumed run may log a step twice, and wandb's step counter would drop the second line.
        return Sink(lambda line: run.log({**_scalars(line), "step": line["step"]}), run.finish)

    return start


def _wandb_id(run_dir: Path) -> str:
    """Return the id of the wandb run. The id is created once and stored in the run folder, so a resumed run has the same id."""
    path = run_dir / "wandb_id"
    if not path.exists():
        replace_file(path, uuid.uuid4().hex.encode())
    return path.read_text(encoding="utf-8")


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars of a line by "KIND/NAME", or by "evaluation/SET/NAME"."""
    prefix = "/".join([line["kind"], *([line["set"]] if "set" in line else [])])
    scalars = {
        name: value for name, value in line.items() if isinstance(value, int | float) and name not in ("time", "step")
    }
    return {f"{prefix}/{name}": value for name, value in scalars.items()}
