# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: loss against tokens, FLOPs and time as one page, their numbers as one table, and a scaling law.

Each argument is a run folder. FLOPs are those of training as the model itself needs them, counted from its step. The law
L = a C^-b + c is fitted to the last losses of four or more runs, one point each (held out, where all runs have a set of
one name); and to each run's own curve, which tells how that run went on, not how sizes compare.

examples:
  python scripts/compare_runs.py runs/small runs/medium runs/large runs/xl
      the table here, the page in compare.html
  python scripts/compare_runs.py runs/* --output comparison.html --json
      the same as one JSON object: a program's view of the table and of the fits
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
from mesh_transformer.reports.html_report import CSS, active_seconds, smooth, downsample
from mesh_transformer.reports.metrics_log import FILE, read_metrics
from mesh_transformer.reports.svg import DASHES, Series, format_number, plot
from mesh_transformer.storage.atomic_files import replace_file
from mesh_transformer.train.flops import count_flops
from mesh_transformer.train.compile import abstract_batch, without_remat
from mesh_transformer.train.schedule import first_sequence
from mesh_transformer.train.state import describe_state
from mesh_transformer.train.step import make_train_step

COLORS = ("#3056d3", "#d1495b", "#0f8b6d", "#b7791f", "#7b4fb5", "#00838f", "#ad1457", "#546e7a")
CURVES = "b and c of a run's own curve are those of the same law fitted to its training loss: how it went on, not how sizes compare"
LAST = 20  # logged steps whose median is the last training loss


class History(NamedTuple):
    """A run as its metrics tell it, a value for each logged step."""

    name: str
    parameters: float
    tokens: list[float]
    flops: list[float]
    seconds: list[float]
    losses: list[float]
    held_out: dict[str, tuple[list[float], list[float], list[float]]]  # set -> tokens, losses, bits per byte
    results: dict[str, float]  # of its newest evaluation

    @property
    def last_loss(self) -> float:
        """Of training, less noisy than its last step."""
        return statistics.median(self.losses[-LAST:])


def main(arguments: list[str]) -> int:
    """Read, fit, draw, print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    names = _short_names([Path(run) for run in options.runs])
    histories = [read_history(Path(run), name) for run, name in zip(options.runs, names, strict=True)]
    law, points = fit_across(histories)
    fits = [fit_law(history.flops, history.losses) for history in histories]
    headings, rows = make_table(histories, fits)
    replace_file(options.output, make_page(histories, fits, law, points, headings, rows).encode())
    if options.json:
        runs = [describe(history, fit) for history, fit in zip(histories, fits, strict=True)]
        print(json.dumps({"runs": runs, "law": law and law._asdict(), "points": points}, indent=2))
    else:
        _print(headings, rows, law)
    print(f"drawn in {options.output}", file=sys.stderr)
    return 0


def read_history(run: Path, name: str) -> History:
    """A run from its metrics.jsonl and config.toml; ConfigError if it has not trained."""
    lines = read_metrics(run / FILE)
    if not any(line["kind"] == "train" for line in lines) or not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: no run that has trained: it needs {FILE} with steps in it, and config.toml")
    config = load_config(run / "config.toml")
    per_sequence, seq_len = flops_per_sequence(config), config.model.seq_len
    tokens, flops, seconds, losses = [], [], [], []
    held_out: dict[str, tuple[list[float], list[float], list[float]]] = {}
    for line, passed in zip(lines, active_seconds(lines), strict=True):
        sequences = first_sequence(config.train, line["step"])
        if line["kind"] == "train" and line.get("loss") is not None:
            tokens.append(float(sequences * seq_len))
            flops.append(sequences * per_sequence)
            seconds.append(passed)
            losses.append(line["loss"])
        elif line["kind"] == "evaluation" and line.get("loss") is not None:
            found = held_out.setdefault(line["set"], ([], [], []))
            for values, value in zip(found, (sequences * seq_len, line["loss"], line["bits_per_byte"]), strict=True):
                values.append(value)
    parameters = next((line["parameters"] for line in lines if "parameters" in line), math.nan)
    evaluations = read_evaluations(run)
    results = metrics_of(evaluations[max(evaluations)]) if evaluations else {}
    return History(name, parameters, tokens, flops, seconds, losses, held_out, results)


def flops_per_sequence(config: Config) -> float:
    """Of one sequence through the training step, nothing computed twice; the step is traced, not compiled."""
    shapes, _ = describe_state(config)
    step = make_train_step(without_remat(config))
    return count_flops(step, shapes, abstract_batch(config)) / config.train.batch_size


def fit_across(histories: Sequence[History]) -> tuple[Fit | None, list[tuple[float, float]]]:
    """The law over the runs' last losses, held out if all have a set of one name; and each run's point (FLOPs, loss)."""
    common = set.intersection(*(set(history.held_out) for history in histories))
    name = min(common, default=None)
    points = [
        (history.flops[-1], history.held_out[name][1][-1] if name else history.last_loss) for history in histories
    ]
    return fit_law(*zip(*points, strict=True)), points


def describe(history: History, fit: Fit | None) -> dict[str, Any]:
    """What a program would want to know of a run."""
    return {
        "name": history.name,
        "parameters": history.parameters,
        "tokens": history.tokens[-1],
        "flops": history.flops[-1],
        "seconds": history.seconds[-1],
        "loss": history.last_loss,
        "held_out": {name: {"loss": found[1][-1], "bits_per_byte": found[2][-1]} for name, found in history.held_out.items()},
        "results": history.results,
        "curve_fit": fit and fit._asdict(),
    }  # fmt: skip


def make_table(histories: Sequence[History], fits: Sequence[Fit | None]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row of text for each run."""
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
        bits = [f"{history.held_out[s][2][-1]:.4f}" if s in history.held_out else "" for s in sets]
        rows.append(
            [
                history.name, format_number(history.parameters), format_number(history.tokens[-1]),
                f"{history.flops[-1]:.3g}", format_time(history.seconds[-1]), f"{history.last_loss:.4f}", *bits,
                *(f"{history.results[key]:.4g}" if key in history.results else "" for key in shown),
            ]
        )  # fmt: skip
    headings.append("own curve's b, c")
    for row, fit in zip(rows, fits, strict=True):
        row.append("" if fit is None else f"{fit.b:.3f} ± {fit.errors[1]:.2g}, {fit.c:.3f} ± {fit.errors[2]:.2g}")
    return headings, rows


def make_page(
    histories: Sequence[History],
    fits: Sequence[Fit | None],
    law: Fit | None,
    points: Sequence[tuple[float, float]],
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> str:
    """One page without network or scripts."""
    plots = []
    for title, attribute, is_log in (
        ("Loss against tokens", "tokens", True),
        ("Loss against FLOPs", "flops", True),
        ("Loss against time", "seconds", False),
    ):
        series = [
            Series(h.name, downsample(smooth(list(zip(getattr(h, attribute), h.losses, strict=True))), 300), _style(i))
            for i, h in enumerate(histories)
        ]
        unit = "nats per token, smoothed" + ("" if is_log else "; seconds without interruptions")
        plots.append(plot(title, unit, series, log_x=is_log))
    for name in sorted({name for history in histories for name in history.held_out}):
        series = [
            Series(h.name, list(zip(h.held_out[name][0], h.held_out[name][2], strict=True)), _style(i), markers=True)
            for i, h in enumerate(histories)
            if name in h.held_out
        ]
        plots.append(plot(f"Held-out bits per byte, {name}", "by tokens", series, log_x=True))
    if law is not None:
        compute = [x for x, _ in points]
        grid = np.geomspace(min(compute), 4 * max(compute), 60)
        series = [
            Series("the law, to four times the FLOPs", [(float(x), law(float(x))) for x in grid], "main dashed"),
            *(Series(h.name, [point], _style(i)) for i, (h, point) in enumerate(zip(histories, points, strict=True))),
        ]
        plots.append(plot("Last loss against FLOPs", "nats per token", series, log_x=True))
    body = "".join(
        f"<tr><td><b class=key style='color:{COLORS[i % len(COLORS)]}'>■</b> {escape(row[0])}"
        + "".join(f"<td>{escape(cell)}" for cell in row[1:])
        for i, row in enumerate(rows)
    )
    head = "".join(f"<th>{escape(name)}" for name in headings)
    colors = "".join(
        f"path.c{i}{{stroke:{c}}}circle.c{i}{{fill:{c}}}.key.c{i}::before{{background:{c}}}"
        for i, c in enumerate(COLORS)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>runs side by side</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{CSS}{colors}.scores b.key::before{{content:none}}</style></head><body><main><h1>Runs side by side</h1>"
        f"<div class=numbers><table class=scores><tr>{head}{body}</table></div>"
        f"<p>{escape(_tell_law(law, len(histories)))}</p><p>{CURVES if any(fits) else ''}</p>"
        f'<section class="plots">{"".join(plots)}</section></main></body></html>\n'
    )


def _tell_law(law: Fit | None, n_runs: int) -> str:
    if law is not None:
        return f"law of the runs' last losses, C in FLOPs: {law}"
    few = (
        f"{n_runs} run(s) are fewer than the four that a law of three numbers needs"
        if n_runs < 4
        else "losses do not fall"
    )
    return f"no law of the runs' last losses: {few}"


def _style(number: int) -> str:
    return f"c{number % len(COLORS)}" + DASHES[number // len(COLORS) % len(DASHES)]


def _short_names(runs: Sequence[Path]) -> list[str]:
    """Last parts of the paths, or the paths themselves where these would not tell runs apart."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _print(headings: Sequence[str], rows: Sequence[Sequence[str]], law: Fit | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(Text(_tell_law(law, len(rows))), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
