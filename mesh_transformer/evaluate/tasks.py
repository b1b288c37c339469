# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tasks as rows: how a record of a data set, in the form in which it is published, becomes what a model is asked.

Prompts are those of lm-evaluation-harness 0.4 (of its tasks of these names), so that numbers are comparable. A record
may have the form in which its authors published it, or that of the Hugging Face Hub; where these differ (ARC's choices,
labels in words) both are read. Labels that the authors keep in a file of their own (PIQA's) have to be in the records,
under "label".
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mesh_transformer.config import ConfigError
from mesh_transformer.data.archives import COMPRESSED, read_chunks, split_lines
from mesh_transformer.data.documents import DataError, Document, Flaw
from mesh_transformer.data.readers import find_files
from mesh_transformer.evaluate.items import make_choices, make_clozes, make_lines

Record = Mapping[str, Any]
Kind = Literal["multiple_choice", "contexts", "loglikelihood", "generate_until"]


class Task(NamedTuple):
    """One task: what a model is asked, and how answers are counted."""

    kind: Kind  # contexts: one continuation behind several contexts (WinoGrande)
    convert: Callable[[Record], dict[str, Any]]  # record -> query, and choices and gold or target
    metrics: tuple[str, ...] = ("acc",)
    delimiter: str = " "  # between query and choice
    version: float = 1.0  # of the harness's task, or of ours
    make: Callable[[Iterable[Document], int], list[dict[str, Any]]] | None = (
        None  # of held-out text, instead of records
    )


def _label(record: Record, names: tuple[str, ...]) -> int:
    """A label as its number, or as one of `names`, or as a truth value."""
    label = record["label"]
    if isinstance(label, str) and label in names:
        return names.index(label)
    number = int(label)
    if not 0 <= number < len(names):
        raise ValueError(f"label {label!r} is none of {', '.join(names)}")
    return number


def _choice(query: str, choices: list[str], gold: int) -> dict[str, Any]:
    if not 0 <= gold < len(choices):
        raise ValueError(f"answer {gold} of {len(choices)} choices")
    return {"query": query, "choices": choices, "gold": gold}


def _lambada(record: Record) -> dict[str, Any]:
    context, _, word = record["text"].rpartition(" ")
    return {"query": context, "target": word}


def _clean_wikihow(text: str) -> str:
    """Without the marks that WikiHow's pages left in HellaSwag."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag(record: Record) -> dict[str, Any]:
    context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    query = _clean_wikihow(f"{record['activity_label']}: {context}")
    return _choice(query, [_clean_wikihow(ending) for ending in record["endings"]], int(record["label"]))


def _piqa(record: Record) -> dict[str, Any]:
    return _choice(
        f"Question: {record['goal']}\nAnswer:", [record["sol1"], record["sol2"]], _label(record, ("sol1", "sol2"))
    )


def _winogrande(record: Record) -> dict[str, Any]:
    before, _, behind = record["sentence"].partition("_")
    contexts = [before + record["option1"], before + record["option2"]]
    return {"query": behind.strip(), "choices": contexts, "gold": int(record["answer"]) - 1}


def _arc(record: Record) -> dict[str, Any]:
    question, choices = record["question"], record.get("choices")
    if isinstance(question, Mapping):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, Mapping):
        texts, labels = choices["text"], choices["label"]
    else:
        assert choices is not None
        texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    return _choice(f"Question: {question}\nAnswer:", list(texts), list(labels).index(record["answerKey"]))


def _sciq(record: Record) -> dict[str, Any]:
    choices = [record[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return _choice(f"{record['support'].lstrip()}\nQuestion: {record['question']}\nAnswer:", choices, 3)


def _boolq(record: Record) -> dict[str, Any]:
    query = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return _choice(query, ["no", "yes"], _label(record, ("false", "true")))


def _cb(record: Record) -> dict[str, Any]:
    query = f"{record['premise']}\nQuestion: {record['hypothesis']}. True, False, or Neither?\nAnswer:"
    return _choice(query, ["True", "False", "Neither"], _label(record, ("entailment", "contradiction", "neutral")))


def _copa(record: Record) -> dict[str, Any]:
    word = {"cause": "because", "effect": "therefore"}[record["question"]]
    # Behind two spaces, for so the harness asks: its choices begin with the one that it also puts between.
    choices = [f" {text[0].lower()}{text[1:]}" for text in (record["choice1"], record["choice2"])]
    return _choice(f"{record['premise'].strip()[:-1]} {word}", choices, _label(record, ("choice1", "choice2")))


def _rte(record: Record) -> dict[str, Any]:
    query = f"{record['premise']}\nQuestion: {record['hypothesis']} True or False?\nAnswer:"
    return _choice(query, ["True", "False"], _label(record, ("entailment", "not_entailment")))


def _wic(record: Record) -> dict[str, Any]:
    word = record["sentence1"][int(record["start1"]) : int(record["end1"])]
    query = (
        f"Sentence 1: {record['sentence1']}\nSentence 2: {record['sentence2']}\nQuestion: Is the word '{word}' used in "
        "the same way in the two sentences above?\nAnswer:"
    )
    return _choice(query, ["no", "yes"], _label(record, ("false", "true")))


def _as_it_is(record: Record) -> dict[str, Any]:
    return dict(record)


BOTH = ("acc", "acc_norm")
TASKS = {
    "lambada": Task("loglikelihood", _lambada, ("perplexity", "acc")),  # lambada_openai of the harness
    "hellaswag": Task("multiple_choice", _hellaswag, BOTH),
    "piqa": Task("multiple_choice", _piqa, BOTH),
    "winogrande": Task("contexts", _winogrande),
    "arc_easy": Task("multiple_choice", _arc, BOTH),
    "arc_challenge": Task("multiple_choice", _arc, BOTH),
    "sciq": Task("multiple_choice", _sciq, BOTH),
    "boolq": Task("multiple_choice", _boolq, version=2.0),
    "cb": Task("multiple_choice", _cb),
    "copa": Task("multiple_choice", _copa),
    "rte": Task("multiple_choice", _rte, version=0.0),
    "wic": Task("multiple_choice", _wic),
    # made from held-out text, so that there is something to ask where nothing can be downloaded
    "local_choice": Task("multiple_choice", _as_it_is, BOTH, delimiter="", make=make_choices),
    "local_cloze": Task("loglikelihood", _as_it_is, ("perplexity", "acc"), delimiter="", make=make_clozes),
    "local_line": Task("generate_until", _as_it_is, ("exact_match",), make=make_lines),
}
GROUPS = {"local": ("local_choice", "local_cloze")}
TEXT, WIKITEXT = "text", "wikitext2"  # measured without the harness


def expand_names(names: Iterable[str]) -> list[str]:
    """Names of tasks, groups replaced by what is in them; ConfigError for one that is not known."""
    found: list[str] = []
    for name in names:
        for one in GROUPS.get(name, (name,)):
            if one not in TASKS and one not in (TEXT, WIKITEXT):
                every = ", ".join([TEXT, WIKITEXT, *GROUPS, *TASKS])
                raise ConfigError(f"no task {one!r}; there are {every}")
            if one not in found:
                found.append(one)
    return found


def read_items(name: str, path: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The items of task `name` in a file or folder of JSONL (.gz, .zst) or Parquet; the first `limit` of them.

    Raises DataError, with file and line, for a record that is no such item.
    """
    items: list[dict[str, Any]] = []
    for where, record in _read_records(path):
        if len(items) == limit:
            break
        try:
            items.append(TASKS[name].convert(record))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            fields = ", ".join(record) if isinstance(record, Mapping) else type(record).__name__
            raise DataError(
                f"{where}: not a record of {name} ({type(error).__name__}: {error}); it has {fields}"
            ) from None
    if not items:
        raise DataError(f"{path}: no records of {name} in it")
    return items


def _read_records(path: str) -> Iterator[tuple[str, Any]]:
    for file in find_files(path):
        if file.suffix == ".parquet":
            yield from _read_parquet(file)
            continue
        try:
            suffix = file.suffix.lower()
            for number, line in enumerate(split_lines(read_chunks(file, suffix if suffix in COMPRESSED else None)), 1):
                if line and not line.isspace():
                    yield f"{file}:{number}", json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}: not a file of JSON, one object a line: {error}") from None
        except Flaw as flaw:
            raise DataError(f"{file}: {flaw.detail}") from None


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{file}: reading Parquet needs pyarrow: pip install 'mesh-transformer[parquet]'") from None
    for number, record in enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1):
        yield f"{file}:{number}", record
