# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Training that measures itself at the steps that [evaluate] names, with the code of device_evaluate.py."""

from mesh_transformer.config import Config, ConfigError
from mesh_transformer.distributed.coordination import process_count
from mesh_transformer.evaluate.evaluation import EvalTarget, check_tasks, evaluate_model
from mesh_transformer.evaluate.harness_tasks import load_definition
from mesh_transformer.evaluate.loglikelihood import LoglikelihoodScorer
from mesh_transformer.evaluate.tasks import TEXT, WIKITEXT
from mesh_transformer.reports.evaluation_results import Evaluation
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.engine import EngineOptions
from mesh_transformer.sample.engine.weights import prepare_weights
from mesh_transformer.train.loop import MeasureFn, TaskProgressFn
from mesh_transformer.train.run import Run


def make_measure(config: Config) -> MeasureFn | None:
    """What the loop calls; None without tasks. Every process does the same work on the batches that all share.

    A task that generates text has the weights laid out once more while it is measured, as decoding wants them.
    """
    if not config.evaluate.tasks:
        return None
    names = check_tasks(config)
    generates = [name for name in names if name not in (TEXT, WIKITEXT) and _generates(name)]
    if generates and process_count() > 1:
        raise ConfigError(
            f"task {generates[0]!r} generates text, which a run of several processes does not; leave it to "
            "device_evaluate.py"
        )
    scorers: list[LoglikelihoodScorer] = []
    engines: list[DecoderOnlyEngine] = []

    def measure_run(run: Run, tell: TaskProgressFn) -> Evaluation:
        if not scorers:
            scorers.append(
                LoglikelihoodScorer(config.model, None, run.layout, batch_tokens=config.evaluate.batch_tokens)
            )
        (scorer,), params = scorers, run.state.params
        scorer.params = params
        if generates and not engines:
            options = EngineOptions(slots=config.serve.slots, prefix_cache_bytes=0)
            engines.append(DecoderOnlyEngine(config.model, params, options, layout=run.layout))
        elif generates:
            engines[0].programs.weights = prepare_weights(params, engines[0].programs.config, run.layout, "saved")
        engine = engines[0] if generates else None
        try:
            return evaluate_model(
                EvalTarget(config, run.data.tokenizer, scorer, engine, run.step, str(run.folder.location)), tell
            )
        finally:
            scorer.params = None  # the next step takes their memory
            if engine:
                engine.programs.weights = None

    return measure_run


def _generates(name: str) -> bool:
    return load_definition(name)["output_type"] == "generate_until"
