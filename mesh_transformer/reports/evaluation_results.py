# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation results of a run folder: evaluation_<step>.json in lm-evaluation-harness's format, tables and plots.

{"results": {TASK: {"alias": TASK, "METRIC,FILTER": value, "METRIC_stderr,FILTER": value}}, "versions": ...,
 "n-samples": {TASK: {"effective": n, "cut": <prompts that were truncated>}}, "higher_is_better": ...,
 "config": {"model": "mesh-transformer", "step": ..., ...}, "date": <unix seconds>,
 "published": [{"model": ..., "source": ..., "scores": {"TASK.METRIC": value}}]}

FILTER is the harness's answer filter, "none" if the answer is used unchanged. "published" has results of other models for
the same tasks and metrics.
"""

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.reports.page import make_html_table, make_plots
from mesh_transformer.reports.svg import DASHES, STYLES, Series, plot
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
TASK_HEADINGS = ("", "metric", "value", "standard error", "examples", "few-shot", "truncated prompts")
COUNTS = ("documents", "bytes", "tokens", "words")


class Table(NamedTuple):
    """A table of text cells; the first column holds the names of the rows."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def evaluation_file(run_dir: Path, step: int) -> Path:
    """Return the path of the file with the results of a step."""
    return run_dir / f"evaluation_{step}.json"


def write_evaluation(run_dir: Path, step: int, evaluation: Evaluation) -> Path:
    """Write the results of a step and return the path; results of other tasks in the file are retained."""
    path = evaluation_file(run_dir, step)
    before = _read(path) if path.exists() else {}
    merged = {**evaluation, **{key: {**before.get(key, {}), **evaluation.get(key, {})} for key in MERGED}}
    named = {(row["model"], row["source"]): row for row in [*before.get("published", []), *evaluation["published"]]}
    merged["published"] = [{**row, "scores": _join_scores(key, before, evaluation)} for key, row in named.items()]
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(merged, indent=2, allow_nan=False) + "\n").encode())
    return path


def read_evaluations(run_dir: Path) -> dict[int, Evaluation]:
    """Return all results of a run folder by step; raise ValueError, with the path, for a file in another format."""
    steps = {}
    for path in run_dir.glob("evaluation_*.json"):
        if (step := path.stem.removeprefix("evaluation_")).isdigit():
            steps[int(step)] = _read(path)
    return dict(sorted(steps.items()))


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """Return "TASK.METRIC", or "TASK.METRIC_FILTER" for a filter other than "none" -> value; without errors and counts."""
    scores = {}
    for task, values in evaluation["results"].items():
        for metric, answer_filter, value in _metric_values(values):
            if metric not in COUNTS:
                scores[f"{task}.{metric}{answer_filter and f'_{answer_filter}'}"] = float(value)
    return scores


def _metric_values(values: Mapping[str, Any]) -> Iterable[tuple[str, str, float]]:
    """Yield (metric, filter, value) without standard errors and text; the filter "none" becomes ""."""
    for key, value in values.items():
        metric, comma, answer_filter = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield metric, "" if answer_filter == "none" else answer_filter, value


def make_tables(evaluation: Evaluation) -> list[Table]:
    """Return the nonempty tables of texts, of tasks, and of published results of other models."""
    results = evaluation["results"]
    texts = {task: values for task, values in results.items() if "bits_per_byte,none" in values}
    tasks = {task: values for task, values in results.items() if task not in texts}
    tables = []
    if texts:
        columns = [key for key in TEXT_COLUMNS if any(f"{key},none" in values for values in texts.values())]
        rows = [[task, *(_cell(values, key) for key in columns)] for task, values in texts.items()]
        tables.append(Table("text", ["", *(TEXT_COLUMNS[key][0] for key in columns)], rows))
    if rows := [row for task, values in tasks.items() for row in _task_rows(evaluation, task, values)]:
        n_columns = len(TASK_HEADINGS) if any(row[-1] for row in rows) else len(TASK_HEADINGS) - 1
        tables.append(Table("tasks", list(TASK_HEADINGS[:n_columns]), [row[:n_columns] for row in rows]))
    if evaluation.get("published"):
        tables.append(_comparison(evaluation))
    return tables


def _task_rows(evaluation: Evaluation, task: str, values: Mapping[str, Any]) -> Iterable[list[str]]:
    """Yield a row per metric of a task; the columns are TASK_HEADINGS."""
    samples = evaluation.get("n-samples", {}).get(task, {})
    counts = [
        str(samples.get("effective", "")),
        str(evaluation.get("n-shot", {}).get(task, 0)),
        str(samples.get("cut", "")),
    ]
    for metric, answer_filter, value in _metric_values(values):
        error = values.get(f"{metric}_stderr,{answer_filter or 'none'}")
        name = f"{metric} ({answer_filter})" if answer_filter else metric
        yield [task, name, f"{value:.4g}", f"{error:.2g}" if isinstance(error, int | float) else "", *counts]


def draw_evaluations(evaluations: Mapping[int, Evaluation]) -> str:
    """Return the section of the report page, or "" without results."""
    if not evaluations:
        return ""
    step, latest = list(evaluations.items())[-1]
    parts = [
        f"<h3>{escape(table.title)}</h3>{make_html_table(table.headings, table.rows, style='scores')}"
        for table in make_tables(latest)
    ]
    plots = list(_plots(evaluations)) if len(evaluations) > 1 else []
    return f"<section><h2>Evaluation, step {step:,}</h2>{''.join(parts)}{make_plots(plots)}</section>"


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


def _comparison(evaluation: Evaluation) -> Table:
    scores = metrics_of(evaluation)
    names = [name for name in scores if any(name in row["scores"] for row in evaluation["published"])]
    rows = [["this model", *(_number(scores[name]) for name in names), ""]]
    for row in evaluation["published"]:
        rows.append([row["model"], *(_number(row["scores"].get(name)) for name in names), row["source"]])
    return Table("compared with published results", ["", *names, "source"], rows)


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
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: invalid JSON ({error}); move the file out of the run folder") from None
    if isinstance(evaluation, dict) and isinstance(evaluation.get("results"), dict):
        return evaluation
    raise ValueError(
        f'{path}: no table "results" as lm-evaluation-harness writes it; move the file out of the run folder'
    )
