# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The loop: batch, step, metrics of the step before, evaluation, checkpoint; until done, or asked to stop."""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mesh_transformer.cli import Preempted
from mesh_transformer.data.loader import Batch, Prefetcher
from mesh_transformer.distributed.coordination import process_index
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.reports.console import Progress
from mesh_transformer.reports.evaluation_results import Evaluation, metrics_of, write_evaluation
from mesh_transformer.reports.html_report import write_report
from mesh_transformer.reports.metrics_log import MetricsLog
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.train.data_log import BatchRecord, DataLog, digest_tokens
from mesh_transformer.train.flops import measure_matmul_peak
from mesh_transformer.train.run import Run
from mesh_transformer.train.schedule import batch_size_at, first_sequence
from mesh_transformer.train.validation import compressed_bits_per_byte, evaluate

SLOW_SECONDS = 10.0  # that training may wait for an earlier save without a word


class TooManySkippedSteps(RuntimeError):
    """Steps were skipped until train.max_consecutive_skips was reached."""


class MeasurementInterrupted(Exception):
    """A measurement was broken off, because the run is to stop."""


ProgressFn = Callable[[str, int, int | None], None]  # what is being measured, how much is done, of how much
MeasureFn = Callable[[Run, ProgressFn], Evaluation]  # the tasks of [evaluate], as evaluate/callback.py makes it


def train(
    run: Run,
    recorder: "Recorder",
    stop: StopRequest | None = None,
    *,
    profile: tuple[int, int] | None = None,
    measure: MeasureFn | None = None,
) -> None:
    """Train to the last step; afterwards `run.state` is final, saved, evaluated, and measured if there is a `measure`.

    Nothing here waits for a device except the metrics of step n - 1, read after step n was handed over. A save that
    fails is reported, and tried again at the next interval. Raises Preempted after a request to stop or
    `train.max_minutes`, with a checkpoint committed; TooManySkipped likewise; CheckpointError if the last save fails.
    """
    with contextlib.closing(recorder), contextlib.nullcontext(stop) if stop else StopRequest() as stop:
        train_steps(run, recorder, stop, profile, measure)
        recorder.save(last=True)
        if not stop.should_stop() and run.step == run.config.train.steps:
            _evaluate(run, recorder, stop, whole=True)
            _measure(run, recorder, stop, measure)
        reason = stop.should_stop()
    recorder.write_report()
    if reason:
        recorder.log.event(run.step, "stopped", f"{reason}: stopped with step {run.step} saved")
        raise Preempted(
            f"{reason}: saved step {run.step} of {run.config.train.steps} in {run.store.root}; "
            "run the same command again to continue"
        )


def train_steps(
    run: Run,
    recorder: "Recorder",
    stop: StopRequest,
    profile: tuple[int, int] | None = None,
    measure: MeasureFn | None = None,
) -> None:
    """The steps from `run.step` to the last one, or to a request to stop, each recorded and saved as configured."""
    config, train = run.config, run.config.train
    first = run.step
    if first >= train.steps:
        return

    def place(step: int) -> tuple[int, int, list[int]]:
        size = batch_size_at(train, step)
        return first_sequence(train, step), size, run.local_rows(size)

    previous: tuple[int, Mapping[str, jax.Array]] | None = None
    with Prefetcher(run.data.train, map(place, range(first, train.steps))) as batches:
        for step, batch in zip(range(first, train.steps), batches, strict=False):
            if profile and step == profile[0]:
                jax.profiler.start_trace(str(run.dir / "profile"))
            placed = run.shard_batch(batch, batch_size_at(train, step))
            if step == first:
                recorder.progress.note("compiling the training step ...")
            recorder.log_batch(step, batch)
            run.state, metrics = run.train_step(run.state, placed)
            recorder.poll_save()
            if previous:
                recorder.log_step(*previous)
            previous = (step, metrics)
            if profile and step + 1 == profile[1]:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
                recorder.progress.note(f"profile of steps {profile[0]} to {profile[1]} in {run.dir / 'profile'}")
            done = step + 1
            if done % config.checkpoint.every == 0 and done < train.steps:
                recorder.save()
            if train.evaluate_every and done % train.evaluate_every == 0 and done < train.steps:
                _evaluate(run, recorder, stop, whole=False)
            if config.evaluate.every and done % config.evaluate.every == 0 and done < train.steps:
                _measure(run, recorder, stop, measure)
            if stop.should_stop(recorder.time_limit_reason() if done < train.steps else ""):
                break
    if previous:
        recorder.log_step(*previous)


def _evaluate(run: Run, recorder: "Recorder", stop: StopRequest, *, whole: bool) -> None:
    """Every validation set; the whole of it, and beside general compressors, at the end of the run."""
    started = time.perf_counter()
    step = run.step
    size = run.config.train.batch_size
    for name, validation in run.data.validation.items():
        score = evaluate(
            validation,
            lambda batch: run.eval_step(run.state.params, run.shard_batch(batch, size)),
            rows=run.local_rows(size),
            max_batches=None if whole else run.config.train.evaluate_batches,
            should_stop=lambda: bool(stop.should_stop()),
            report=lambda done, total, name=name: recorder.progress.show_validation(name, done, total),
        )
        if score is None:
            return
        compare = whole and process_index() == 0
        compressed = compressed_bits_per_byte(validation.text(), lambda: bool(stop.requested)) if compare else {}
        values = {
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            **compressed,
        }
        recorder.log.evaluation(step, name, values)
        recorder.progress.update(step, {f"{name}_bits_per_byte": score.bits_per_byte})
    recorder.exclude_time(time.perf_counter() - started)


def _measure(run: Run, recorder: "Recorder", stop: StopRequest, measure: MeasureFn | None) -> None:
    """The tasks of [evaluate] on the state as it is, into the run folder and the metrics; nothing if the run is to stop."""
    if measure is None or stop.should_stop():
        return
    started, step = time.perf_counter(), run.step

    def tell(what: str, done: int, total: int | None) -> None:
        recorder.progress.show_evaluation(what, done, total)
        if stop.should_stop():
            raise MeasurementInterrupted(what)

    try:
        evaluation = measure(run, tell)
    except MeasurementInterrupted:
        return
    values = metrics_of(evaluation)
    recorder.log.benchmark(step, values)
    recorder.progress.show_results(step, values)
    if process_index() == 0:
        write_evaluation(run.dir, step, evaluation)
    recorder.exclude_time(time.perf_counter() - started)


class Recorder:
    """Turns a step's device scalars into log lines, display and refusals; owns the clock."""

    def __init__(self, run: Run, log: MetricsLog, progress: Progress):
        self.run, self.log, self.progress = run, log, progress
        self.last: dict[str, Any] = {}
        self.started = self._interval_start = time.perf_counter()
        self._interval_steps = self._interval_sequences = 0
        self.peak = measure_matmul_peak(run.config.model.dtype)
        self._saving: int | None = None  # the step that is on its way to disk
        is_asked = run.config.track.sequences and process_index() == 0
        self._sequences = DataLog(run.dir, run.step) if is_asked else None

    def log_batch(self, step: int, batch: Batch) -> None:
        """This batch is what `step` is about to be given."""
        if self._sequences:
            train, data = self.run.config.train, self.run.data.train
            first = first_sequence(train, step)
            rows = range(first, first + batch_size_at(train, step))
            self._sequences.write(
                step + 1, BatchRecord(first, tuple(map(data.locate, rows)), digest_tokens(batch.tokens))
            )

    def save(self, *, last: bool = False) -> None:
        """Hand the state to the store, unless it has it. With `last` wait for the disk, and raise what fails."""
        step, started = self.run.step, time.perf_counter()
        before = self._saving
        self.poll_save(wait=True)
        waited = time.perf_counter() - started
        if waited > SLOW_SECONDS:
            text = f"waited {waited:.0f} s for the save of step {before}: the disk is slower than checkpoint.every asks"
            self.log.event(step, "slow disk", text)
            self.progress.note(text)
        if not self.run.store.holds(step):
            self._saving = step
            try:
                self.run.save({"metrics": self.last})
            except CheckpointError as error:
                self._save_failed(error)
                if last:
                    raise
        self.poll_save(wait=last, last=last)
        self.run.folder.request_upload()
        self.exclude_time(time.perf_counter() - started)

    def poll_save(self, *, wait: bool = False, last: bool = False) -> None:
        """Say how the save under way ended, once it has."""
        if self._saving is None:
            return
        try:
            if wait:
                self.run.store.wait()
            if self.run.store.check():
                self.log.event(self._saving, "checkpoint", f"step {self._saving} saved")
                self._saving = None
        except CheckpointError as error:
            self._save_failed(error)
            if last:
                raise

    def close(self) -> None:
        """No more steps."""
        try:
            if self._sequences:
                self._sequences.close()
        except OSError as lost:  # how the run ended is told by its own error
            self.progress.note(str(lost))

    def write_report(self) -> None:
        """report.html, by process 0; a full disk costs the page, not the run."""
        if process_index() > 0:
            return
        try:
            write_report(self.run.dir)
        except OSError as error:
            self.progress.note(f"no report: {error}")

    def log_step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Wait for `step`'s metrics, count it, and write them out when it is a step to log."""
        values = {name: np.asarray(value) for name, value in metrics.items()}
        train = self.run.config.train
        self._interval_steps += 1
        self._interval_sequences += batch_size_at(train, step)
        in_a_row = int(values.pop("skipped_in_a_row"))
        if in_a_row:
            self._skipped(step, values, in_a_row)
        first = self._interval_steps == 1 and not self.last
        if (step + 1) % train.log_every == 0 or first or step + 1 == train.steps:
            self._write(step, values)

    def exclude_time(self, seconds: float) -> None:
        """Leave time spent on evaluation and saving out of the throughput."""
        self._interval_start += seconds

    def time_limit_reason(self) -> str:
        """The reason to stop, once `train.max_minutes` are over."""
        limit = self.run.config.train.max_minutes
        over = limit is not None and time.perf_counter() - self.started > 60 * limit
        return f"train.max_minutes = {limit} is over" if over else ""

    def _write(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        train, now = self.run.config.train, time.perf_counter()
        seconds = max(now - self._interval_start, 1e-9)
        sequences = self._interval_sequences
        plain = {name: value.tolist() for name, value in values.items()}
        plain |= {
            "tokens_per_s": sequences * self.run.config.model.seq_len / seconds,
            "mfu": sequences * self.run.flops_per_sequence / seconds / self.peak,
            "step_ms": 1000 * seconds / self._interval_steps,
            "batch_size": batch_size_at(train, step),
            "epoch": self.run.data.train.epochs(first_sequence(train, step + 1)),
        }
        self.last = plain
        self.log.train(step + 1, plain)
        self.progress.update(step + 1, plain)
        self._interval_start, self._interval_steps, self._interval_sequences = now, 0, 0

    def _skipped(self, step: int, values: Mapping[str, np.ndarray], in_a_row: int) -> None:
        train = self.run.config.train
        first = first_sequence(train, step)
        text = (
            f"step {step} skipped: loss {float(values['loss']):.4g}, gradient norm {float(values['grad_norm']):.4g}, "
            f"sequences {first} to {first + batch_size_at(train, step) - 1}"
        )
        self.log.event(step + 1, "skipped", text)
        self.progress.note(text)
        if in_a_row >= train.max_consecutive_skips:
            self.save(last=True)
            raise TooManySkippedSteps(
                f"{in_a_row} steps in a row were skipped (train.max_consecutive_skips); the last: {text}. Parameters are those of the last "
                f"good step, saved as step {self.run.step}. Look at the data (--look), lower optimizer.learning_rate, "
                "or raise train.max_consecutive_skips"
            )

    def _save_failed(self, error: CheckpointError) -> None:
        failed, self._saving = self._saving, None
        text = f"SAVE FAILED: {error}; training goes on, the next try is the next save"
        self.log.event(failed or 0, "save failed", text)
        self.progress.note(text)
