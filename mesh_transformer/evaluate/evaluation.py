# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A model and the tasks that [evaluate] names -> results in lm-evaluation-harness's form, for a person and for programs."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from mesh_transformer.config import Config, ConfigError, config_to_dict
from mesh_transformer.data.errors import Document
from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.evaluate.harness_model import import_harness, make_adapter
from mesh_transformer.evaluate.harness_tasks import TaskInputs, resolve_num_fewshot, load_definition, run_tasks
from mesh_transformer.evaluate.loglikelihood import LoglikelihoodScorer
from mesh_transformer.evaluate.perplexity import TextScore, is_sampled, score_documents, weighted_total
from mesh_transformer.evaluate.published import find_published, pile_components
from mesh_transformer.evaluate.synthetic_tasks import ITEMS
from mesh_transformer.evaluate.tasks import TASKS, TEXT, WIKITEXT, Example, expand_names, find_task, read_examples, to_key
from mesh_transformer.evaluate.texts import check_paths, read_texts
from mesh_transformer.evaluate.wikitext import WikiText, wikitext_results
from mesh_transformer.reports.evaluation_results import Evaluation, make_tables, metrics_of
from mesh_transformer.sample.engine.engine import Engine

EXAMPLES = 100  # items of held-out text that are shown and not asked, where shots are asked for
ProgressFn = Callable[[str, int, int | None], None]  # what is being done, how much of it, of how much if that is known


class EvalTarget(NamedTuple):
    """What is measured."""

    config: Config
    tokenizer: Tokenizer
    scorer: LoglikelihoodScorer
    engine: Engine | None  # to generate text; None while training
    step: int
    location: str  # the checkpoint, or the run


def check_tasks(config: Config) -> list[str]:
    """The names of the tasks that [evaluate] asks for, before anything is computed.

    Raises ConfigError for what cannot be done, DataError for a file that is not there.
    """
    evaluate = config.evaluate
    names = expand_names(evaluate.tasks or (TEXT,))
    asked = [name for name in names if name not in (TEXT, WIKITEXT)]
    made = [to_key(name) for name in asked if find_task(name).make]
    keys = [to_key(name) for name in names]
    for key in keys:
        if key not in (TEXT, *made) and key not in evaluate.data:
            raise ConfigError(
                f"task {key!r} needs its file: --data {key}=PATH, or evaluate.data.{key} in the configuration"
            )
    if asked:
        import_harness()
    for name in asked:
        has_some = to_key(name) in {**evaluate.fewshot_data, **dict.fromkeys(made)}
        resolve_num_fewshot(name, load_definition(name), _shots_of(name, config), sys.maxsize if has_some else 0)
    reads_texts = TEXT in names or bool(made)
    for name in evaluate.data:
        is_task = _is_task(name, config)
        if (is_task and name not in keys) or (not is_task and not reads_texts):
            raise ConfigError(
                f"evaluate.data.{name} is read by none of the tasks {', '.join(names)}; add --task "
                f"{name if is_task else TEXT}, or leave it out"
            )
    for field in ("examples", "num_fewshot_by_task"):
        for name in getattr(evaluate, field):
            if name not in map(to_key, asked):
                raise ConfigError(f"evaluate.{field}.{name}: {name!r} is none of the tasks {', '.join(names)}")
    check_paths(config, _components(config) if reads_texts else (TEXT,))
    return names


def _components(config: Config) -> list[str]:
    """What of evaluate.data is text to be scored, and not the file of a task."""
    return [name for name in config.evaluate.data if not _is_task(name, config)]


def _shots_of(name: str, config: Config) -> int | None:
    return config.evaluate.num_fewshot_by_task.get(to_key(name), config.evaluate.num_fewshot)


def _is_task(name: str, config: Config) -> bool:
    return name in TASKS or name == WIKITEXT or name in map(to_key, config.evaluate.tasks)


def evaluate_model(subject: EvalTarget, report: ProgressFn = lambda what, done, total: None) -> dict[str, Any]:
    """Results of all tasks; see benchmarks.py for their form. Raises ConfigError, DataError and what scoring raises."""
    evaluate = subject.config.evaluate
    names = check_tasks(subject.config)
    found: dict[str, Any] = {"results": {}, "versions": {}, "n-samples": {}, "n-shot": {}, "higher_is_better": {}}
    if TEXT in names:
        _add_texts(found, _score(subject, _read_texts(subject), TEXT, report))
    if WIKITEXT in names:
        path = Path(evaluate.data[WIKITEXT]).expanduser()
        corpus = WikiText(path.read_text(encoding="utf-8"), str(path))
        picked = [
            article for article in corpus.articles() if is_sampled(article.document.name, evaluate.sample_fraction)
        ]
        picked = picked[: evaluate.limit]
        scores = _score(subject, ((WIKITEXT, article.document) for article in picked), WIKITEXT, report)
        results = wikitext_results(scores[WIKITEXT], sum(article.n_words for article in picked))
        _add(found, WIKITEXT, results, scores[WIKITEXT].documents)
    if asked := [name for name in names if name not in (TEXT, WIKITEXT)]:
        items = {name: _find_questions(subject, name) for name in asked}
        adapter = make_adapter(subject.scorer, subject.tokenizer, subject.engine, report)
        for key, values in run_tasks(adapter, items).items():
            found[key] |= _to_plain(values)
    found["config"] = {
        "model": "mesh-transformer",
        "model_args": subject.location,
        "step": subject.step,
        "evaluate": config_to_dict(evaluate),
        "tokenizer": subject.tokenizer.fingerprint,
        "jax": jax.__version__,
    }
    found["date"] = time.time()
    found["published"] = find_published(metrics_of(found).keys())
    return found


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """The tables of benchmarks.py."""
    for table in make_tables(evaluation):
        shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for number, heading in enumerate(table.headings):
            left = number == 0 or heading in ("metric", "source")
            shown.add_column(heading, justify="left" if left else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row), style="bold" if row[0] == "this model" else "")
        console.print(shown)
        console.print()


def _read_texts(subject: EvalTarget) -> Iterator[tuple[str, Document]]:
    return read_texts(subject.config, subject.tokenizer, _components(subject.config))


def _score(
    subject: EvalTarget, documents: Iterator[tuple[str, Document]], what: str, report: ProgressFn
) -> dict[str, TextScore]:
    evaluate = subject.config.evaluate
    return score_documents(
        subject.scorer,
        subject.tokenizer,
        documents,
        context=evaluate.context,
        stride=evaluate.stride,
        limit=evaluate.limit,
        fraction=evaluate.sample_fraction,
        report=lambda n_bytes: report(f"{what}: bytes", n_bytes, None),
    )


def _add_texts(found: dict[str, Any], scores: dict[str, TextScore]) -> None:
    """Every component, and the total where there are several; of the Pile's 22 the total is the Pile's."""
    for name, score in scores.items():
        _add(found, f"{TEXT}:{name}", score.to_results(), score.documents)
    if len(scores) > 1:
        total = "pile" if scores.keys() == pile_components() else TEXT
        _add(found, total, weighted_total(scores), sum(score.documents for score in scores.values()))


def _add(found: dict[str, Any], name: str, values: dict[str, float], n_items: int) -> None:
    found["results"][name] = {"alias": name, **{f"{key},none": value for key, value in values.items()}}
    found["versions"][name] = 1.0
    found["n-samples"][name] = {"original": n_items, "effective": n_items}
    found["higher_is_better"][name] = dict.fromkeys(values, False)


def _find_questions(subject: EvalTarget, name: str) -> TaskInputs:
    """What a task asks and shows: records of its files, or items of held-out text, of which some are shown, not asked."""
    evaluate, make, key = subject.config.evaluate, find_task(name).make, to_key(name)
    shots = _shots_of(name, subject.config)
    examples = read_examples(name, evaluate.fewshot_data[key]) if key in evaluate.fewshot_data else []
    if make is None:
        return TaskInputs(read_examples(name, evaluate.data[key], evaluate.limit), examples, shots)
    count, spare = evaluate.limit or ITEMS, EXAMPLES if shots and not examples else 0
    made = make((document for _, document in _read_texts(subject)), count + spare)
    items = [Example(record, f"item {number} of held-out text") for number, record in enumerate(made)]
    n_asked = min(count, max(len(items) - spare, len(items) // 2))  # of little text half is asked
    return TaskInputs(items[:n_asked], examples or items[n_asked:], shots)


def _to_plain(values: dict[str, Any]) -> dict[str, Any]:
    """The harness's numbers as JSON has them: NumPy's as Python's, those that are not finite as text."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            plain[key] = _to_plain(value)
        else:
            number = value.item() if hasattr(value, "item") else value
            finite = not isinstance(number, float) or abs(number) < float("inf")
            plain[key] = number if finite else str(number)
    return plain
