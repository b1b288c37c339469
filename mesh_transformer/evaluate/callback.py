# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Callback of the training loop that runs the tasks of [evaluate] every `evaluate.every` steps and at the end."""

from mesh_transformer.config import Config, ConfigError, config_to_dict
from mesh_transformer.distributed.coordination import process_count
from mesh_transformer.evaluate.evaluation import EvalTarget, check_tasks, evaluate_model
from mesh_transformer.evaluate.harness_tasks import load_definition
from mesh_transformer.evaluate.loglikelihood import LoglikelihoodScorer
from mesh_transformer.evaluate.tasks import TEXT, WIKITEXT
from mesh_transformer.reports.console import ProgressFn
from mesh_transformer.reports.evaluation_results import Evaluation
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.engine import EngineOptions
from mesh_transformer.sample.engine.weights import prepare_weights
from mesh_transformer.sample.model_defaults import read_defaults
from mesh_transformer.train.loop import MeasureFn
from mesh_transformer.train.run import Run


def make_measure(config: Config) -> MeasureFn | None:
    """Return the callback for the training loop, or None if [evaluate] names no tasks.

    Raises ConfigError for an invalid [evaluate].
    """
    if not config.evaluate.tasks:
        return None
    generating = [name for name in check_tasks(config) if _generates(name)]
    if generating and process_count() > 1:
        raise ConfigError(
            f"evaluate.tasks: task {generating[0]!r} generates text, which training supports only in 1 process, and "
            f"{process_count()} processes are running; remove the task, and run it on a checkpoint with device_evaluate.py"
        )
    return EvaluationCallback(config, generates=bool(generating))


class EvaluationCallback:
    """Runs the tasks on the current parameters. Every process makes the call, and batches are sharded over all processes.

    A task that generates text needs a second copy of the weights while it runs, sharded for decoding.
    """

    def __init__(self, config: Config, *, generates: bool) -> None:
        self.config = config
        self.generates = generates
        self._scorer: LoglikelihoodScorer | None = None  # compiled once, at the first call
        self._engine: DecoderOnlyEngine | None = None

    def __call__(self, run: Run, on_progress: ProgressFn) -> Evaluation:
        scorer = self._open_scorer(run)
        engine = self._open_engine(run) if self.generates else None
        location = str(run.folder.location)
        try:
            meta = {"config": config_to_dict(self.config), **run.carried}
            defaults = read_defaults(meta, run.data.tokenizer, self.config.model, location)
            target = EvalTarget(self.config, defaults, scorer, engine, run.step, location)
            return evaluate_model(target, on_progress)
        finally:
            scorer.params = None  # free the memory for the next step
            if engine:
                engine.programs.weights = None

    def _open_scorer(self, run: Run) -> LoglikelihoodScorer:
        if self._scorer is None:
            batch_tokens = self.config.evaluate.batch_tokens
            self._scorer = LoglikelihoodScorer(self.config.model, None, run.layout, batch_tokens=batch_tokens)
        self._scorer.params = run.state.params
        return self._scorer

    def _open_engine(self, run: Run) -> DecoderOnlyEngine:
        params = run.state.params
        if self._engine is None:
            options = EngineOptions(slots=self.config.serve.slots, prefix_cache_bytes=0)
            self._engine = DecoderOnlyEngine(self.config.model, params, options, layout=run.layout)
        else:
            programs = self._engine.programs
            programs.weights = prepare_weights(params, programs.config, run.layout, "saved")
        return self._engine


def _generates(name: str) -> bool:
    """Return whether a task generates text. Tasks that run without the harness only score text."""
    return name not in (TEXT, WIKITEXT) and load_definition(name)["output_type"] == "generate_until"
