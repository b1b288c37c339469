# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare a mixture of experts with a dense model of equal FLOPs per token: loss on the same text, and speed of the steps.

This repeats the comparison of Switch Transformer (arXiv 2101.03961, figures 1 and 5) at a small size. For each seed,
device_train.py trains both models on the same batches of the configuration's data. Losses are on its held-out text: mean
and standard deviation over the seeds. Step times are measured first, on random tokens, in alternation. They include the
optimizer, which updates several times more weights in the model with experts.

examples:
  python scripts/bench/moe.py
      the quickstart's model and text, with top-1 routing to 8 experts in every second layer, 3 seeds; about 10 minutes on
      two idle cores
  python scripts/bench/moe.py --seeds 0
      speed only
  python scripts/bench/moe.py --seeds 1 --experts 'model.experts={n_experts=8, n_experts_per_token=2}' --experts model.d_ff=256
      top-2 routing to experts of half the width in every layer, without dropped tokens

exit status: 0 done, 1 failed, 2 wrong usage
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import Config, ConfigError, load_config
from mesh_transformer.data.loader import Batch
from mesh_transformer.reports.metrics_log import FILE, read_metrics
from mesh_transformer.reports.page import make_html_page, make_plots
from mesh_transformer.reports.svg import Series, plot
from mesh_transformer.train.flops import count_flops
from mesh_transformer.train.state import make_init_state
from mesh_transformer.train.step import make_train_step

ROOT = Path(__file__).parents[2]
# As in Switch Transformer: top-1 routing to experts of the dense layer's width, in every second layer. The whole batch
# shares an expert capacity of as many slots as there are tokens: as many FLOPs as the dense model. Experts in all layers
# are worse than the dense model in runs this short: each is trained on an eighth of the text, and the routers stay nearly
# uniform because of the auxiliary loss (entropy 2.0 nats; 2.08 is uniform).
EXPERTS = (
    "model.experts={n_experts=8, layer_interval=2, group_size=64, capacity_factor=1.0, eval_capacity_factor=2.0}",
)
# AdamW takes as long for several small weights as for one large weight; Muon runs matmuls for each weight.
COMMON = ('optimizer.name="adamw"', "optimizer.learning_rate=3e-3", "sample.prompts=[]")
EVALUATIONS = 10  # evaluations of a run
STYLES = {"dense": "accent", "experts": "main"}

Runs = dict[str, list[list["Point"]]]  # model -> seed -> evaluations


class Point(NamedTuple):
    """An evaluation of a run."""

    step: int
    seconds: float  # of all steps so far, without evaluation and saving
    loss: float  # nats per token of held-out text


def main(arguments: list[str]) -> int:
    """Measure, train, print the tables and write the plots."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "config",
        nargs="?",
        default="configs/quickstart.toml",
        help="TOML file of the dense model; default: %(default)s",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of both models; repeatable"
    )
    parser.add_argument(
        "--experts",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override a field of the model with experts; repeatable; default: {' and '.join(EXPERTS)}",
    )
    parser.add_argument(
        "--steps", type=int, help="number of steps of each run; default: train.steps of the configuration"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="number of runs of each model; 0: measure only the speed; default: %(default)s",
    )
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="seconds during which steps are measured; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="write plots to this HTML file, for example experts.html")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    common = [*COMMON, *options.set]
    overrides = {"dense": common, "experts": [*common, *(options.experts or EXPERTS)]}
    configs = {name: load_config(options.config, values) for name, values in overrides.items()}
    if configs["dense"].model.experts is not None:
        raise ConfigError(
            f"{options.config} has model.experts, but must describe a dense model; remove model.experts, and pass it with --experts"
        )
    if configs["experts"].model.experts is None:
        raise ConfigError(
            f"--experts {' '.join(options.experts)} does not set model.experts; add --experts 'model.experts={{n_experts=8}}'"
        )
    report: dict[str, Any] = {"speed": measure_speed(configs, options.seconds)}
    if not options.json:
        print(format_speed(report["speed"]), flush=True)
    if options.seeds:
        steps = options.steps or configs["dense"].train.steps
        runs = train_all(options.config, overrides, steps, options.seeds, quiet=options.json)
        tokens = configs["dense"].train.batch_size * configs["dense"].model.seq_len
        report |= {"tokens_per_step": tokens, "runs": runs}
        if options.output:
            options.output.write_text(make_page(runs, tokens), encoding="utf-8")
        if not options.json:
            print(format_runs(runs, tokens))
            print(format_gain(runs))
    if options.json:
        print(json.dumps(report))
    return 0


def measure_speed(configs: dict[str, Config], seconds: float) -> dict[str, dict[str, float]]:
    """Return for each model milliseconds per step, FLOPs per token (forward and backward), and number of parameters.

    The steps of the models alternate; the ratio is the median over pairs.
    """
    steps = {name: make_step(config) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in configs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["dense"]) < 3:
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    found = {}
    for name, config in configs.items():
        state = jax.eval_shape(make_init_state(config), jax.random.key(0))
        batch = make_batch(config)
        flops = count_flops(make_train_step(config), state, batch) / batch.tokens.size
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        found[name] = {"ms": 1000 * statistics.median(times[name]), "flops_per_token": flops, "parameters": count}
    ratios = [dense / experts for dense, experts in zip(times["dense"], times["experts"], strict=True)]
    found["experts"]["ratio"] = statistics.median(ratios)
    return found


def make_step(config: Config) -> Callable[[], None]:
    """Return a function that takes a training step, compiled and called once."""
    state = jax.jit(make_init_state(config))(jax.random.key(0))
    batch = make_batch(config)
    compiled = jax.jit(make_train_step(config), donate_argnums=0)

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    step()
    return step


def make_batch(config: Config) -> Batch:
    """Return a batch of random tokens."""
    shape = (config.train.batch_size, config.model.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.n_vocab, (shape[0], shape[1] + 1), dtype=np.int32)
    positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones(shape, np.int32), positions, np.ones(shape, np.float32))


def train_all(config: str, overrides: dict[str, list[str]], steps: int, seeds: int, *, quiet: bool) -> Runs:
    """Train both models with every seed, in alternation, and return the evaluations of every run."""
    runs: Runs = {name: [] for name in overrides}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for name, model_overrides in overrides.items():
                run = Path(folder) / f"{name}{seed}"
                run_overrides = [
                    f'run.dir="{run}"',
                    f"run.seed={seed}",
                    f"train.steps={steps}",
                    f"train.evaluate_every={max(steps // EVALUATIONS, 1)}",
                    f"checkpoint.every={steps}",
                ]
                command = [sys.executable, str(ROOT / "device_train.py"), config]
                for override in [*model_overrides, *run_overrides]:
                    command += ["--set", override]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
                runs[name].append(read_points(run))
                if not quiet:
                    print(f"{name}, seed {seed}: held-out loss {runs[name][-1][-1].loss:.4f}", flush=True)
    return runs


def read_points(run: Path) -> list[Point]:
    """Return the evaluations of a run; times are step numbers times the median step time, to ignore brief load."""
    lines = read_metrics(run / FILE)
    step_seconds = statistics.median(line["step_ms"] for line in lines if line["kind"] == "train") / 1000
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    return [Point(line["step"], step_seconds * line["step"], line["loss"]) for line in evaluations]


def format_speed(speed: dict[str, dict[str, float]]) -> str:
    """Return the table of the steps."""
    lines = [f"{'model':<10}{'parameters':>14}{'FLOPs/token':>14}{'ms per step':>12}{'ratio':>8}"]
    for name, row in speed.items():
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        lines.append(f"{name:<10}{row['parameters']:>14,}{row['flops_per_token']:>14,.0f}{row['ms']:>12.1f}{ratio:>8}")
    return "\n".join(lines)


def average(runs: Sequence[Sequence[Point]]) -> list[tuple[Point, float]]:
    """Return for each evaluation its mean over the seeds, and the standard deviation of its loss."""
    found = []
    for points in zip(*runs, strict=True):
        losses = [point.loss for point in points]
        mean = Point(points[0].step, statistics.fmean(point.seconds for point in points), statistics.fmean(losses))
        found.append((mean, statistics.stdev(losses) if len(losses) > 1 else 0.0))
    return found


def format_runs(runs: Runs, tokens: int) -> str:
    """Return the table of the losses."""
    heading = "".join(f"{f'{name}: loss, sd, s':>28}" for name in runs)
    lines = [f"{'step':>8}{'tokens':>12}{heading}{'difference':>12}"]
    for evaluations in zip(*(average(curves) for curves in runs.values()), strict=True):
        (dense, _), (experts, _) = evaluations
        cells = "".join(f"{mean.loss:>12.4f} {deviation:>6.4f} {mean.seconds:>8.1f}" for mean, deviation in evaluations)
        lines.append(f"{dense.step:>8,}{dense.step * tokens:>12,}{cells}{experts.loss - dense.loss:>12.4f}")
    return "\n".join(
        [*lines, "last row: loss on all held-out text; other rows: on train.evaluate_batches batches of it"]
    )


def format_gain(runs: Runs) -> str:
    """Return the fractions of steps and time after which the experts reach the final loss of the dense model, as text.

    Curves are means over the seeds, interpolated linearly. The last point is excluded, because it covers more text.
    """
    dense, experts = ([point for point, _ in average(curves)][:-1] for curves in runs.values())
    end = dense[-1]
    for before, after in itertools.pairwise(experts):
        if after.loss <= end.loss < before.loss:
            fraction = (before.loss - end.loss) / (before.loss - after.loss)
            step = before.step + fraction * (after.step - before.step)
            seconds = before.seconds + fraction * (after.seconds - before.seconds)
            return (
                f"the experts reach the dense model's loss of step {end.step:,} ({end.loss:.4f}) at step {step:,.0f}: "
                f"{step / end.step:.2f} of its steps, {seconds / end.seconds:.2f} of its time"
            )
    return f"the experts do not reach the dense model's loss of step {end.step:,} ({end.loss:.4f})"


def make_page(runs: Runs, tokens_per_step: int) -> str:
    """Return a page that plots the loss over steps, tokens and time; thin lines are single seeds.

    The last point is excluded, because it covers more text.
    """
    horizontal_axes: dict[str, Callable[[Point], float]] = {
        "Held-out loss by step": lambda point: point.step,
        "by token": lambda point: point.step * tokens_per_step,
        "by seconds of training steps": lambda point: point.seconds,
    }
    curves_by_model = {name: [points[:-1] for points in curves] for name, curves in runs.items()}
    figures = []
    for title, x_of in horizontal_axes.items():
        means: list[Series] = []
        seeds: list[Series] = []
        for name, curves in curves_by_model.items():
            mean = [(x_of(point), point.loss) for point, _ in average(curves)]
            means.append(Series(f"{name}, mean of {len(curves)} seed(s)", mean, STYLES[name], markers=True))
            seeds += [Series("a seed", [(x_of(point), point.loss) for point in curve], "faint") for curve in curves]
        series = [*(seeds if len(seeds) > len(means) else ()), *means]
        figures.append(plot(title, "nats per token", series))
    return make_html_page("Experts and a dense model of equal FLOPs per token", make_plots(figures))


if __name__ == "__main__":
    sys.exit(run_command(main))
