# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Samples of a training run: completions of `sample.prompts`, on the console and in the run's report."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from mesh_transformer.config import Config
from mesh_transformer.reports.html_report import write_report
from mesh_transformer.reports.metrics_log import MetricsLog
from mesh_transformer.sample.loading import LoadedModel, load_model
from mesh_transformer.sample.text_generation import complete_texts
from mesh_transformer.train.run_folder import RunFolder


def log_training_samples(config: Config) -> None:
    """Complete `sample.prompts` with the latest checkpoint of the run that `config` describes."""
    if not config.sample.prompts:
        return
    with RunFolder(config, print) as folder:
        _log_samples(load_model(folder.location), folder.path)


def _log_samples(model: LoadedModel, run_dir: Path) -> None:
    options = model.config.sample
    completions = complete_texts(model.engine, model.defaults, options.prompts, options, seed=model.config.run.seed)
    console = Console()
    console.print(Text(f"\nsamples of step {model.step}, temperature {options.temperature}", style="bold"))
    for completion in completions:
        console.out(
            completion.prompt, style="dim", highlight=False, end=""
        )  # Console.print would wrap lines and strip line ends
        console.out(completion.text, highlight=False)
        console.rule(style="dim")
    text = "\n\n".join(f"{completion.prompt}{completion.text}" for completion in completions)
    with MetricsLog(run_dir, model.config.track, config={}, first_step=model.step) as log:
        log.event(model.step, "samples", text)
    write_report(run_dir)
