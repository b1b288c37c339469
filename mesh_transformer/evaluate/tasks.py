# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Table of evaluation tasks: the lm-evaluation-harness definition of each, and the conversion of data files to records.

The harness's definitions read records in the format of the Hugging Face Hub. Each row also accepts the format published by
the data set's authors (labels as words or booleans, MultiRC and ReCoRD passages with all their questions, WSC spans) and
converts it. Labels that the authors publish in a separate file (PIQA) must be added to the records as "label". A task
without a row is named by its definition file, which belongs to the harness or to the user.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.config import ConfigError
from mesh_transformer.data.compression import COMPRESSED, read_chunks, split_lines
from mesh_transformer.data.errors import DataError, Document, DocumentError
from mesh_transformer.data.readers import find_files
from mesh_transformer.evaluate.superglue import MULTIRC, RECORD, read_multirc, read_record, read_wsc
from mesh_transformer.evaluate.synthetic_tasks import make_choices, make_clozes, make_lines

Record = Mapping[str, Any]


class Task(NamedTuple):
    """A row of the table: the definition of a task, and the source of its examples."""

    definition: str  # a file of the harness or of the user; empty: `overrides` is the full definition
    convert: Callable[[Record], Iterable[dict[str, Any]]]  # published record -> records in the definition's format
    overrides: Mapping[str, Any] = {}  # fields that replace those of the definition
    # makes up to a given number of examples from held-out documents; None: the examples are read from files
    make: Callable[[Iterable[Document], int], list[dict[str, Any]]] | None = None


class Example(NamedTuple):
    """A record in the definition's format, and its file and line."""

    record: dict[str, Any]
    location: str


def _pick(*fields: str, **labels: tuple[str, ...]) -> Callable[[Record], Iterable[dict[str, Any]]]:
    """Return a converter that selects fields and converts labels, given as numbers, names or booleans, to numbers."""

    def convert(record: Record) -> Iterable[dict[str, Any]]:
        picked = {field: record[field] for field in fields}
        yield picked | {field: _number(field, record[field], names) for field, names in labels.items()}

    return convert


def _number(field: str, label: Any, names: Sequence[str]) -> int:
    if isinstance(label, str) and label in names:
        return names.index(label)
    number = int(label)
    if not 0 <= number < len(names):
        raise ValueError(f"{field} {label!r} is not one of {', '.join(names)}")
    return number


def _hellaswag(record: Record) -> Iterable[dict[str, Any]]:
    label, n_endings = int(record["label"]), len(record["endings"])
    if not 0 <= label < n_endings:
        raise ValueError(f"label={label} is out of range: there are {n_endings} endings")
    yield {name: record[name] for name in ("activity_label", "ctx_a", "ctx_b", "endings")} | {"label": str(label)}


def _winogrande(record: Record) -> Iterable[dict[str, Any]]:
    if "_" not in record["sentence"] or str(record["answer"]) not in ("1", "2"):
        raise ValueError(
            f"sentence {record['sentence']!r} with answer {record['answer']!r}: the sentence must contain _, and the answer "
            "must be 1 or 2"
        )
    yield {name: record[name] for name in ("sentence", "option1", "option2")} | {"answer": str(record["answer"])}


def _arc(record: Record) -> Iterable[dict[str, Any]]:
    question, choices = record["question"], record.get("choices")
    if isinstance(question, Mapping):
        question, choices = question["stem"], question["choices"]
    if not isinstance(choices, Mapping):
        choices = {key: [choice[key] for choice in choices or ()] for key in ("text", "label")}
    if record["answerKey"] not in choices["label"]:
        raise ValueError(f"answerKey {record['answerKey']!r} is not one of {choices['label']}")
    texts = {"text": list(choices["text"]), "label": list(choices["label"])}
    yield {"question": question, "choices": texts, "answerKey": record["answerKey"]}


def _unchanged(record: Record) -> Iterable[dict[str, Any]]:
    yield dict(record)


FALSE_TRUE = ("false", "true")
METRICS: dict[str, dict[str, Any]] = {
    "acc": dict(aggregation="mean", higher_is_better=True),
    "acc_norm": dict(aggregation="mean", higher_is_better=True),
    "exact_match": dict(aggregation="mean", higher_is_better=True),
    "perplexity": dict(aggregation="perplexity", higher_is_better=False),
}


def _make_definition(output_type: str, *metrics: str, **overrides: Any) -> dict[str, Any]:
    """Return the definition of a synthetic task, whose records have a query and a target, or choices and a gold index."""
    answer_fields = (
        {"doc_to_choice": "choices", "doc_to_target": "gold"}
        if output_type == "multiple_choice"
        else {"doc_to_target": "target"}
    )
    metric_list = [dict(METRICS[metric], metric=metric) for metric in metrics]
    common = {"output_type": output_type, "test_split": "test", "doc_to_text": "query", "metric_list": metric_list}
    return common | answer_fields | {"target_delimiter": "", "metadata": {"version": 1.0}} | overrides


_LINE = {"until": ["\n"], "do_sample": False, "max_gen_toks": 64}
_SCIQ = ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer")
TASKS = {
    "lambada": Task("lambada/lambada_openai.yaml", _pick("text")),
    "hellaswag": Task("hellaswag/hellaswag.yaml", _hellaswag),
    "piqa": Task("piqa/piqa.yaml", _pick("goal", "sol1", "sol2", label=("sol1", "sol2"))),
    "winogrande": Task("winogrande/default.yaml", _winogrande),
    "arc_easy": Task("arc/arc_easy.yaml", _arc),
    "arc_challenge": Task("arc/arc_challenge.yaml", _arc),
    "sciq": Task("sciq/sciq.yaml", _pick(*_SCIQ)),
    "boolq": Task("super_glue/boolq/default.yaml", _pick("passage", "question", label=FALSE_TRUE)),
    "cb": Task(
        "super_glue/cb/default.yaml",
        _pick("premise", "hypothesis", label=("entailment", "contradiction", "neutral")),
    ),
    "copa": Task(
        "super_glue/copa/default.yaml",
        _pick("premise", "choice1", "choice2", "question", label=("choice1", "choice2")),
    ),
    "rte": Task("super_glue/rte/default.yaml", _pick("premise", "hypothesis", label=("entailment", "not_entailment"))),
    "wic": Task("super_glue/wic/default.yaml", _pick("sentence1", "sentence2", "start1", "end1", label=FALSE_TRUE)),
    "wsc": Task("super_glue/wsc/default.yaml", read_wsc),
    "multirc": Task("super_glue/multirc/default.yaml", read_multirc, MULTIRC),
    "record": Task("", read_record, RECORD),
    # made from held-out text: they need no data set
    "local_choice": Task("", _unchanged, _make_definition("multiple_choice", "acc", "acc_norm"), make_choices),
    "local_cloze": Task("", _unchanged, _make_definition("loglikelihood", "perplexity", "acc"), make_clozes),
    "local_line": Task("", _unchanged, _make_definition("generate_until", "exact_match", generation_kwargs=_LINE), make_lines),
}  # fmt: skip
GROUPS = {
    "local": ("local_choice", "local_cloze"),
    "superglue": ("boolq", "cb", "copa", "rte", "wic", "wsc", "multirc", "record"),
}
TEXT, WIKITEXT = "text", "wikitext2"  # tasks that are scored without the harness


def is_file(name: str) -> bool:
    """Return whether a task is named by its definition file."""
    return name.endswith((".yaml", ".yml"))


def find_task(name: str) -> Task:
    """Return the row of a task; a task named by its definition file uses records without conversion."""
    return Task(name, _unchanged) if is_file(name) else TASKS[name]


def to_key(name: str) -> str:
    """Return a task's key in evaluate.data and in the results: for a definition file, its name without suffix."""
    return Path(name).stem if is_file(name) else name


def expand_names(names: Iterable[str]) -> list[str]:
    """Return task names with groups expanded. Raises ConfigError for unknown names, and for tasks with the same key."""
    expanded: list[str] = []
    for name in names:
        for task in GROUPS.get(name, (name,)):
            if task not in TASKS and task not in (TEXT, WIKITEXT) and not is_file(task):
                known = ", ".join([TEXT, WIKITEXT, *GROUPS, *TASKS])
                raise ConfigError(
                    f"evaluate.tasks: unknown task {task!r}; choose from {known}, or give the YAML file of a task "
                    "(gsm8k/gsm8k.yaml)"
                )
            if task not in expanded:
                expanded.append(task)
    keys = [to_key(name) for name in expanded]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(
            f"evaluate.tasks: two tasks are named {repeated[0]!r}; rename one of the files, or run them separately"
        )
    return expanded


def read_examples(name: str, path: str, limit: int | None = None) -> list[Example]:
    """Return the first `limit` (default: all) examples of task `name` in a file or folder of JSONL (.gz, .zst) or Parquet.

    Raises DataError, with file and line, for a record that cannot be converted.
    """
    items: list[Example] = []
    convert = find_task(name).convert
    for where, record in _read_records(path):
        if limit is not None and len(items) >= limit:
            break
        try:
            if not isinstance(record, Mapping):
                raise TypeError("expected a JSON object")
            items += [Example(converted, where) for converted in convert(record)]
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            is_object = isinstance(record, Mapping)
            fields = f"its fields: {', '.join(record)}" if is_object else f"it is a {type(record).__name__}"
            kind = "no field" if isinstance(error, KeyError) else type(error).__name__
            raise DataError(
                f"{where}: not a record of {name} ({kind}: {error}); {fields}; correct the record, or give the file of "
                f"{name}"
            ) from None
    if not items:
        raise DataError(f"{path}: the file has no records; it needs at least one record of {name}")
    return items[:limit]


def _read_records(path: str) -> Iterator[tuple[str, Any]]:
    for file in find_files(path):
        if file.suffix == ".parquet":
            yield from _read_parquet(file)
            continue
        suffix = file.suffix.lower()
        try:
            for number, line in enumerate(split_lines(read_chunks(file, suffix if suffix in COMPRESSED else None)), 1):
                if line and not line.isspace():
                    yield f"{file}:{number}", _parse(line, f"{file}:{number}")
        except DocumentError as error:
            raise DataError(f"{file}: {error.detail}") from None


def _parse(line: str | bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where}: not JSON ({error}); the data file of a task needs one JSON object per line"
        ) from None


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{file}: reading Parquet needs pyarrow: pip install 'mesh-transformer[parquet]'") from None
    for number, record in enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1):
        yield f"{file}:{number}", record
