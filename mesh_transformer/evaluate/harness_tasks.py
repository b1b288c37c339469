# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness over local files: make them from the rows of tasks.py, and run them.

Few-shot examples are the ones that the harness itself samples: from the split its definition names, with its seed.
"""

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.config import ConfigError
from mesh_transformer.data.errors import DataError
from mesh_transformer.evaluate.tasks import Example, find_task, is_file, to_key

SEED = 1234  # of few-shot sampling: the harness's default
REPORTED = ("results", "versions", "n-samples", "n-shot", "higher_is_better")  # parts of the harness's results


def import_harness(name: str = "lm_eval") -> Any:
    """Import a module of the harness; ConfigError with the install command if it is missing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tasks read local files only; must be set before the import
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is shown by this program
    os.environ["DISABLE_MULTIPROC"] = "1"  # for standard errors: JAX's threads do not survive a fork
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("lm_eval", "datasets", "evaluate"):
            raise ConfigError(
                f"tasks need lm-evaluation-harness ({error}): pip install 'mesh-transformer[evaluate]'"
            ) from None
        raise


class TaskInputs(NamedTuple):
    """Data of a task."""

    examples: Sequence[Example]
    fewshot_examples: Sequence[Example] = ()  # with answers, from which few-shot examples are sampled
    num_fewshot: int | None = None  # examples before every question; None: the definition's number


def load_definition(name: str) -> dict[str, Any]:
    """Return the harness configuration of a task; ConfigError for a missing file, or one that defines no single task."""
    row = find_task(name)
    if not row.definition:
        return dict(row.overrides)
    loader = import_harness("lm_eval.tasks._yaml_loader")
    own = Path(row.definition).expanduser()
    packaged = Path(import_harness().__file__).parent / "tasks" / row.definition
    path = own if own.is_file() and is_file(name) else packaged
    if not path.is_file():
        raise ConfigError(
            f"task {name}: no such file in the current folder or among the harness's tasks in {packaged.parent}"
        )
    try:
        definition = loader.load_yaml(path)
    except Exception as error:  # of YAML, or of Python code that the file refers to
        raise ConfigError(f"{path}: cannot be read as a task ({type(error).__name__}: {error})") from None
    if "output_type" not in definition and "task" not in definition:
        raise ConfigError(
            f"{path}: has neither output_type nor task, so it is a group of tasks, or a part that other files include; give the "
            "file of one task"
        )
    return definition | row.overrides


def resolve_num_fewshot(name: str, definition: Mapping[str, Any], num_fewshot: int | None, available: int) -> int:
    """Return the number of few-shot examples: `shots` or the definition's; ConfigError if fewer are available."""
    count = num_fewshot if num_fewshot is not None else definition.get("num_fewshot") or 0
    if available < count and not (definition.get("fewshot_config") or {}).get("samples"):
        key = to_key(name)
        raise ConfigError(
            f"task {name}: {count}-shot evaluation needs {count} examples, got {available}; give training records with "
            f"--fewshot-data {key}=FILE, or set --num-fewshot {key}=0"
        )
    return count


def make_task(name: str, inputs: TaskInputs) -> Any:
    """Return a task object of the harness.

    Raises ConfigError for too few few-shot examples; DataError, with file and line, for a record that the definition cannot
    read.
    """
    dataset, tasks = import_harness("datasets").Dataset, import_harness("lm_eval.api.task")
    definition = load_definition(name)
    for field in ("dataset_path", "dataset_name", "dataset_kwargs", "tag", "group", "task_alias"):
        definition.pop(field, None)
    test_split = definition.get("test_split") or definition.get("validation_split")
    if test_split is None:
        raise ConfigError(f"task {name}: its definition names neither test_split nor validation_split")
    num_fewshot = resolve_num_fewshot(name, definition, inputs.num_fewshot, len(inputs.fewshot_examples))
    fewshot_config = dict(definition.get("fewshot_config") or {})
    sampled_from = fewshot_config.pop("split", None) or definition.get("fewshot_split")
    splits = {test_split: inputs.examples}
    if inputs.fewshot_examples:
        fewshot_split = sampled_from or definition.get("training_split") or definition.get("validation_split")
        fewshot_split = "train" if fewshot_split in (None, test_split) else fewshot_split
        splits[fewshot_split] = inputs.fewshot_examples
        # all of them: the harness would sample one more and leave one out
        is_named = sampled_from == fewshot_split or len(inputs.fewshot_examples) == num_fewshot
        definition |= {"training_split": fewshot_split, "fewshot_split": fewshot_split if is_named else None}
    else:
        definition |= {"training_split": None, "fewshot_split": None}
    if definition.get("test_split"):
        definition["validation_split"] = None  # the questions are one file
    sets = {split: dataset.from_list([item.record for item in items]) for split, items in splits.items()}
    definition |= {"task": to_key(name), "custom_dataset": lambda **_: sets, "num_fewshot": num_fewshot}
    definition["fewshot_config"] = fewshot_config or None
    try:
        task = tasks.ConfigurableTask(config=definition)
    except Exception as error:  # of the definition's templates and functions
        first = inputs.examples[0]
        fields = ", ".join(first.record)
        raise DataError(
            f"{first.location}: task {name} cannot read its records ({type(error).__name__}: {error}); the first record has the "
            f"fields {fields}; give them the names that the task's definition uses"
        ) from None
    if is_file(name) and not definition.get("process_docs"):  # other records were converted already
        for item in (*inputs.examples, *inputs.fewshot_examples):
            _check(task, name, item)
    task.set_fewshot_seed(SEED)
    return task


def _check(task: Any, name: str, item: Example) -> None:
    """Raise DataError if the definition cannot read a record; the harness would read missing fields as empty."""
    try:
        task.doc_to_text(item.record)
        task.doc_to_target(item.record)
        if task.config.doc_to_choice is not None:
            task.doc_to_choice(item.record)
    except Exception as error:  # of its templates and functions
        kind = "no field" if isinstance(error, KeyError) else type(error).__name__
        raise DataError(
            f"{item.location}: task {name} cannot read this record ({kind}: {error}); it has {', '.join(item.record)}"
        ) from None


def run_tasks(
    model: Any, tasks: Mapping[str, TaskInputs], make: Callable[[str, TaskInputs], Any] = make_task
) -> dict[str, Any]:
    """Return the harness's results of all tasks for a model (a HarnessModel)."""
    evaluator = import_harness("lm_eval.evaluator")
    with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results
        found = evaluator.evaluate(
            model,
            {to_key(name): make(name, inputs) for name, inputs in tasks.items()},
            log_samples=False,
            bootstrap_iters=1000,
        )
    for name, counts in found["n-samples"].items():
        if truncated := len(model.truncated.get(name, ())):
            counts["cut"] = truncated
    return {key: value for key, value in found.items() if key in REPORTED}
