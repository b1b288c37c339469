# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Experts beside a dense model of as many FLOPs per token: the loss of both on the same text, and the speed of their steps.

The claim of Switch (arXiv 2101.03961, figures 1 and 5) in small. For each seed both models are trained by device_train.py
on the same batches of the configuration's data; the losses are those of its held-out text, as mean and standard
deviation over the seeds. The steps' speed is measured first, in turns, on random tokens: the optimizer counts, and it
has so many times more weights to update.

examples:
  python scripts/bench/moe.py
      the quickstart's model and text, in every other layer one of 8 experts for each token, 3 seeds; about 10 minutes on
      two quiet cores
  python scripts/bench/moe.py --seeds 0
      the speed alone
  python scripts/bench/moe.py --seeds 1 --experts 'model.experts={n_experts=8, n_experts_per_token=2}' --experts model.d_ff=256
      two experts of half the width a token in every layer, which take all that come

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
# As in Switch: one expert of the dense layer's width a token, in every other layer. The whole batch shares the seats, as
# many as there are tokens: no FLOP more than the dense model's. Experts in all layers lose in runs this short: each sees
# an eighth of the text, and its router hardly decides (entropy 2.0 of at most 2.08 nats), held back by the balance loss.
EXPERTS = (
    "model.experts={n_experts=8, layer_interval=2, group_size=64, capacity_factor=1.0, eval_capacity_factor=2.0}",
)
# One optimizer that costs no more for several small weights than for a large one; Muon multiplies matrices for each.
COMMON = ('optimizer.name="adamw"', "optimizer.learning_rate=3e-3", "sample.prompts=[]")
POINTS = 10  # evaluations of a run
STYLES = {"dense": "accent", "experts": "main"}


class Point(NamedTuple):
    """An evaluation of a run."""

    step: int
    seconds: float  # of steps alone until then
    loss: float  # nats per token of held-out text


def main(arguments: list[str]) -> int:
    """Measure, train, print the table and draw the picture."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("config", nargs="?", default="configs/quickstart.toml", help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a change to both models")
    parser.add_argument(
        "--experts",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"a change to the one with experts; default: {' and '.join(EXPERTS)}".replace("%", "%%"),
    )
    parser.add_argument("--steps", type=int, help="of a run; default: the configuration's")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=30.0, help="to measure the steps for; default: %(default)s")
    parser.add_argument("--output", type=Path, help="page with the picture, for example experts.html")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    common = [*COMMON, *options.set]
    sets = {"dense": common, "experts": [*common, *(options.experts or EXPERTS)]}
    configs = {name: load_config(options.config, changes) for name, changes in sets.items()}
    if configs["dense"].model.experts is not None or configs["experts"].model.experts is None:
        raise ConfigError(f"{options.config}: name a dense model; the experts come by --experts model.experts={{...}}")
    report: dict[str, Any] = {"speed": measure_speed(configs, options.seconds)}
    if not options.json:
        print(format_speed(report["speed"]), flush=True)
    if options.seeds:
        steps = options.steps or configs["dense"].train.steps
        runs = train_all(options.config, sets, steps, options.seeds, quiet=options.json)
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
    """Milliseconds of a step, in turns, and FLOPs per token of its forward and backward pass."""
    steps = {name: start_step(config) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in configs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["dense"]) < 3:
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    found = {}
    for name, config in configs.items():
        state, batch = jax.eval_shape(make_init_state(config), jax.random.key(0)), make_batch(config)
        flops = count_flops(make_train_step(config), state, batch) / batch.tokens.size
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        found[name] = {"ms": 1000 * statistics.median(times[name]), "flops_per_token": flops, "parameters": count}
    ratios = [dense / experts for dense, experts in zip(times["dense"], times["experts"], strict=True)]
    found["experts"]["ratio"] = statistics.median(ratios)
    return found


def start_step(config: Config) -> Callable[[], None]:
    """A step that goes on from the last one's state, compiled and taken once."""
    state = jax.jit(make_init_state(config))(jax.random.key(0))
    compiled, batch = jax.jit(make_train_step(config), donate_argnums=0), make_batch(config)

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    step()
    return step


def make_batch(config: Config) -> Batch:
    """Random tokens."""
    shape = (config.train.batch_size, config.model.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.n_vocab, (shape[0], shape[1] + 1), dtype=np.int32)
    places = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones(shape, np.int32), places, np.ones(shape, np.float32))


def train_all(
    config: str, sets: dict[str, list[str]], steps: int, seeds: int, *, quiet: bool
) -> dict[str, list[list[Point]]]:
    """The evaluations of every run, both models in turns."""
    runs: dict[str, list[list[Point]]] = {name: [] for name in sets}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for name, changes in sets.items():
                run = Path(folder) / f"{name}{seed}"
                every = max(steps // POINTS, 1)
                own = [f'run.dir="{run}"', f"run.seed={seed}", f"train.steps={steps}", f"train.evaluate_every={every}"]
                command = [sys.executable, str(ROOT / "device_train.py"), config]
                for change in [*changes, *own, f"checkpoint.every={steps}"]:
                    command += ["--set", change]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
                runs[name].append(read_points(run))
                if not quiet:
                    print(f"{name}, seed {seed}: held-out loss {runs[name][-1][-1].loss:.4f}", flush=True)
    return runs


def read_points(run: Path) -> list[Point]:
    """The evaluations in a run's metrics; time is the median of its steps', so that a busy moment does not count."""
    lines = read_metrics(run / FILE)
    pace = statistics.median(line["step_ms"] for line in lines if line["kind"] == "train") / 1000
    return [Point(line["step"], pace * line["step"], line["loss"]) for line in lines if line["kind"] == "evaluation"]


def format_speed(speed: dict[str, dict[str, float]]) -> str:
    """The steps' table."""
    lines = [f"{'model':<10}{'parameters':>14}{'FLOPs/token':>14}{'ms a step':>12}{'ratio':>8}"]
    for name, row in speed.items():
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        lines.append(f"{name:<10}{row['parameters']:>14,}{row['flops_per_token']:>14,.0f}{row['ms']:>12.1f}{ratio:>8}")
    return "\n".join(lines)


def average(runs: Sequence[Sequence[Point]]) -> list[tuple[Point, float]]:
    """The mean of each evaluation over the seeds, and the standard deviation of its loss."""
    found = []
    for points in zip(*runs, strict=True):
        losses = [point.loss for point in points]
        mean = Point(points[0].step, statistics.fmean(point.seconds for point in points), statistics.fmean(losses))
        found.append((mean, statistics.stdev(losses) if len(losses) > 1 else 0.0))
    return found


def format_runs(runs: dict[str, list[list[Point]]], tokens: int) -> str:
    """The losses' table."""
    heading = "".join(f"{f'{name}: loss, sd, s':>28}" for name in runs)
    lines = [f"{'step':>8}{'tokens':>12}{heading}{'difference':>12}"]
    for rows in zip(*(average(own) for own in runs.values()), strict=True):
        step = rows[0][0].step
        cells = "".join(f"{point.loss:>12.4f} {spread:>6.4f} {point.seconds:>8.1f}" for point, spread in rows)
        lines.append(f"{step:>8,}{step * tokens:>12,}{cells}{rows[1][0].loss - rows[0][0].loss:>12.4f}")
    return "\n".join([*lines, "the last row is of all held-out text, the others of train.evaluate_batches of it"])


def format_gain(runs: dict[str, list[list[Point]]]) -> str:
    """Where the experts' mean curve passes the dense one's end; the last point is of more text, and no part of a curve."""
    dense, experts = ([point for point, _ in average(own)][:-1] for own in runs.values())
    end = dense[-1]
    for before, after in itertools.pairwise(experts):
        if after.loss <= end.loss < before.loss:
            share = (before.loss - end.loss) / (before.loss - after.loss)
            step = before.step + share * (after.step - before.step)
            time = before.seconds + share * (after.seconds - before.seconds)
            return (
                f"the dense model's loss of step {end.step:,}, {end.loss:.4f}, the experts reach at step {step:,.0f}: "
                f"{step / end.step:.2f} of its steps, {time / end.seconds:.2f} of its time"
            )
    return f"the experts do not reach the dense model's loss of step {end.step:,}, {end.loss:.4f}"


def make_page(runs: dict[str, list[list[Point]]], tokens: int) -> str:
    """Loss against steps, tokens and time, but for the last one, which is of more text; thin lines are single seeds."""
    figures = []
    own_curves = {name: [points[:-1] for points in own] for name, own in runs.items()}
    for title, place in (
        ("Held-out loss by step", lambda point: point.step),
        ("by token", lambda point: point.step * tokens),
        ("by second of steps", lambda point: point.seconds),
    ):
        means, single = [], []
        for name, curves in own_curves.items():
            mean = [(place(point), point.loss) for point, _ in average(curves)]
            means.append(Series(f"{name}, mean of {len(curves)} seed(s)", mean, STYLES[name], markers=True))
            single += [Series("a seed", [(place(p), p.loss) for p in curve], "faint") for curve in curves]
        series = [*(single if len(single) > len(means) else ()), *means]
        figures.append(plot(title, "nats per token", series))
    return make_html_page("Experts and a dense model of equal FLOPs per token", make_plots(figures))


if __name__ == "__main__":
    sys.exit(run_command(main))
