# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""SuperGLUE's tasks (1905.00537) that take more than a row: WSC's spans, MultiRC's groups of answers, ReCoRD's entities.

MultiRC is counted as its authors do: F1a over all answers, and EM, the share of questions all of whose answers are
judged rightly. ReCoRD's prompt and measures are those of the harness, whose own definition needs `transformers`.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Answer = tuple[float, bool]  # log-probability, and whether every token was the likeliest


def read_wsc(record: Record) -> Iterable[dict[str, Any]]:
    """A record of WSC with its spans side by side, as the Hub has them, written as they are in the text."""
    spans = record.get("target", record)
    found: dict[str, Any] = {"text": record["text"], "label": int(bool(record["label"]))}
    for number in (1, 2):
        index = int(spans[f"span{number}_index"])
        words = record["text"].split()
        if not 0 <= index < len(words):
            raise ValueError(f"span{number}_index {index} of {len(words)} words")
        found[f"span{number}_index"] = index
        found[f"span{number}_text"] = _as_in_text(spans[f"span{number}_text"], record["text"], words[index])
    yield found


def _as_in_text(span: str, text: str, first_word: str) -> str:
    """The span with the case of its first word there, without a last full stop or a line's end; as it is if it is there."""
    if span in text:
        return span
    change = str.lower if first_word[0].islower() else str.upper
    return (change(span[0]) + span[1:]).rstrip(".").replace("\n", " ")


def read_multirc(record: Record) -> Iterable[dict[str, Any]]:
    """Every answer of a passage; a record of the Hub is one answer already."""
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
    """The answer said to be wrong, and said to be right: by the number of the label, 1 of right ones.

    The harness's definition (version 2.0) has them the other way round, so that it counts every wrong judgement, and
    shows wrong ones as examples.
    """
    return [f"{document['answer']}\nIs the answer correct? {word}" for word in ("no", "yes")]


def score_multirc(document: Record, answers: Sequence[Answer]) -> dict[str, Any]:
    """What one answer adds to each measure."""
    says_right, is_right = answers[1][0] > answers[0][0], bool(document["label"])
    question = (document["idx"]["paragraph"], document["idx"]["question"])
    return {
        "acc": float(says_right == is_right),
        "f1a": (says_right, is_right),
        "em": (question, says_right == is_right),
    }


def average_f1a(judged: Sequence[tuple[bool, bool]]) -> float:
    """F1 of the answers that were said to be right."""
    both = sum(said and right for said, right in judged)
    either = sum(said + right for said, right in judged)
    return 2 * both / either if either else 0.0


def average_em(judged: Sequence[tuple[Any, bool]]) -> float:
    """The share of questions without a mistake."""
    questions: dict[Any, bool] = defaultdict(lambda: True)
    for question, is_correct in judged:
        questions[question] &= is_correct
    return sum(questions.values()) / len(questions)


def read_record(record: Record) -> Iterable[dict[str, Any]]:
    """Every query of a passage with its candidates, in alphabetical order; a record of the Hub is one query already."""
    if "qas" not in record:
        passage, queries = record["passage"], [record]
        entities, answers_of = record["entities"], lambda query: query["answers"]
    else:
        passage, queries = record["passage"]["text"], record["qas"]
        # where an entity ends is its last character
        entities = [passage[entity["start"] : entity["end"] + 1] for entity in record["passage"]["entities"]]
        answers_of = lambda query: [answer["text"] for answer in query["answers"]]  # noqa: E731
    for query in queries:
        answers = sorted(set(answers_of(query)))
        if not answers or "@placeholder" not in query["query"]:
            raise ValueError("a query has @placeholder in it, and answers")
        yield {"passage": passage, "query": query["query"], "entities": sorted(set(entities)), "answers": answers}


def record_prompt(document: Record) -> str:
    """The passage and its highlights as a list, which the query goes on."""
    text, *highlights = document["passage"].strip().split("\n@highlight\n")
    return f"{text}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def record_choices(document: Record) -> list[str]:
    """The query with each candidate in it."""
    return [f"  - {document['query']}".replace("@placeholder", entity) for entity in document["entities"]]


def record_target(document: Record) -> str:
    """The query with the first of the right answers."""
    return f"  - {document['query']}".replace("@placeholder", document["answers"][0])


def score_record(document: Record, answers: Sequence[Answer]) -> dict[str, float]:
    """F1 of words and exact match of the likeliest candidate, the best over all right answers."""
    likeliest = max(range(len(answers)), key=lambda i: answers[i][0])
    said, right = _words(document["entities"][likeliest]), [_words(answer) for answer in document["answers"]]
    return {"f1": max(_f1(said, one) for one in right), "em": float(said in right)}


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as SQuAD's evaluation has it."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right))


MULTIRC = {
    "doc_to_choice": multirc_choices,
    "process_results": score_multirc,
    "metadata": {"version": "2.0 with no and yes in their places"},
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
