# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare training runs: a page of losses against tokens, FLOPs and time, a table, and a scaling law.

Each argument is a run folder. FLOPs are the training FLOPs without recomputation, counted from the training step. The law
L = a C^-b + c is fitted to the last losses of four or more runs, one point per run (validation losses, if all runs have a
validation set of the same name). It is also fitted to the curve of each run, which describes the progress of that run but does
not compare sizes.

examples:
  python scripts/compare_runs.py runs/small runs/medium runs/large runs/xl
      print the table, and write the page to compare.html
  python scripts/compare_runs.py runs/* --output comparison.html --json
      print the table and the fits as one JSON object instead
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import Config, ConfigError, load_config
from mesh_transformer.evaluate.scaling import Fit, fit_law
from mesh_transformer.reports.console import format_time
from mesh_transformer.reports.evaluation_results import metrics_of, read_evaluations
from mesh_transformer.reports.html_report import active_seconds, smooth
from mesh_transformer.reports.metrics_log import FILE, read_metrics
from mesh_transformer.reports.page import make_html_page, make_plots
from mesh_transformer.reports.svg import DASHES, Series, downsample, format_number, plot
from mesh_transformer.storage.atomic_files import replace_file
from mesh_transformer.train.compile import abstract_batch, config_for_flops
from mesh_transformer.train.flops import count_flops
from mesh_transformer.train.schedule import first_sequence
from mesh_transformer.train.state import describe_state
from mesh_transformer.train.step import make_train_step

COLORS = ("#3056d3", "#d1495b", "#0f8b6d", "#b7791f", "#7b4fb5", "#00838f", "#ad1457", "#546e7a")
CURVES = "The b and c of a curve are fitted to the training loss of one run; they describe its progress and do not compare sizes."
LAST_STEPS = 20  # number of logged steps; their median is the last training loss
MAX_POINTS = 300  # maximum points of a curve
AXES = (  # title, attribute of History, unit, logarithmic
    ("Loss against tokens", "tokens", "nats per token, smoothed", True),
    ("Loss against FLOPs", "flops", "nats per token, smoothed", True),
    ("Loss against time", "seconds", "nats per token, smoothed; seconds without interruptions", False),
)


class Scores(NamedTuple):
    """Results on one validation set; each list has a value per evaluation."""

    tokens: list[float]
    losses: list[float]
    bits_per_byte: list[float]


class History(NamedTuple):
    """Metrics of a run; each list has a value per logged step."""

    name: str
    parameters: float
    tokens: list[float]
    flops: list[float]
    seconds: list[float]
    losses: list[float]
    held_out: dict[str, Scores]  # validation set -> its results
    results: dict[str, float]  # "TASK.METRIC" -> value in the latest evaluation

    @property
    def last_loss(self) -> float:
        """Training loss at the end of the run: the median of the last logged steps."""
        return statistics.median(self.losses[-LAST_STEPS:])


class Comparison(NamedTuple):
    """Histories, fits and table of the compared runs."""

    histories: Sequence[History]
    fits: Sequence[Fit | None]  # law of the curve of each run
    law: Fit | None  # law of the last losses of all runs
    points: list[tuple[float, float]]  # FLOPs and last loss of each run
    headings: list[str]
    rows: list[list[str]]


def main(arguments: list[str]) -> int:
    """Compare the runs named on the command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    parser.add_argument(
        "--output", type=Path, default=Path("compare.html"), help="path of the page (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    names = _short_names([Path(run) for run in options.runs])
    histories = [read_history(Path(run), name) for run, name in zip(options.runs, names, strict=True)]
    comparison = compare(histories)
    replace_file(options.output, make_page(comparison).encode())
    if options.json:
        runs = [describe(history, fit) for history, fit in zip(histories, comparison.fits, strict=True)]
        law = comparison.law and comparison.law._asdict()
        print(json.dumps({"runs": runs, "law": law, "points": comparison.points}, indent=2))
    else:
        _print(comparison)
    print(f"wrote {options.output}", file=sys.stderr)
    return 0


def compare(histories: Sequence[History]) -> Comparison:
    """Fit the laws and make the table."""
    law, points = fit_across(histories)
    fits = [fit_law(history.flops, history.losses) for history in histories]
    headings, rows = make_table(histories, fits)
    return Comparison(histories, fits, law, points, headings, rows)


def read_history(run: Path, name: str) -> History:
    """Return a run's history from metrics.jsonl and config.toml; raise ConfigError if it has no training steps."""
    lines = read_metrics(run / FILE)
    if not any(line["kind"] == "train" for line in lines) or not (run / "config.toml").is_file():
        raise ConfigError(
            f"{run}: not a trained run: config.toml, and {FILE} with training steps, are required; pass the folder of a run"
        )
    config = load_config(run / "config.toml")
    per_sequence = flops_per_sequence(config)
    seq_len = config.model.seq_len
    tokens: list[float] = []
    flops: list[float] = []
    seconds: list[float] = []
    losses: list[float] = []
    held_out: dict[str, Scores] = {}
    for line, passed in zip(lines, active_seconds(lines), strict=True):
        sequences = first_sequence(config.train, line["step"])
        if line["kind"] == "train" and line.get("loss") is not None:
            tokens.append(float(sequences * seq_len))
            flops.append(sequences * per_sequence)
            seconds.append(passed)
            losses.append(line["loss"])
        elif line["kind"] == "evaluation" and line.get("loss") is not None:
            scores = held_out.setdefault(line["set"], Scores([], [], []))
            scores.tokens.append(sequences * seq_len)
            scores.losses.append(line["loss"])
            scores.bits_per_byte.append(line["bits_per_byte"])
    parameters = next((line["parameters"] for line in lines if "parameters" in line), math.nan)
    evaluations = read_evaluations(run)
    results = metrics_of(evaluations[max(evaluations)]) if evaluations else {}
    return History(name, parameters, tokens, flops, seconds, losses, held_out, results)


def flops_per_sequence(config: Config) -> float:
    """Return the training FLOPs of one sequence without recomputation. The step is traced, not compiled."""
    shapes, _ = describe_state(config)
    step = make_train_step(config_for_flops(config))
    return count_flops(step, shapes, abstract_batch(config)) / config.train.batch_size


def fit_across(histories: Sequence[History]) -> tuple[Fit | None, list[tuple[float, float]]]:
    """Return the law over the runs, and each run's point (FLOPs, last loss).

    The loss is on the first validation set that all runs have; without one it is the training loss.
    """
    common = set.intersection(*(set(history.held_out) for history in histories))
    name = min(common, default=None)
    points = [
        (history.flops[-1], history.held_out[name].losses[-1] if name else history.last_loss) for history in histories
    ]
    return fit_law(*zip(*points, strict=True)), points


def describe(history: History, fit: Fit | None) -> dict[str, Any]:
    """Return a run as JSON values."""
    return {
        "name": history.name,
        "parameters": history.parameters,
        "tokens": history.tokens[-1],
        "flops": history.flops[-1],
        "seconds": history.seconds[-1],
        "loss": history.last_loss,
        "held_out": {
            name: {"loss": scores.losses[-1], "bits_per_byte": scores.bits_per_byte[-1]}
            for name, scores in history.held_out.items()
        },
        "results": history.results,
        "curve_fit": fit and fit._asdict(),
    }


def make_table(histories: Sequence[History], fits: Sequence[Fit | None]) -> tuple[list[str], list[list[str]]]:
    """Return the headings, and a row of text for each run."""
    sets = sorted({name for history in histories for name in history.held_out})
    shown = sorted({key for h in histories for key in h.results if key.endswith((".acc", ".bits_per_byte"))})
    headings = [
        "run",
        "parameters",
        "tokens",
        "FLOPs",
        "time",
        "training loss",
        *(f"{s} bits/byte" for s in sets),
        *shown,
    ]
    rows = []
    for history in histories:
        bits = [f"{history.held_out[s].bits_per_byte[-1]:.4f}" if s in history.held_out else "" for s in sets]
        rows.append(
            [
                history.name, format_number(history.parameters), format_number(history.tokens[-1]),
                f"{history.flops[-1]:.3g}", format_time(history.seconds[-1]), f"{history.last_loss:.4f}", *bits,
                *(f"{history.results[key]:.4g}" if key in history.results else "" for key in shown),
            ]
        )  # fmt: skip
    headings.append("b, c of the curve")
    for row, fit in zip(rows, fits, strict=True):
        row.append("" if fit is None else f"{fit.b:.3f} ± {fit.errors[1]:.2g}, {fit.c:.3f} ± {fit.errors[2]:.2g}")
    return headings, rows


def make_page(comparison: Comparison) -> str:
    """Return the page: the table, the law and the plots."""
    body = (
        f"{_html_table(comparison)}<p>{escape(_describe_law(comparison))}</p>"
        f"<p>{CURVES if any(comparison.fits) else ''}</p>{make_plots(_plots(comparison))}"
    )
    colors = "".join(
        f"path.c{i}{{stroke:{c}}}circle.c{i}{{fill:{c}}}.key.c{i}::before{{background:{c}}}"
        for i, c in enumerate(COLORS)
    )
    return make_html_page("Comparison of runs", body, styles=f"{colors}.scores b.key::before{{content:none}}\n")


def _html_table(comparison: Comparison) -> str:
    """Return the table with each run's color in front of its name."""
    head = "".join(f"<th>{escape(name)}" for name in comparison.headings)
    body = "".join(
        f"<tr><td><b class=key style='color:{COLORS[i % len(COLORS)]}'>■</b> {escape(row[0])}"
        + "".join(f"<td>{escape(cell)}" for cell in row[1:])
        for i, row in enumerate(comparison.rows)
    )
    return f"<div class=numbers><table class=scores><tr>{head}{body}</table></div>"


def _plots(comparison: Comparison) -> list[str]:
    histories = comparison.histories
    plots = []
    for title, attribute, unit, is_log in AXES:
        series = [Series(h.name, _curve(getattr(h, attribute), h.losses), _style(i)) for i, h in enumerate(histories)]
        plots.append(plot(title, unit, series, log_x=is_log))
    for name in sorted({name for history in histories for name in history.held_out}):
        series = [
            Series(h.name, list(zip(scores.tokens, scores.bits_per_byte, strict=True)), _style(i), markers=True)
            for i, h in enumerate(histories)
            if (scores := h.held_out.get(name))
        ]
        plots.append(plot(f"Held-out bits per byte, {name}", "by tokens", series, log_x=True))
    if comparison.law is not None:
        plots.append(_law_plot(comparison, comparison.law))
    return plots


def _curve(xs: Sequence[float], losses: Sequence[float]) -> list[tuple[float, float | None]]:
    return downsample(smooth(list(zip(xs, losses, strict=True))), MAX_POINTS)


def _law_plot(comparison: Comparison, law: Fit) -> str:
    compute = [x for x, _ in comparison.points]
    grid = np.geomspace(min(compute), 4 * max(compute), 60)
    series = [
        Series("scaling law, to four times the FLOPs", [(float(x), law(float(x))) for x in grid], "main dashed"),
        *(
            Series(history.name, [point], _style(i))
            for i, (history, point) in enumerate(zip(comparison.histories, comparison.points, strict=True))
        ),
    ]
    return plot("Last loss against FLOPs", "nats per token", series, log_x=True)


def _describe_law(comparison: Comparison) -> str:
    n_runs = len(comparison.rows)
    if comparison.law is not None:
        return f"scaling law of the last losses, C in FLOPs: {comparison.law}"
    reason = f"{n_runs} run(s) given, at least 4 are needed" if n_runs < 4 else "the losses do not fall with the FLOPs"
    return f"no scaling law: {reason}"


def _style(number: int) -> str:
    return f"c{number % len(COLORS)}" + DASHES[number // len(COLORS) % len(DASHES)]


def _short_names(runs: Sequence[Path]) -> list[str]:
    """Return the folder names of the runs, or their paths if two runs have the same folder name."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _print(comparison: Comparison) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, heading in enumerate(comparison.headings):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for row in comparison.rows:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(Text(_describe_law(comparison)), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
