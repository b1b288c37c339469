# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""report.html of a run: one self-contained page made from metrics.jsonl, config.toml and the evaluation results.

All text that comes from the run is escaped. See page.py for the page's template and metrics_table.py for the logged values.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.reports.console import format_time
from mesh_transformer.reports.evaluation_results import Evaluation, draw_evaluations, read_evaluations
from mesh_transformer.reports.expert_load import draw_loads, read_loads
from mesh_transformer.reports.metrics_log import FILE, read_metrics
from mesh_transformer.reports.metrics_table import (
    EXPERTS,
    OPTIMIZATION,
    SPEED,
    TRAIN_METRICS,
    VALIDATION_METRICS,
    Metric,
    Plot,
    representative_layers,
)
from mesh_transformer.reports.page import make_details, make_html_page, make_html_table, make_plots
from mesh_transformer.reports.svg import STYLES, Point, Points, Series, downsample, drawable, format_number, plot
from mesh_transformer.storage.atomic_files import replace_file

MAX_EVENTS = 200  # maximum events in the list of events
MAX_ROWS = 20  # maximum rows of the table of numbers
RAW_POINTS = 500  # maximum points of a series; a plot is about 570 SVG units wide
SMOOTH_POINTS = 200  # maximum points of a smoothed series
MIN_POINTS = 50  # a series with fewer points is not smoothed
VALIDATION_STYLES = STYLES[1:]  # the first style is for the training loss
Line = Mapping[str, Any]


class Log(NamedTuple):
    """The lines of metrics.jsonl by kind."""

    lines: list[Line]
    train: list[Line]
    validation: list[Line]
    events: list[Line]


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run folder atomically and return its path; raise MetricsError for damaged metrics."""
    lines = read_metrics(run_dir / FILE)
    config = run_dir / "config.toml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    page = make_page(run_dir.name, lines, text, read_evaluations(run_dir))
    path = run_dir / "report.html"
    replace_file(path, page.encode("utf-8", errors="replace"))  # texts may hold lone surrogates
    return path


def make_page(
    name: str, lines: Iterable[Line], config: str, evaluations: Mapping[int, Evaluation] | None = None
) -> str:
    """Return the page of a run."""
    log = _split_lines(lines)
    samples = [line for line in log.events if line.get("event") == "samples"]
    listed_events = [line for line in log.events if line.get("event") != "samples"]
    body = [
        _headline(log),
        _validation_scores(log.validation),
        *(make_plots(plots, group) for group, plots in _plots(log).items()),
        draw_evaluations(evaluations or {}),
        _samples(str(samples[-1].get("text", "")) if samples else ""),
        _event_list(listed_events),
        _number_table(log.train),
        _metric_reference(),
        make_details("configuration", f"<pre>{escape(config)}</pre>"),
    ]
    return make_html_page(name, "".join(body))


def _split_lines(lines: Iterable[Line]) -> Log:
    lines = list(lines)
    by_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "evaluation", "event")}
    return Log(lines, by_kind["train"], by_kind["evaluation"], by_kind["event"])


class Tile(NamedTuple):
    """A number at the top of the page; `note` is small text below the number."""

    label: str
    value: str
    note: str = ""


def _headline(log: Log) -> str:
    if not log.train:
        return "<p>no training step logged yet</p>"
    last = log.train[-1]
    parameters = [number for line in log.lines if (number := _number(line, "parameters")) is not None]
    tiles = [Tile("step", f"{last['step']:,}")]
    tiles += [Tile(metric.label, _format(last, metric)) for metric in TRAIN_METRICS if _has_tile(metric, last)]
    tiles += [_validation_tile(name, line) for name, line in _last_scores(log.validation).items()]
    if parameters:
        tiles.append(Tile("parameters", format_number(parameters[-1])))
    tiles.append(Tile("time", format_time(active_seconds(log.lines)[-1]), "without interruptions"))
    if loads := [expert for layer in read_loads(log.train) for expert in layer]:
        idle = sum(all(not load for load in expert) for expert in loads)
        tiles.append(
            Tile(
                "unused experts", f"{idle} of {len(loads)}", "without a token at any logged step, in the plotted layers"
            )
        )
    shown = (
        f"<div><dt>{escape(tile.label)}</dt><dd>{tile.value}</dd>"
        f"{f'<dd class=more>{tile.note}</dd>' if tile.note else ''}</div>"
        for tile in tiles
    )
    return f'<dl class="figures">{"".join(shown)}</dl>'


def _has_tile(metric: Metric, line: Line) -> bool:
    return metric.headline and not (metric.optional and not _number(line, metric.name))


def _validation_tile(name: str, line: Line) -> Tile:
    compressed = [(tool, _number(line, f"{tool}_bits_per_byte")) for tool in ("gzip", "xz")]
    note = ", ".join(f"{tool} -9: {value:.3f}" for tool, value in compressed if value is not None)
    return Tile(f"bits per byte, {name}", _text(_number(line, "bits_per_byte"), "{:.3f}"), note)


def active_seconds(lines: Sequence[Line]) -> list[float]:
    """Return the seconds from the first line to each line, without the time between an interruption and its resumption."""
    passed = [0.0]
    previous: float | None = None
    for line in lines:
        time = _number(line, "time")
        if previous is None or time is None or line.get("event") == "resumed":
            passed.append(passed[-1])
        else:
            passed.append(passed[-1] + max(time - previous, 0.0))
        previous = previous if time is None else time
    return passed[1:] or passed


def _last_scores(validation: list[Line]) -> dict[str, Line]:
    return {str(line.get("set", "")): line for line in validation}


def _validation_scores(validation: list[Line]) -> str:
    parts = []
    for name, line in _last_scores(validation).items():
        bars = [
            (metric.label, value, "model" if metric.name == "bits_per_byte" else "tool")
            for metric in VALIDATION_METRICS
            if metric.unit == "bits/byte" and (value := _number(line, metric.name)) is not None
        ]
        longest = max((value for _, value, _ in bars), default=1.0) or 1.0
        parts.append(f"<h3>{escape(name)}, step {line['step']:,}: loss {_text(_number(line, 'loss'), '{:.4f}')}</h3>")
        parts += [
            f'<div class="bar {style}"><span>{label}</span><i style="width:{60 * value / longest:.1f}%"></i>'
            f"<b>{value:.3f}</b></div>"
            for label, value, style in bars
        ]
    return f"<section><h2>Held-out bits per byte</h2>{''.join(parts)}</section>" if parts else ""


def _plots(log: Log) -> dict[str, list[str]]:
    """Return the figures of the plots by the heading of their group."""
    skipped = sorted({line["step"] for line in log.events if line.get("event") == "skipped"})
    groups = {"Loss": _loss_plots(log, skipped), OPTIMIZATION: [], SPEED: [], EXPERTS: []}
    for metric in TRAIN_METRICS:
        points = _points(log.train, metric.name)
        if metric.plot and not (metric.optional and all(y is None for _, y in points)):
            marks = skipped if metric.name == "grad_norm" else ()
            groups[metric.plot.group].append(_plot_metric(metric.plot, points, marks))
    groups[OPTIMIZATION] += _layer_norm_plots(log.train)
    groups[EXPERTS] += draw_loads(log.train)
    return groups


def _loss_plots(log: Log, skipped: list[int]) -> list[str]:
    # A skipped step does not change the model. The plot marks the step, but its loss does not affect the range of the axis.
    not_skipped = [line for line in log.train if line["step"] not in set(skipped)]
    losses = _series("training", _points(not_skipped, "loss"))
    bits = []
    for number, name in enumerate(_last_scores(log.validation)):
        style = VALIDATION_STYLES[number % len(VALIDATION_STYLES)]
        set_lines = [line for line in log.validation if str(line.get("set", "")) == name]
        losses.append(Series(name, downsample(_points(set_lines, "loss"), RAW_POINTS), style, markers=True))
        bits.append(Series(name, downsample(_points(set_lines, "bits_per_byte"), RAW_POINTS), style, markers=True))
    subtitle = "nats per token, by step" + ("; dashed: skipped" if skipped else "")
    return [plot("Loss", subtitle, losses, marks=skipped), plot("Held-out bits per byte", "by step", bits)]


def _plot_metric(metric_plot: Plot, points: Points, marks: Sequence[float]) -> str:
    if metric_plot.smoothed:
        series = _series(metric_plot.line, points, log=metric_plot.log)
    else:
        series = [Series(metric_plot.line, downsample(points, RAW_POINTS), "main")]
    return plot(metric_plot.title, metric_plot.subtitle, series, log=metric_plot.log, marks=marks)


def _layer_norm_plots(train: list[Line]) -> list[str]:
    n_layers = max((len(norms) for line in train if isinstance(norms := line.get("layer_grad_norms"), list)), default=0)
    if not n_layers:
        return []
    series = [
        Series(f"layer {i}", downsample(smooth(_points(train, "layer_grad_norms", i), log=True), SMOOTH_POINTS), style)
        for style, i in zip(VALIDATION_STYLES, representative_layers(n_layers), strict=False)
    ]
    return [plot("Gradient norm by layer", "smoothed, by step", series, log=True)]


def _series(name: str, points: Points, *, log: bool = False) -> list[Series]:
    """Return the measured series and, for at least MIN_POINTS points, a smoothed series to draw on top."""
    if len(points) < MIN_POINTS:
        return [Series(name, downsample(points, RAW_POINTS), "main")]
    smoothed = downsample(smooth(points, log=log), SMOOTH_POINTS)
    return [Series(name, downsample(points, RAW_POINTS), "faint"), Series("smoothed", smoothed, "main")]


def _samples(text: str) -> str:
    if not text:
        return ""
    return f"<section><h2>Samples</h2><pre class=samples>{escape(text)}</pre></section>"


def _event_list(events: list[Line]) -> str:
    rows = [
        f"<tr><td>{line['step']:,}<td>{escape(str(line.get('event', '')))}<td>{escape(str(line.get('text', '')))}"
        for line in events
    ]
    note = f"<p>the last {MAX_EVENTS} of {len(rows):,} events</p>" if len(rows) > MAX_EVENTS else ""
    table = f"<table><tr><th>step<th>event<th>text{''.join(rows[-MAX_EVENTS:])}</table>"
    return make_details("events", note + table, is_open=any(line.get("event") == "save failed" for line in events))


def _number_table(train: list[Line]) -> str:
    """Return the plotted values as a table of at most MAX_ROWS steps that includes the last step."""
    names = [
        metric.name
        for metric in TRAIN_METRICS
        if metric.name == "loss" or (metric.plot and any(metric.name in line for line in train))
    ]
    stride = max(math.ceil(len(train) / MAX_ROWS), 1)
    rows = [
        [f"{line['step']:,}", *(_text(_number(line, name), "{:.4g}") for name in names)]
        for line in train[::-1][::stride][::-1]
    ]
    return make_details("numbers", make_html_table([name.replace("_", " ") for name in ["step", *names]], rows))


def _metric_reference() -> str:
    rows = "".join(
        f"<tr><td>{metric.name}<td>{escape(metric.meaning)}<td>{escape(metric.unit)}" for metric in TRAIN_METRICS
    )
    return make_details("logged values", f"<table><tr><th>name<th>meaning<th>unit{rows}</table>")


def _number(line: Line, name: str, item: int | None = None) -> float | None:
    """Return a value of a line, or item `item` of a list, as a number that can be drawn; None for other values."""
    value = line.get(name)
    if item is not None:
        value = value[item] if isinstance(value, list) and item < len(value) else None
    return drawable(value)


def _points(lines: Iterable[Line], name: str, item: int | None = None) -> list[Point]:
    return [(line["step"], _number(line, name, item)) for line in lines]


def smooth(points: Points, *, log: bool = False) -> list[Point]:
    """Return a moving mean (geometric if `log`) over a fiftieth of the points; fewer at the start, where curves are steep."""
    max_radius = max(len(points) // 100, 2)
    totals = [0.0]
    counts = [0]
    for _, y in points:
        usable = y is not None and (y > 0 or not log)
        totals.append(totals[-1] + ((math.log(y) if log else y) if y is not None and usable else 0.0))
        counts.append(counts[-1] + usable)
    smoothed: list[Point] = []
    for i, (x, _) in enumerate(points):
        radius = min(i // 4, max_radius)
        first = i - radius
        end = min(i + radius + 1, len(points))
        count = counts[end] - counts[first]
        mean = (totals[end] - totals[first]) / max(count, 1)
        smoothed.append((x, (math.exp(mean) if log else mean) if count else None))
    return smoothed


def _format(line: Line, metric: Metric) -> str:
    return _text(_number(line, metric.name), metric.value_format)


def _text(value: float | None, value_format: str) -> str:
    return format_number(None) if value is None else value_format.format(value)
