# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a model on the tasks of [evaluate], with results in lm-evaluation-harness's format."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from mesh_transformer.config import Config, ConfigError, config_to_dict
from mesh_transformer.data.errors import Document
from mesh_transformer.evaluate.harness_tasks import (
    TaskInputs,
    import_harness,
    load_definition,
    resolve_num_fewshot,
    run_tasks,
)
from mesh_transformer.evaluate.loglikelihood import LoglikelihoodScorer
from mesh_transformer.evaluate.perplexity import TextScore, is_sampled, score_documents, weighted_total
from mesh_transformer.evaluate.published import find_published, pile_components
from mesh_transformer.evaluate.synthetic_tasks import DEFAULT_EXAMPLES
from mesh_transformer.evaluate.tasks import (
    TASKS,
    TEXT,
    WIKITEXT,
    Example,
    expand_names,
    find_task,
    read_examples,
    to_key,
)
from mesh_transformer.evaluate.texts import check_paths, read_texts
from mesh_transformer.evaluate.wikitext import WikiText, wikitext_results
from mesh_transformer.reports.console import ProgressFn
from mesh_transformer.reports.evaluation_results import Evaluation, make_tables, metrics_of
from mesh_transformer.sample.engine.engine import Engine
from mesh_transformer.sample.model_defaults import ModelDefaults

FEWSHOT_POOL = 100  # synthetic examples that are reserved for few-shot prompts


class EvalTarget(NamedTuple):
    """The model to evaluate, and the configuration that names the tasks."""

    config: Config
    defaults: ModelDefaults
    scorer: LoglikelihoodScorer
    engine: Engine | None  # generates text; None if no task needs it
    step: int
    location: str  # folder of the checkpoint or run


def check_tasks(config: Config) -> list[str]:
    """Check [evaluate] without reading data, and return the names of its tasks, with groups expanded.

    Raises ConfigError for an invalid configuration, DataError for a missing file.
    """
    evaluate = config.evaluate
    names = expand_names(evaluate.tasks or (TEXT,))
    harness_names = _harness_names(names)
    synthetic = [to_key(name) for name in harness_names if find_task(name).make]
    keys = [to_key(name) for name in names]
    for key in keys:
        if key not in (TEXT, *synthetic) and key not in evaluate.data:
            raise ConfigError(f"task {key!r} has no data file; add --data {key}=PATH, or set evaluate.data.{key}")
    if harness_names:
        import_harness()
    for name in harness_names:
        has_pool = to_key(name) in {**evaluate.fewshot_data, **dict.fromkeys(synthetic)}
        resolve_num_fewshot(name, load_definition(name), _num_fewshot(name, config), sys.maxsize if has_pool else 0)
    reads_texts = TEXT in names or bool(synthetic)
    for name in evaluate.data:
        is_task = _is_task(name, config)
        if (is_task and name not in keys) or (not is_task and not reads_texts):
            raise ConfigError(
                f"evaluate.data.{name} is not used by the tasks {', '.join(names)}; add --task "
                f"{name if is_task else TEXT}, or remove this entry"
            )
    for field, entries in (
        ("fewshot_data", evaluate.fewshot_data),
        ("num_fewshot_by_task", evaluate.num_fewshot_by_task),
    ):
        for name in entries:
            if name in (TEXT, WIKITEXT):
                raise ConfigError(f"evaluate.{field}.{name}: task {name!r} has no few-shot prompts; remove this entry")
            if name not in map(to_key, harness_names):
                raise ConfigError(
                    f"evaluate.{field}.{name}: {name!r} is not one of the tasks {', '.join(names)}; add --task {name}, "
                    "or remove this entry"
                )
    check_paths(config, _components(config) if reads_texts else (TEXT,))
    return names


def _harness_names(names: list[str]) -> list[str]:
    return [name for name in names if name not in (TEXT, WIKITEXT)]


def _components(config: Config) -> list[str]:
    """Return the names in evaluate.data that are components of the text task rather than tasks."""
    return [name for name in config.evaluate.data if not _is_task(name, config)]


def _num_fewshot(name: str, config: Config) -> int | None:
    return config.evaluate.num_fewshot_by_task.get(to_key(name), config.evaluate.num_fewshot)


def _is_task(name: str, config: Config) -> bool:
    return name in TASKS or name == WIKITEXT or name in map(to_key, config.evaluate.tasks)


def evaluate_model(target: EvalTarget, on_progress: ProgressFn = lambda name, done, total: None) -> dict[str, Any]:
    """Return the results of all tasks; reports/evaluation_results.py describes their format.

    Raises ConfigError for an invalid configuration, DataError for invalid data, ScoringError for tokens that cannot be
    scored.
    """
    evaluate = target.config.evaluate
    names = check_tasks(target.config)
    evaluation: dict[str, Any] = {"results": {}, "versions": {}, "n-samples": {}, "n-shot": {}, "higher_is_better": {}}
    if TEXT in names:
        _add_texts(evaluation, _score(target, _read_texts(target), TEXT, on_progress))
    if WIKITEXT in names:
        _add_wikitext(evaluation, target, on_progress)
    if harness_names := _harness_names(names):
        # Imported here, because it requires lm-evaluation-harness, an optional dependency.
        from mesh_transformer.evaluate.harness_model import HarnessModel

        model = HarnessModel(target.scorer, target.defaults, target.engine, on_progress)
        results = run_tasks(model, {name: _read_inputs(target, name) for name in harness_names})
        for key, values in results.items():
            evaluation[key] |= _to_plain(values)
    evaluation["config"] = {
        "model": "mesh-transformer",
        "model_args": target.location,
        "step": target.step,
        "evaluate": config_to_dict(evaluate),
        "tokenizer": target.defaults.tokenizer.fingerprint,
        "jax": jax.__version__,
    }
    evaluation["date"] = time.time()
    evaluation["published"] = find_published(metrics_of(evaluation).keys())
    return evaluation


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the tables that `make_tables` (reports/evaluation_results.py) makes of the results."""
    for table in make_tables(evaluation):
        shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for number, heading in enumerate(table.headings):
            is_left = number == 0 or heading in ("metric", "source")
            shown.add_column(heading, justify="left" if is_left else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row), style="bold" if row[0] == "this model" else "")
        console.print(shown)
        console.print()


def _read_texts(target: EvalTarget) -> Iterator[tuple[str, Document]]:
    return read_texts(target.config, target.defaults.tokenizer, _components(target.config))


def _score(
    target: EvalTarget, documents: Iterator[tuple[str, Document]], name: str, on_progress: ProgressFn
) -> dict[str, TextScore]:
    evaluate = target.config.evaluate
    return score_documents(
        target.scorer,
        target.defaults,
        documents,
        context=evaluate.context,
        stride=evaluate.stride,
        limit=evaluate.limit,
        fraction=evaluate.sample_fraction,
        on_progress=lambda n_bytes: on_progress(f"{name}: bytes", n_bytes, None),
    )


def _add_texts(evaluation: dict[str, Any], scores: dict[str, TextScore]) -> None:
    """Add the scores of every component and, if there are several, a total, named "pile" for the Pile's 22 components."""
    for name, score in scores.items():
        _add(evaluation, f"{TEXT}:{name}", score.to_results(), score.documents)
    if len(scores) > 1:
        total = "pile" if scores.keys() == pile_components() else TEXT
        _add(evaluation, total, weighted_total(scores), sum(score.documents for score in scores.values()))


def _add_wikitext(evaluation: dict[str, Any], target: EvalTarget, on_progress: ProgressFn) -> None:
    evaluate = target.config.evaluate
    path = Path(evaluate.data[WIKITEXT]).expanduser()
    corpus = WikiText(path.read_text(encoding="utf-8"), str(path))
    articles = [article for article in corpus.articles() if is_sampled(article.document.name, evaluate.sample_fraction)]
    articles = articles[: evaluate.limit]
    documents = ((WIKITEXT, article.document) for article in articles)
    score = _score(target, documents, WIKITEXT, on_progress)[WIKITEXT]
    results = wikitext_results(score, sum(article.n_words for article in articles))
    _add(evaluation, WIKITEXT, results, score.documents)


def _add(evaluation: dict[str, Any], name: str, values: dict[str, float], n_documents: int) -> None:
    evaluation["results"][name] = {"alias": name, **{f"{key},none": value for key, value in values.items()}}
    evaluation["versions"][name] = 1.0
    evaluation["n-samples"][name] = {"original": n_documents, "effective": n_documents}
    evaluation["higher_is_better"][name] = dict.fromkeys(values, False)


def _read_inputs(target: EvalTarget, name: str) -> TaskInputs:
    """Return the examples of a task, read from its data files or made from held-out text."""
    evaluate = target.config.evaluate
    make = find_task(name).make
    key = to_key(name)
    num_fewshot = _num_fewshot(name, target.config)
    fewshot = read_examples(name, evaluate.fewshot_data[key]) if key in evaluate.fewshot_data else []
    if make is None:
        return TaskInputs(read_examples(name, evaluate.data[key], evaluate.limit), fewshot, num_fewshot)
    count = evaluate.limit or DEFAULT_EXAMPLES
    reserved = FEWSHOT_POOL if num_fewshot and not fewshot else 0
    made = make((document for _, document in _read_texts(target)), count + reserved)
    examples = [Example(record, f"example {number} of held-out text") for number, record in enumerate(made)]
    # If there is little text, at least half of the examples are scored.
    n_scored = min(count, max(len(examples) - reserved, len(examples) // 2))
    return TaskInputs(examples[:n_scored], fewshot or examples[n_scored:], num_fewshot)


def _to_plain(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the harness's numbers to JSON values: NumPy scalars to Python numbers, infinities and NaN to strings."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            plain[key] = _to_plain(value)
        else:
            number = value.item() if hasattr(value, "item") else value
            is_finite = not isinstance(number, float) or abs(number) < float("inf")
            plain[key] = number if is_finite else str(number)
    return plain
