# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A few completions from the checkpoint a training run has just written, on the console and in its report."""

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
    """Complete `sample.prompts` with the newest checkpoint of the run that `config` describes; nothing without prompts."""
    if not config.sample.prompts:
        return
    with RunFolder(config, print) as folder:
        _show(load_model(folder.location), folder.path)


def _show(trained: LoadedModel, run_dir: Path) -> None:
    options, seed = trained.config.sample, trained.config.run.seed
    completions = complete_texts(trained.engine, trained.tokenizer, options.prompts, options, seed=seed)
    console = Console()
    console.print(Text(f"\nsamples of step {trained.step}, temperature {options.temperature}", style="bold"))
    for completion in completions:
        console.out(completion.prompt, style="dim", highlight=False, end="")  # print would wrap, and lose a line's end
        console.out(completion.text, highlight=False)
        console.rule(style="dim")
    text = "\n\n".join(f"{completion.prompt}{completion.text}" for completion in completions)
    with MetricsLog(run_dir, trained.config.track, config={}, first_step=trained.step) as log:
        log.event(trained.step, "samples", text)
    write_report(run_dir)
