# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The training loop: batch, step, metrics of the previous step, checkpoint, validation, evaluation tasks."""

import contextlib
import time
from collections.abc import Callable, Mapping

import jax

from mesh_transformer.cli import Preempted
from mesh_transformer.data.loader import Prefetcher
from mesh_transformer.distributed.coordination import process_index
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.reports.console import ProgressFn
from mesh_transformer.reports.evaluation_results import Evaluation, metrics_of, write_evaluation
from mesh_transformer.train.recorder import Recorder
from mesh_transformer.train.run import Run
from mesh_transformer.train.schedule import batch_size_at, first_sequence
from mesh_transformer.train.validation import compressed_bits_per_byte, validate

MeasureFn = Callable[[Run, ProgressFn], Evaluation]  # runs the tasks of [evaluate]; evaluate/callback.py makes it


class MeasurementInterrupted(Exception):
    """A stop request interrupted the evaluation tasks."""


def train(
    run: Run,
    recorder: Recorder,
    stop: StopRequest | None = None,
    *,
    profile: tuple[int, int] | None = None,
    measure: MeasureFn | None = None,
) -> None:
    """Train to the last step, then save, validate and run the evaluation tasks (`measure`) on the final state.

    The host waits for the devices only to read the metrics of step n - 1, after step n is dispatched. A failed save is
    logged and retried at the next interval. Raises Preempted after a stop request or `train.max_minutes`, and
    TooManySkippedSteps, both with a committed checkpoint; CheckpointError if the last save fails.
    """
    with contextlib.closing(recorder), contextlib.nullcontext(stop) if stop else StopRequest() as stop:
        train_steps(run, recorder, stop, profile, measure)
        recorder.save(last=True)
        if not stop.should_stop() and run.step == run.config.train.steps:
            _validate(run, recorder, stop, final=True)
            _run_evaluation_tasks(run, recorder, stop, measure)
        reason = stop.should_stop()
    recorder.write_report()
    if reason:
        recorder.log.event(run.step, "stopped", f"{reason}: stopped after saving step {run.step}")
        raise Preempted(
            f"{reason}: saved step {run.step} of {run.config.train.steps} in {run.store.root}; "
            "run the same command again to continue"
        )


def train_steps(
    run: Run,
    recorder: Recorder,
    stop: StopRequest,
    profile: tuple[int, int] | None = None,
    measure: MeasureFn | None = None,
) -> None:
    """Run the steps from `run.step` to the last step or to a stop request; log, save and evaluate as configured."""
    config, train = run.config, run.config.train
    steps = range(run.step, train.steps)
    if not steps:
        return
    previous: tuple[int, Mapping[str, jax.Array]] | None = None
    with Prefetcher(run.data.train, (_batch_rows(run, step) for step in steps)) as batches:
        for step, batch in zip(steps, batches, strict=False):
            if profile and step == profile[0]:
                jax.profiler.start_trace(str(run.dir / "profile"))
            sharded_batch = run.shard_batch(batch, batch_size_at(train, step))
            if step == steps[0]:
                recorder.progress.note("compiling the training step ...")
            recorder.log_batch(step, batch)
            run.state, metrics = run.train_step(run.state, sharded_batch)
            recorder.poll_save()
            if previous:
                recorder.log_step(*previous)
            previous = (step, metrics)
            if profile and step + 1 == profile[1]:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
                recorder.progress.note(
                    f"wrote the profile of steps {profile[0]} to {profile[1]} to {run.dir / 'profile'}"
                )
            done = step + 1
            is_last = done == train.steps
            if _is_due(config.checkpoint.every, done) and not is_last:
                recorder.save()
            if _is_due(train.evaluate_every, done) and not is_last:
                _validate(run, recorder, stop, final=False)
            if _is_due(config.evaluate.every, done) and not is_last:
                _run_evaluation_tasks(run, recorder, stop, measure)
            if stop.should_stop("" if is_last else recorder.time_limit_reason()):
                break
    if previous:
        recorder.log_step(*previous)


def _batch_rows(run: Run, step: int) -> tuple[int, int, list[int]]:
    """Return the first sequence of the step's batch, its size, and the rows that this process reads."""
    size = batch_size_at(run.config.train, step)
    return first_sequence(run.config.train, step), size, run.local_rows(size)


def _is_due(every: int | None, done: int) -> bool:
    return bool(every) and done % every == 0


def _validate(run: Run, recorder: Recorder, stop: StopRequest, *, final: bool) -> None:
    """Compute the loss of the validation sets; with `final`, use all batches and score compressors too."""
    started, step = time.perf_counter(), run.step
    size = run.config.train.batch_size
    for name, validation in run.data.validation.items():
        score = validate(
            validation,
            lambda batch: run.eval_step(run.state.params, run.shard_batch(batch, size)),
            rows=run.local_rows(size),
            max_batches=None if final else run.config.train.evaluate_batches,
            should_stop=lambda: bool(stop.should_stop()),
            on_progress=lambda done, total, name=name: recorder.progress.show_validation(name, done, total),
        )
        if score is None:
            return
        values = {"loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
        if final and process_index() == 0:
            values |= compressed_bits_per_byte(validation.text(), lambda: bool(stop.requested))
        recorder.log.evaluation(step, name, values)
        recorder.progress.update(step, {f"{name}_bits_per_byte": score.bits_per_byte})
    recorder.exclude_time(time.perf_counter() - started)


def _run_evaluation_tasks(run: Run, recorder: Recorder, stop: StopRequest, measure: MeasureFn | None) -> None:
    """Run the tasks of [evaluate] on the current state and log their results; a stop request discards them."""
    if measure is None or stop.should_stop():
        return
    started, step = time.perf_counter(), run.step

    def on_progress(task: str, done: int, total: int | None) -> None:
        recorder.progress.show_evaluation(task, done, total)
        if stop.should_stop():
            raise MeasurementInterrupted(task)

    try:
        evaluation = measure(run, on_progress)
    except MeasurementInterrupted:
        return
    values = metrics_of(evaluation)
    recorder.log.benchmark(step, values)
    recorder.progress.show_results(step, values)
    if process_index() == 0:
        write_evaluation(run.dir, step, evaluation)
    recorder.exclude_time(time.perf_counter() - started)
