# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Training that measures itself at the steps that [evaluate] names, with the code of device_evaluate.py."""

from typing import Any

from mesh_transformer.checkpoint.places import Place
from mesh_transformer.config import Config
from mesh_transformer.evaluate.evaluation import Subject, check_tasks, measure
from mesh_transformer.evaluate.likelihood import Scorer
from mesh_transformer.mesh import Layout
from mesh_transformer.train.benchmarks import Evaluation
from mesh_transformer.train.loop import Measure, Tell
from mesh_transformer.train.run import Run
from mesh_transformer.train.session import train_config
from mesh_transformer.train.stop import StopRequest


def train_measured(config: Config, layout: Layout, stop: StopRequest, **options: Any) -> Place:
    """As train_config, and the tasks of [evaluate] on the way and at the end; ConfigError for those that cannot be done."""
    return train_config(config, layout, stop, measure=make_measure(config), **options)


def make_measure(config: Config) -> Measure | None:
    """What the loop calls; None without tasks. Every process does the same work on the batches that all share."""
    if not config.evaluate.tasks:
        return None
    check_tasks(config, generates=False)
    scorers: list[Scorer] = []

    def measure_run(run: Run, tell: Tell) -> Evaluation:
        if not scorers:
            scorers.append(Scorer(config.model, None, run.layout, batch_tokens=config.evaluate.batch_tokens))
        (scorer,) = scorers
        scorer.params = run.state.params
        try:
            return measure(Subject(config, run.data.tokenizer, scorer, None, run.step, str(run.folder.place)), tell)
        finally:
            scorer.params = None  # the next step takes their memory

    return measure_run
