# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Training that measures itself at the steps that [evaluate] names, with the code of device_evaluate.py."""

from typing import Any

from mesh_transformer.config import Config, ConfigError
from mesh_transformer.distributed.coordination import process_count
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.evaluate.evaluation import Subject, check_tasks, measure
from mesh_transformer.evaluate.harness_tasks import load_definition
from mesh_transformer.evaluate.loglikelihood import Scorer
from mesh_transformer.evaluate.tasks import TEXT, WIKITEXT
from mesh_transformer.mesh import Layout
from mesh_transformer.reports.evaluation_results import Evaluation
from mesh_transformer.sample.engine.engine import Engine
from mesh_transformer.sample.engine.weights import lay_out
from mesh_transformer.storage.paths import Place
from mesh_transformer.train.loop import Measure, Tell
from mesh_transformer.train.run import Run
from mesh_transformer.train.session import train_config


def train_measured(config: Config, layout: Layout, stop: StopRequest, **options: Any) -> Place:
    """As train_config, and the tasks of [evaluate] on the way and at the end; ConfigError for those that cannot be done."""
    return train_config(config, layout, stop, measure=make_measure(config), **options)


def make_measure(config: Config) -> Measure | None:
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
    scorers: list[Scorer] = []
    engines: list[Engine] = []

    def measure_run(run: Run, tell: Tell) -> Evaluation:
        if not scorers:
            scorers.append(Scorer(config.model, None, run.layout, batch_tokens=config.evaluate.batch_tokens))
        (scorer,), params = scorers, run.state.params
        scorer.params = params
        if generates and not engines:
            engines.append(Engine(config.model, params, layout=run.layout, slots=config.serve.slots, prefix_bytes=0))
        elif generates:
            engines[0].programs.weights = lay_out(params, engines[0].programs.config, run.layout, "saved")
        engine = engines[0] if generates else None
        try:
            return measure(Subject(config, run.data.tokenizer, scorer, engine, run.step, str(run.folder.place)), tell)
        finally:
            scorer.params = None  # the next step takes their memory
            if engine:
                engine.programs.weights = None

    return measure_run


def _generates(name: str) -> bool:
    return load_definition(name)["output_type"] == "generate_until"
