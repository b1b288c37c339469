# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A row of tasks.py and its items -> a task of lm-evaluation-harness over them; all tasks -> its results.

Examples for few shots are those that the harness itself draws: from the split its definition names, by its seed.
"""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.config import ConfigError
from mesh_transformer.data.errors import DataError
from mesh_transformer.evaluate.harness_model import import_harness
from mesh_transformer.evaluate.tasks import Example, find_task, is_file, to_key

SEED = 1234  # of the examples: the harness's default


class TaskInputs(NamedTuple):
    """What a task asks."""

    examples: Sequence[Example]
    fewshot_examples: Sequence[Example] = ()  # with their answers, from which shots are drawn
    num_fewshot: int | None = None  # examples before every question; None: as many as the definition says


def load_definition(name: str) -> dict[str, Any]:
    """The settings of a task, in the harness's terms; ConfigError for a file that is not there or is no definition."""
    row = find_task(name)
    if not row.definition:
        return dict(row.settings)
    loader = import_harness("lm_eval.tasks._yaml_loader")
    own, theirs = Path(row.definition).expanduser(), Path(import_harness().__file__).parent / "tasks" / row.definition
    path = own if own.is_file() and is_file(name) else theirs
    if not path.is_file():
        raise ConfigError(f"task {name}: no such file here, nor among the tasks of the harness in {theirs.parent}")
    try:
        settings = loader.load_yaml(path)
    except Exception as error:  # YAML's own, and whatever Python that the file names raises
        raise ConfigError(f"{path}: cannot be read as a task ({type(error).__name__}: {error})") from None
    if "output_type" not in settings and "task" not in settings:
        raise ConfigError(f"{path}: not the definition of one task (a group, or a part that others include)")
    return settings | row.settings


def resolve_num_fewshot(name: str, settings: Mapping[str, Any], shots: int | None, there: int) -> int:
    """Examples before every question, as asked for or else as the definition says; ConfigError if fewer are `there`."""
    count = shots if shots is not None else settings.get("num_fewshot") or 0
    if there < count and not (settings.get("fewshot_config") or {}).get("samples"):
        key = to_key(name)
        raise ConfigError(
            f"task {name}: {count} shots need as many examples, and there are {there or 'none'}: --examples {key}=FILE of "
            f"its training records, or --shots {key}=0"
        )
    return count


def make_task(name: str, inputs: TaskInputs) -> Any:
    """A task of the harness, ready to ask.

    Raises ConfigError for shots without enough examples, DataError, with file and line, for a record that the
    definition cannot read.
    """
    dataset, tasks = import_harness("datasets").Dataset, import_harness("lm_eval.api.task")
    settings = load_definition(name)
    for field in ("dataset_path", "dataset_name", "dataset_kwargs", "tag", "group", "task_alias"):
        settings.pop(field, None)
    asked = settings.get("test_split") or settings.get("validation_split")
    if asked is None:
        raise ConfigError(f"task {name}: its definition names neither test_split nor validation_split")
    shots = resolve_num_fewshot(name, settings, inputs.num_fewshot, len(inputs.fewshot_examples))
    own_examples = dict(settings.get("fewshot_config") or {})
    drawn_from = own_examples.pop("split", None) or settings.get("fewshot_split")
    splits = {asked: inputs.examples}
    if inputs.fewshot_examples:
        shown = drawn_from or settings.get("training_split") or settings.get("validation_split")
        shown = "train" if shown in (None, asked) else shown
        splits[shown] = inputs.fewshot_examples
        # all of them, where the harness would draw one more to leave one out
        is_named = drawn_from == shown or len(inputs.fewshot_examples) == shots
        settings |= {"training_split": shown, "fewshot_split": shown if is_named else None}
    else:
        settings |= {"training_split": None, "fewshot_split": None}
    if settings.get("test_split"):
        settings["validation_split"] = None  # what is asked is one file
    sets = {split: dataset.from_list([item.record for item in items]) for split, items in splits.items()}
    settings |= {"task": to_key(name), "custom_dataset": lambda **_: sets, "num_fewshot": shots}
    settings["fewshot_config"] = own_examples or None
    try:
        task = tasks.ConfigurableTask(config=settings)
    except Exception as error:  # whatever a definition's templates and functions raise
        first = inputs.examples[0]
        fields = ", ".join(first.record)
        raise DataError(
            f"{first.location}: task {name} cannot read its records ({type(error).__name__}: {error}); the first has {fields}"
        ) from None
    if is_file(name) and not settings.get("process_docs"):  # else records have the right form by now
        for item in (*inputs.examples, *inputs.fewshot_examples):
            _check(task, name, item)
    task.set_fewshot_seed(SEED)
    return task


def _check(task: Any, name: str, item: Example) -> None:
    """That a definition can read a record: what a data set lacks in one it would fill with nothing."""
    try:
        task.doc_to_text(item.record)
        task.doc_to_target(item.record)
        if task.config.doc_to_choice is not None:
            task.doc_to_choice(item.record)
    except Exception as error:  # whatever its templates and functions raise
        kind = "no field" if isinstance(error, KeyError) else type(error).__name__
        raise DataError(
            f"{item.location}: task {name} cannot read this record ({kind}: {error}); it has {', '.join(item.record)}"
        ) from None


def run_tasks(
    adapter: Any, asked: Mapping[str, TaskInputs], make: Callable[[str, TaskInputs], Any] = make_task
) -> dict[str, Any]:
    """The harness's results of tasks by what they are called; one model is asked all of them."""
    evaluator = import_harness("lm_eval.evaluator")
    with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results
        found = evaluator.evaluate(
            adapter,
            {to_key(name): make(name, questions) for name, questions in asked.items()},
            log_samples=False,
            bootstrap_iters=1000,
        )
    for name, counts in found["n-samples"].items():
        if cut := len(adapter.cut.get(name, ())):
            counts["cut"] = cut
    kept = ("results", "versions", "n-samples", "n-shot", "higher_is_better")
    return {key: value for key, value in found.items() if key in kept}
