# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness that read local files, constructed from the table in tasks.py.

Few-shot examples are sampled as in the harness: from the split that the task's definition names, with the same seed.
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

SEED = 1234  # for sampling few-shot examples: the harness's default
REPORTED = ("results", "versions", "n-samples", "n-shot", "higher_is_better")  # keys of the results that are kept


def import_harness(name: str = "lm_eval") -> Any:
    """Import a module of the harness. Raises ConfigError with the install command if the harness is missing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tasks read local files only; must be set before the import
    os.environ.setdefault("TQDM_DISABLE", "1")  # this program shows the progress
    # Standard errors are bootstrapped in this process, because forking is unsafe with JAX's threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("lm_eval", "datasets", "evaluate"):
            raise ConfigError(
                f"evaluate.tasks needs lm-evaluation-harness, which is missing ({error}); run: "
                "pip install 'mesh-transformer[evaluate]'"
            ) from None
        raise


class TaskInputs(NamedTuple):
    """The examples of a task."""

    examples: Sequence[Example]
    fewshot_examples: Sequence[Example] = ()  # examples with answers, from which few-shot examples are sampled
    num_fewshot: int | None = None  # few-shot examples before every question; None: the definition's number


def load_definition(name: str) -> dict[str, Any]:
    """Return the harness configuration of a task.

    Raises ConfigError for a missing or invalid file, or a file that does not define exactly one task.
    """
    row = find_task(name)
    if not row.definition:
        return dict(row.overrides)
    loader = import_harness("lm_eval.tasks._yaml_loader")
    user_file = Path(row.definition).expanduser()
    harness_file = Path(import_harness().__file__).parent / "tasks" / row.definition
    path = user_file if user_file.is_file() and is_file(name) else harness_file
    if not path.is_file():
        raise ConfigError(
            f"task {name}: neither {user_file.absolute()} nor {harness_file} exists; give the path of a task's YAML file"
        )
    try:
        definition = loader.load_yaml(path)
    except Exception as error:  # raised by YAML or by Python code that the file refers to
        raise ConfigError(
            f"{path}: cannot be read as a task ({type(error).__name__}: {error}); correct the file, or the Python file that "
            "it refers to"
        ) from None
    if "output_type" not in definition and "task" not in definition:
        raise ConfigError(
            f"{path}: has neither output_type nor task, so it is a group of tasks or a template that other files "
            "include; give the file of a single task"
        )
    return definition | row.overrides


def resolve_num_fewshot(name: str, definition: Mapping[str, Any], num_fewshot: int | None, available: int) -> int:
    """Return the number of few-shot examples per question: `num_fewshot`, or the definition's number if it is None.

    Raises ConfigError if fewer examples are `available`.
    """
    count = num_fewshot if num_fewshot is not None else definition.get("num_fewshot") or 0
    if available < count and not (definition.get("fewshot_config") or {}).get("samples"):
        key = to_key(name)
        raise ConfigError(
            f"task {name}: {count}-shot evaluation needs {count} examples, got {available}; give training records with "
            f"--fewshot-data {key}=FILE, or set --num-fewshot {key}=0"
        )
    return count


def make_task(name: str, inputs: TaskInputs) -> Any:
    """Return the harness's task object for task `name` with the given examples.

    Raises ConfigError for too few few-shot examples; DataError, with file and line, for a record that the definition cannot
    read.
    """
    dataset, tasks = import_harness("datasets").Dataset, import_harness("lm_eval.api.task")
    definition = load_definition(name)
    for field in ("dataset_path", "dataset_name", "dataset_kwargs", "tag", "group", "task_alias"):
        definition.pop(field, None)
    test_split = definition.get("test_split") or definition.get("validation_split")
    if test_split is None:
        raise ConfigError(
            f"task {name}: the definition has neither test_split nor validation_split; set test_split: test in its file"
        )
    num_fewshot = resolve_num_fewshot(name, definition, inputs.num_fewshot, len(inputs.fewshot_examples))
    fewshot_config = dict(definition.get("fewshot_config") or {})
    sampled_split = fewshot_config.pop("split", None) or definition.get("fewshot_split")
    splits = {test_split: inputs.examples}
    if inputs.fewshot_examples:
        fewshot_split = sampled_split or definition.get("training_split") or definition.get("validation_split")
        fewshot_split = "train" if fewshot_split in (None, test_split) else fewshot_split
        splits[fewshot_split] = inputs.fewshot_examples
        # If all examples are used, the split must be named: otherwise the harness samples one more than there are.
        is_named = sampled_split == fewshot_split or len(inputs.fewshot_examples) == num_fewshot
        definition |= {"training_split": fewshot_split, "fewshot_split": fewshot_split if is_named else None}
    else:
        definition |= {"training_split": None, "fewshot_split": None}
    if definition.get("test_split"):
        definition["validation_split"] = None  # the questions are read from the test split only
    sets = {split: dataset.from_list([item.record for item in items]) for split, items in splits.items()}
    definition |= {"task": to_key(name), "custom_dataset": lambda **_: sets, "num_fewshot": num_fewshot}
    definition["fewshot_config"] = fewshot_config or None
    try:
        task = tasks.ConfigurableTask(config=definition)
    except Exception as error:  # raised by the definition's templates and functions
        first = inputs.examples[0]
        fields = ", ".join(first.record)
        raise DataError(
            f"{first.location}: task {name} cannot read its records ({type(error).__name__}: {error}); the first record has the "
            f"fields {fields}; rename them to the names that the task's definition uses"
        ) from None
    # Records of other tasks were checked when they were converted.
    if is_file(name) and not definition.get("process_docs"):
        for item in (*inputs.examples, *inputs.fewshot_examples):
            _check_record(task, name, item)
    task.set_fewshot_seed(SEED)
    return task


def _check_record(task: Any, name: str, item: Example) -> None:
    """Raise DataError if the definition cannot read a record: the harness itself reads missing fields as empty text."""
    try:
        task.doc_to_text(item.record)
        task.doc_to_target(item.record)
        if task.config.doc_to_choice is not None:
            task.doc_to_choice(item.record)
    except Exception as error:  # raised by the definition's templates and functions
        kind = "no field" if isinstance(error, KeyError) else type(error).__name__
        raise DataError(
            f"{item.location}: task {name} cannot read this record ({kind}: {error}); it has the fields "
            f"{', '.join(item.record)}; add the field that the task's definition reads, or "
            "correct its value"
        ) from None


def run_tasks(
    model: Any, tasks: Mapping[str, TaskInputs], make: Callable[[str, TaskInputs], Any] = make_task
) -> dict[str, Any]:
    """Run all tasks on `model` (a HarnessModel) and return the harness's results."""
    evaluator = import_harness("lm_eval.evaluator")
    with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results
        results = evaluator.evaluate(
            model,
            {to_key(name): make(name, inputs) for name, inputs in tasks.items()},
            log_samples=False,
            bootstrap_iters=1000,
        )
    for name, counts in results["n-samples"].items():
        if truncated := len(model.truncated.get(name, ())):
            counts["cut"] = truncated
    return {key: value for key, value in results.items() if key in REPORTED}
