# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Records a run: logs the metrics of each step, displays progress, saves checkpoints, and stops on skipped steps."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mesh_transformer.data.loader import Batch
from mesh_transformer.distributed.coordination import process_index
from mesh_transformer.reports.console import Progress
from mesh_transformer.reports.html_report import write_report
from mesh_transformer.reports.metrics_log import MetricsLog
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.train.data_log import BatchRecord, DataLog, digest_tokens
from mesh_transformer.train.flops import measure_matmul_peak
from mesh_transformer.train.run import Run
from mesh_transformer.train.schedule import batch_size_at, first_sequence

SLOW_SECONDS = 10.0  # a longer wait for an earlier save is logged


class TooManySkippedSteps(RuntimeError):
    """train.max_consecutive_skips consecutive steps were skipped."""


class Recorder:
    """Fetches step metrics, writes logs and progress, saves checkpoints, and measures the throughput."""

    def __init__(self, run: Run, log: MetricsLog, progress: Progress):
        self.run = run
        self.log = log
        self.progress = progress
        self.peak_flops = measure_matmul_peak(run.config.model.dtype)
        self.last_metrics: dict[str, Any] = {}  # as last logged
        self.started = time.perf_counter()
        self._interval_start = self.started  # of the steps since the last line of the log
        self._interval_steps = 0
        self._interval_sequences = 0
        self._saving: int | None = None  # step whose save is in progress
        is_logging_data = run.config.track.sequences and process_index() == 0
        self._data_log = DataLog(run.dir, run.step) if is_logging_data else None

    def log_batch(self, step: int, batch: Batch) -> None:
        """Record the batch of `step` in the data log, before the step starts."""
        if self._data_log:
            train, data = self.run.config.train, self.run.data.train
            first = first_sequence(train, step)
            indices = range(first, first + batch_size_at(train, step))
            sequences = tuple(data.locate(index) for index in indices)
            self._data_log.write(step + 1, BatchRecord(first, sequences, digest_tokens(batch.tokens)))

    def log_step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Wait for the metrics of `step`; log them every train.log_every steps. Raises TooManySkippedSteps."""
        values = {name: np.asarray(value) for name, value in metrics.items()}
        train = self.run.config.train
        self._interval_steps += 1
        self._interval_sequences += batch_size_at(train, step)
        consecutive_skips = int(values.pop("consecutive_skips"))
        if consecutive_skips:
            self._log_skip(step, values, consecutive_skips)
        is_first = self._interval_steps == 1 and not self.last_metrics
        if (step + 1) % train.log_every == 0 or is_first or step + 1 == train.steps:
            self._log_metrics(step, values)

    def exclude_time(self, seconds: float) -> None:
        """Exclude time spent on evaluation and saving from the throughput."""
        self._interval_start += seconds

    def time_limit_reason(self) -> str:
        """Return the reason to stop if `train.max_minutes` have passed, else ""."""
        limit = self.run.config.train.max_minutes
        is_over = limit is not None and time.perf_counter() - self.started > 60 * limit
        return f"train.max_minutes = {limit} has been reached" if is_over else ""

    def save(self, *, last: bool = False) -> None:
        """Save the state, unless its step is already saved. With `last`, wait for the end of the save and raise its errors."""
        step, started = self.run.step, time.perf_counter()
        earlier = self._saving
        self.poll_save(wait=True)
        waited = time.perf_counter() - started
        if waited > SLOW_SECONDS:
            every = self.run.config.checkpoint.every
            text = f"waited {waited:.0f} s for the save of step {earlier}; raise checkpoint.every={every}, or use a faster disk"
            self.log.event(step, "slow disk", text)
            self.progress.note(text)
        if not self.run.store.holds(step):
            self._saving = step
            try:
                self.run.save({"metrics": self.last_metrics})
            except CheckpointError as error:
                self._log_failed_save(error)
                if last:
                    raise
        self.poll_save(wait=last, last=last)
        self.run.folder.request_upload()
        self.exclude_time(time.perf_counter() - started)

    def poll_save(self, *, wait: bool = False, last: bool = False) -> None:
        """Log the result of the save in progress if it has ended, or `wait` for it."""
        if self._saving is None:
            return
        try:
            if wait:
                self.run.store.wait()
            if self.run.store.check():
                self.log.event(self._saving, "checkpoint", f"step {self._saving} saved")
                self._saving = None
        except CheckpointError as error:
            self._log_failed_save(error)
            if last:
                raise

    def write_report(self) -> None:
        """Write report.html in process 0. A full disk is logged and does not stop the run."""
        if process_index() > 0:
            return
        try:
            write_report(self.run.dir)
        except OSError as error:
            self.progress.note(f"report.html was not written: {error}")

    def close(self) -> None:
        """Close the data log."""
        try:
            if self._data_log:
                self._data_log.close()
        except OSError as error:  # not raised, so that it does not hide the error that ended the run
            self.progress.note(str(error))

    def _log_metrics(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        train, now = self.run.config.train, time.perf_counter()
        seconds = max(now - self._interval_start, 1e-9)
        sequences = self._interval_sequences
        metrics = {name: value.tolist() for name, value in values.items()}
        metrics |= {
            "tokens_per_s": sequences * self.run.config.model.seq_len / seconds,
            "mfu": sequences * self.run.flops_per_sequence / seconds / self.peak_flops,
            "step_ms": 1000 * seconds / self._interval_steps,
            "batch_size": batch_size_at(train, step),
            "epoch": self.run.data.train.epochs(first_sequence(train, step + 1)),
        }
        self.last_metrics = metrics
        self.log.train(step + 1, metrics)
        self.progress.update(step + 1, metrics)
        self._interval_start = now
        self._interval_steps = 0
        self._interval_sequences = 0

    def _log_skip(self, step: int, values: Mapping[str, np.ndarray], consecutive_skips: int) -> None:
        train = self.run.config.train
        first = first_sequence(train, step)
        text = (
            f"step {step} skipped: loss {float(values['loss']):.4g}, grad norm {float(values['grad_norm']):.4g}, "
            f"sequences {first} to {first + batch_size_at(train, step) - 1}"
        )
        self.log.event(step + 1, "skipped", text)
        self.progress.note(text)
        if consecutive_skips >= train.max_consecutive_skips:
            self.save(last=True)
            raise TooManySkippedSteps(
                f"{consecutive_skips} consecutive steps were skipped (train.max_consecutive_skips = "
                f"{train.max_consecutive_skips}); the last: {text}. The parameters of the last good step are saved as "
                f"step {self.run.step}. Inspect the data (--show-data), lower optimizer.learning_rate, or raise "
                "train.max_consecutive_skips"
            )

    def _log_failed_save(self, error: CheckpointError) -> None:
        failed, self._saving = self._saving, None
        text = f"SAVE FAILED: {error}; training continues, and the next save follows at the next interval"
        self.log.event(failed or 0, "save failed", text)
        self.progress.note(text)
