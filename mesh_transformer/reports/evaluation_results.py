# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Results of evaluation in a run folder: evaluation_<step>.json in lm-evaluation-harness's form; as tables and as plots.

{"results": {TASK: {"alias": TASK, "METRIC,none": value, "METRIC_stderr,none": value}}, "n-samples": {TASK: {"effective": n}},
 "versions": ..., "higher_is_better": ..., "config": {"model": "mesh-transformer", "step": ..., ...}, "date": <unix seconds>,
 "published": [{"model": ..., "source": ..., "scores": {"TASK.METRIC": value}}]}   published: of those tasks and metrics alone
"""

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.reports.svg import DASHES, Series, plot
from mesh_transformer.storage.atomic_files import replace_file

Evaluation = Mapping[str, Any]
MERGED = ("results", "versions", "n-samples", "n-shot", "higher_is_better")
TEXT_COLUMNS = {
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "word_perplexity": ("perplexity/word", "{:.3f}"),
    "token_perplexity": ("perplexity/token", "{:.3f}"),
    "nats_per_token": ("nats/token", "{:.4f}"),
    "tokens_per_byte": ("tokens/byte", "{:.4f}"),
    "bytes": ("bytes", "{:,.0f}"),
}
COUNTS = ("documents", "bytes", "tokens", "words")
STYLES = ("main", "accent", "second", "third", "fourth")


class Table(NamedTuple):
    """Cells as text; the first column names the row."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def evaluation_file(run_dir: Path, step: int) -> Path:
    """Where the results of a step are."""
    return run_dir / f"evaluation_{step}.json"


def write_evaluation(run_dir: Path, step: int, evaluation: Evaluation) -> Path:
    """Write the results of a step; those of other tasks that the file has already stay in it."""
    path = evaluation_file(run_dir, step)
    before = _read(path) if path.exists() else {}
    merged = {**evaluation, **{key: {**before.get(key, {}), **evaluation.get(key, {})} for key in MERGED}}
    named = {(row["model"], row["source"]): row for row in [*before.get("published", []), *evaluation["published"]]}
    merged["published"] = [{**row, "scores": _join_scores(key, before, evaluation)} for key, row in named.items()]
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(merged, indent=2, allow_nan=False) + "\n").encode())
    return path


def read_evaluations(run_dir: Path) -> dict[int, Evaluation]:
    """All results of a run folder by step; ValueError, naming the file, for one that is not ours."""
    steps = {}
    for path in run_dir.glob("evaluation_*.json"):
        if (step := path.stem.removeprefix("evaluation_")).isdigit():
            steps[int(step)] = _read(path)
    return dict(sorted(steps.items()))


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """ "TASK.METRIC" -> value, without standard errors and counts; METRIC_FILTER where an answer is read in several ways."""
    found = {}
    for task, values in evaluation["results"].items():
        for metric, reading, value in _measures(values):
            if metric not in COUNTS:
                found[f"{task}.{metric}{reading and f'_{reading}'}"] = float(value)
    return found


def _measures(values: Mapping[str, Any]) -> Iterable[tuple[str, str, float]]:
    """Metric, how the answer was read ("" for as it is), and value; without standard errors and what is no number."""
    for key, value in values.items():
        metric, comma, reading = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield metric, "" if reading == "none" else reading, value


def make_tables(evaluation: Evaluation) -> list[Table]:
    """What was measured: texts, tasks, and this model among those that others have published."""
    results, tables = evaluation["results"], []
    texts = {task: values for task, values in results.items() if "bits_per_byte,none" in values}
    if texts:
        columns = [key for key in TEXT_COLUMNS if any(f"{key},none" in values for values in texts.values())]
        rows = [[task, *(_cell(values, key) for key in columns)] for task, values in texts.items()]
        tables.append(Table("text", ["", *(TEXT_COLUMNS[key][0] for key in columns)], rows))
    rows = []
    for task, values in results.items():
        if task in texts:
            continue
        counts = evaluation.get("n-samples", {}).get(task, {})
        of_it = [
            str(counts.get("effective", "")),
            str(evaluation.get("n-shot", {}).get(task, 0)),
            str(counts.get("cut", "")),
        ]
        for metric, reading, value in _measures(values):
            error = values.get(f"{metric}_stderr,{reading or 'none'}")
            is_number = isinstance(error, int | float)
            name = f"{metric} ({reading})" if reading else metric
            rows.append([task, name, f"{value:.4g}", f"{error:.2g}" if is_number else "", *of_it])
    if rows:
        headings = ["", "metric", "value", "standard error", "items", "shots", "prompts cut"]
        shown = len(headings) if any(row[-1] for row in rows) else len(headings) - 1
        tables.append(Table("tasks", headings[:shown], [row[:shown] for row in rows]))
    if evaluation.get("published"):
        tables.append(_compare(evaluation))
    return tables


def draw_evaluations(evaluations: Mapping[int, Evaluation]) -> str:
    """The section of the report page; empty without results."""
    if not evaluations:
        return ""
    step, newest = list(evaluations.items())[-1]
    parts = []
    for table in make_tables(newest):
        head = "".join(f"<th>{escape(name)}" for name in table.headings)
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in table.rows)
        parts.append(
            f"<h3>{escape(table.title)}</h3><div class=numbers><table class=scores><tr>{head}{rows}</table></div>"
        )
    plots = "".join(_plots(evaluations)) if len(evaluations) > 1 else ""
    figures = f'<div class="plots">{plots}</div>' if plots else ""
    return f"<section><h2>Evaluation, step {step:,}</h2>{''.join(parts)}{figures}</section>"


def _plots(evaluations: Mapping[int, Evaluation]) -> Iterable[str]:
    for title, ending in (("Bits per byte of texts", "bits_per_byte"), ("Accuracy of tasks", "acc")):
        names = sorted({name for e in evaluations.values() for name in metrics_of(e) if name.endswith(f".{ending}")})
        series = [
            Series(
                name.removesuffix(f".{ending}"),
                [(step, metrics_of(e).get(name)) for step, e in evaluations.items()],
                STYLES[number % len(STYLES)] + DASHES[number // len(STYLES) % len(DASHES)],
                markers=True,
            )
            for number, name in enumerate(names)
        ]
        if series:
            yield plot(title, "by step", series)


def _compare(evaluation: Evaluation) -> Table:
    ours = metrics_of(evaluation)
    names = [name for name in ours if any(name in row["scores"] for row in evaluation["published"])]
    rows = [["this model", *(_number(ours[name]) for name in names), ""]]
    for row in evaluation["published"]:
        rows.append([row["model"], *(_number(row["scores"].get(name)) for name in names), row["source"]])
    return Table("beside what others have published", ["", *names, "source"], rows)


def _cell(values: Mapping[str, Any], key: str) -> str:
    value = values.get(f"{key},none")
    return "" if value is None else TEXT_COLUMNS[key][1].format(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _join_scores(key: tuple[str, str], *evaluations: Evaluation) -> dict[str, float]:
    joined: dict[str, float] = {}
    for evaluation in evaluations:
        for row in evaluation.get("published", []):
            if (row["model"], row["source"]) == key:
                joined |= row["scores"]
    return joined


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found["results"], dict):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: not the results of an evaluation; move it away")
