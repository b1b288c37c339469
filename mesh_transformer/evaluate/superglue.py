# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""SuperGLUE tasks (arXiv 1905.00537) that need conversion code or their own metrics: WSC, MultiRC and ReCoRD.

MultiRC uses its authors' metrics: F1a over all answers, and EM, the fraction of questions with all answers classified
correctly. ReCoRD uses the prompt and metrics of the harness, whose own definition needs `transformers`.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Answer = tuple[float, bool]  # log-probability, and whether every token is the most probable one


def read_wsc(record: Record) -> Iterable[dict[str, Any]]:
    """Yield a WSC record with the fields of the Hugging Face Hub, and with spans spelled as in the text."""
    spans = record.get("target", record)
    converted: dict[str, Any] = {"text": record["text"], "label": int(bool(record["label"]))}
    for number in (1, 2):
        index = int(spans[f"span{number}_index"])
        words = record["text"].split()
        if not 0 <= index < len(words):
            raise ValueError(f"span{number}_index={index} is out of range: the text has {len(words)} words")
        converted[f"span{number}_index"] = index
        converted[f"span{number}_text"] = _as_in_text(spans[f"span{number}_text"], record["text"], words[index])
    yield converted


def _as_in_text(span: str, text: str, first_word: str) -> str:
    """Return a span as spelled in the text: its first letter with the case of `first_word`, without a final period."""
    if span in text:
        return span
    change = str.lower if first_word[0].islower() else str.upper
    return (change(span[0]) + span[1:]).rstrip(".").replace("\n", " ")


def read_multirc(record: Record) -> Iterable[dict[str, Any]]:
    """Yield one record per answer of a MultiRC passage; a record of the Hub has only one answer."""
    if "passage" not in record:
        fields = {name: record[name] for name in ("paragraph", "question", "answer", "idx")}
        yield fields | {"label": int(bool(record["label"]))}
        return
    for question in record["passage"]["questions"]:
        for answer in question["answers"]:
            yield {
                "paragraph": record["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": int(bool(answer["label"])),
                "idx": {"paragraph": record["idx"], "question": question["idx"], "answer": answer["idx"]},
            }


def multirc_choices(document: Record) -> list[str]:
    """Return the choices in the order of the labels: "no" (the answer is wrong), then "yes" (it is correct).

    The harness's definition (version 2.0) has the choices in reverse order, so that it counts wrong predictions as correct
    and gives wrong few-shot examples.
    """
    return [f"{document['answer']}\nIs the answer correct? {word}" for word in ("no", "yes")]


def score_multirc(document: Record, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the contribution of one answer to each metric."""
    predicted = answers[1][0] > answers[0][0]
    correct = bool(document["label"])
    question = (document["idx"]["paragraph"], document["idx"]["question"])
    return {
        "acc": float(predicted == correct),
        "f1a": (predicted, correct),
        "em": (question, predicted == correct),
    }


def average_f1a(pairs: Sequence[tuple[bool, bool]]) -> float:
    """Return the F1 score over all answers, given the pair (predicted, correct) of each answer."""
    true_positives = sum(predicted and correct for predicted, correct in pairs)
    n_positive = sum(predicted + correct for predicted, correct in pairs)
    return 2 * true_positives / n_positive if n_positive else 0.0


def average_em(pairs: Sequence[tuple[Any, bool]]) -> float:
    """Return the fraction of questions without an error, given the pair (question, is_correct) of each answer."""
    questions: dict[Any, bool] = defaultdict(lambda: True)
    for question, is_correct in pairs:
        questions[question] &= is_correct
    return sum(questions.values()) / len(questions)


def read_record(record: Record) -> Iterable[dict[str, Any]]:
    """Yield one record per query of a ReCoRD passage, with sorted candidates; a record of the Hub has only one query."""
    if "qas" not in record:
        passage = record["passage"]
        entities = record["entities"]
        queries = [(record["query"], record["answers"])]
    else:
        passage = record["passage"]["text"]
        # an entity's end is the index of its last character
        entities = [passage[entity["start"] : entity["end"] + 1] for entity in record["passage"]["entities"]]
        queries = [(item["query"], [answer["text"] for answer in item["answers"]]) for item in record["qas"]]
    for query, answers in queries:
        if not answers or "@placeholder" not in query:
            raise ValueError(
                f"query {query!r} with {len(answers)} answers: a query must contain @placeholder and have at least 1 answer"
            )
        yield {
            "passage": passage,
            "query": query,
            "entities": sorted(set(entities)),
            "answers": sorted(set(answers)),
        }


def record_prompt(document: Record) -> str:
    """Return the prompt: the passage, then its highlights as a list, to which a choice adds the next item."""
    text, *highlights = document["passage"].strip().split("\n@highlight\n")
    return f"{text}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def record_choices(document: Record) -> list[str]:
    """Return the query with each candidate inserted."""
    return [f"  - {document['query']}".replace("@placeholder", entity) for entity in document["entities"]]


def record_target(document: Record) -> str:
    """Return the query with the first correct answer inserted."""
    return f"  - {document['query']}".replace("@placeholder", document["answers"][0])


def score_record(document: Record, answers: Sequence[Answer]) -> dict[str, float]:
    """Return word F1 and exact match of the most probable candidate with the correct answer that it matches best."""
    predicted_index = max(range(len(answers)), key=lambda i: answers[i][0])
    predicted = _words(document["entities"][predicted_index])
    correct = [_words(answer) for answer in document["answers"]]
    return {"f1": max(_f1(predicted, words) for words in correct), "em": float(predicted in correct)}


def _words(text: str) -> list[str]:
    """Return the words in lower case without punctuation and articles, as in SQuAD's evaluation."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _f1(predicted: list[str], correct: list[str]) -> float:
    if not predicted or not correct:
        return float(predicted == correct)
    common = sum((Counter(predicted) & Counter(correct)).values())
    return 2 * common / (len(predicted) + len(correct))


MULTIRC = {
    "doc_to_choice": multirc_choices,
    "process_results": score_multirc,
    "metadata": {"version": "2.0 with no and yes in order of the labels"},
    "metric_list": [
        dict(metric="acc", aggregation="mean", higher_is_better=True),
        dict(metric="f1a", aggregation=average_f1a, higher_is_better=True),
        dict(metric="em", aggregation=average_em, higher_is_better=True),
    ],
}
RECORD = {
    "output_type": "multiple_choice",
    "training_split": "train",
    "validation_split": "validation",
    "doc_to_text": record_prompt,
    "doc_to_choice": record_choices,
    "doc_to_target": record_target,
    "process_results": score_record,
    "metric_list": [
        dict(metric="f1", aggregation="mean", higher_is_better=True),
        dict(metric="em", aggregation="mean", higher_is_better=True),
    ],
    "metadata": {"version": 2.0},
}
