# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Content statistics of the training text for the datasheet: topics, profanity, and words that co-occur with "he" and "she".

Follows section 6 of The Pile's paper: the same profanity classifier and the same measure of bias to "he" or "she". Topics are
found by non-negative factorization of tf-idf instead of LDA, because LDA is not deterministic. All three are for English text.
"""

import dataclasses
import heapq
import math
import re
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import Any

import xxhash

from mesh_transformer.corpus.markup import install_hint
from mesh_transformer.corpus.parts import PartWriter, read_documents
from mesh_transformer.corpus.recipe import Recipe

SAMPLE_DOCUMENTS = 300  # sampled documents of a component: the documents whose names have the lowest hashes
SAMPLE_CHARACTERS = 4000  # length of the prefix of each sampled document
PRONOUNS = ("he", "she")
MAX_WORDS = 5000  # most frequent co-occurring words, which the record of a part has
MAX_SENTENCE_CHARACTERS = 400  # the rest of a sentence is ignored, since text without periods is not prose
TOPICS = 16  # as in The Pile
TOPIC_WORDS = 8
MIN_SENTENCES = 10  # a word that occurs in fewer sentences is not compared
PAPER_WORDS = (
    "military",
    "criminal",
    "offensive",
    "little",
    "married",
    "sexual",
    "happy",
)  # words that the paper reports: the first three with a bias to "he", the others to "she"
FRAGMENTS = {
    "don",
    "didn",
    "doesn",
    "isn",
    "wasn",
    "won",
    "wouldn",
    "couldn",
    "hasn",
    "hadn",
    "aren",
    "com",
    "org",
    "www",
}  # fragments of contractions and addresses, not words
_PRONOUN = re.compile(rf"\b(?:{'|'.join(PRONOUNS)})\b")
_WORD = re.compile(r"[a-z]+")
_END = re.compile(r"[.!?][\"')\]]*\s+|\n\s*\n")


@dataclasses.dataclass(frozen=True)
class SurveyStage:
    """Task: the training documents of one part -> sample/RANK.jsonl.zst, and words that co-occur with pronouns in the record."""

    recipe: Recipe
    components: tuple[str, ...]  # component of each part
    selected: Path
    folder: Path

    def __call__(self, rank: int) -> dict[str, Any]:
        """Make part `rank` and return its record."""
        component = self.components[rank]
        lowest: list[tuple[int, str, str]] = []  # a heap: the first entry has the highest hash
        sentences: Counter[str] = Counter()
        around: dict[str, Counter[str]] = {pronoun: Counter() for pronoun in PRONOUNS}
        for record in read_documents(self.selected / f"train/{component}-{rank:05d}.jsonl.zst"):
            name = record["id"]
            text = record["text"]
            add = heapq.heappush if len(lowest) < SAMPLE_DOCUMENTS else heapq.heappushpop
            add(lowest, (-xxhash.xxh3_64_intdigest(f"survey:{name}".encode()), name, text[:SAMPLE_CHARACTERS]))
            for pronouns, words in find_sentences(text):
                for pronoun in pronouns:
                    sentences[pronoun] += 1
                    around[pronoun].update(words)
        total = around["he"] + around["she"]
        known = {word for word, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:MAX_WORDS]}
        sample = f"sample/{rank:05d}.jsonl.zst"
        with PartWriter(self.folder / sample) as part:
            for negative, name, text in sorted(lowest, reverse=True):
                part.add(text, name, {"hash": -negative})
        return {
            "component": component,
            "sentences": sentences,
            "around": {
                pronoun: {word: n for word, n in counts.items() if word in known} for pronoun, counts in around.items()
            },
            "outputs": {sample: part.describe()},
        }


def find_sentences(text: str) -> list[tuple[set[str], set[str]]]:
    """Return the pronouns and all words, in lower case, of every sentence with one of PRONOUNS."""
    lower = text.lower()
    offsets = [match.start() for match in _PRONOUN.finditer(lower)]
    if not offsets:
        return []
    ends = [match.end() for match in _END.finditer(lower)]
    starts = [0, *ends]
    numbers = sorted({bisect_right(ends, offset) for offset in offsets})
    sentences = []
    for number in numbers:
        sentence = lower[starts[number] : ends[number] if number < len(ends) else len(lower)][:MAX_SENTENCE_CHARACTERS]
        words = set(_WORD.findall(sentence))
        if pronouns := words.intersection(PRONOUNS):
            sentences.append((pronouns, words))
    return sentences


def describe_survey(records: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Return topics, profanity and pronouns of all parts; `folder` is the stage's folder."""
    samples: dict[str, list[tuple[int, str]]] = {}
    for rank, record in enumerate(records):
        component_samples = samples.setdefault(record["component"], [])
        documents = read_documents(folder / f"sample/{rank:05d}.jsonl.zst")
        component_samples += [(document["meta"]["hash"], document["text"]) for document in documents]
    texts = {name: [text for _, text in sorted(sample)[:SAMPLE_DOCUMENTS]] for name, sample in samples.items()}
    return {"topics": find_topics(texts), "profanity": measure_profanity(texts), "pronouns": compare_pronouns(records)}


def find_topics(texts: dict[str, list[str]]) -> dict[str, Any]:
    """Return the words of each topic, and the share of each topic in the sample of every component."""
    try:
        from sklearn.decomposition import NMF
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise install_hint("scikit-learn") from None
    component_names = [name for name, sample in texts.items() for _ in sample]
    documents = [text for sample in texts.values() for text in sample]
    vectorizer = TfidfVectorizer(
        max_features=4000,
        min_df=min(3, len(documents)),
        max_df=0.5,
        stop_words="english",
        token_pattern=r"(?u)\b[^\W\d_]{3,}\b",
    )
    try:
        table = vectorizer.fit_transform(documents)
    except ValueError:  # no word is in enough documents, as in a very small corpus
        return {"words": [], "shares": {}}
    count: Any = min(TOPICS, *table.shape)  # Any: scikit-learn's type stub allows only a string
    model = NMF(count, init="nndsvda", random_state=0, max_iter=300, tol=1e-3)
    weights = model.fit_transform(table)  # [documents, topics]
    weights = weights / weights.sum(axis=1, keepdims=True).clip(1e-9)
    names = vectorizer.get_feature_names_out()
    words = [[str(names[i]) for i in factor.argsort()[::-1][:TOPIC_WORDS]] for factor in model.components_]
    shares = {}
    for name in texts:
        indices = [i for i, component_name in enumerate(component_names) if component_name == name]
        shares[name] = [round(float(share), 4) for share in weights[indices].mean(axis=0)] if indices else [0.0] * count
    return {"words": words, "shares": shares}


def measure_profanity(texts: dict[str, list[str]]) -> dict[str, dict[str, int]]:
    """Return the number of sentences in the sample of every component, and the number of profane sentences."""
    try:
        from profanity_check import predict
    except ImportError:
        raise install_hint("alt-profanity-check") from None
    result = {}
    for name, sample in texts.items():
        candidates = [sentence.strip()[:MAX_SENTENCE_CHARACTERS] for text in sample for sentence in _END.split(text)]
        sentences = [sentence for sentence in candidates if _WORD.search(sentence.lower())]
        result[name] = {"sentences": len(sentences), "profane": int(predict(sentences).sum()) if sentences else 0}
    return result


def compare_pronouns(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of sentences with each pronoun by component, and the words with the strongest bias to one pronoun.

    The bias ("lean") is defined as in the paper: the difference of the rates at which a word occurs in sentences with "he"
    and with "she", times the square root of its number of sentences with either. The paper counts adjectives and adverbs;
    this function counts all words except function words.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    by_component: dict[str, Counter[str]] = {}
    around = {pronoun: Counter[str]() for pronoun in PRONOUNS}
    for record in records:
        by_component.setdefault(record["component"], Counter()).update(record["sentences"])
        for pronoun in PRONOUNS:
            around[pronoun].update(record["around"][pronoun])
    totals = {p: max(sum(counts[p] for counts in by_component.values()), 1) for p in PRONOUNS}

    def lean(word: str) -> dict[str, Any]:
        he, she = (around[pronoun][word] for pronoun in PRONOUNS)
        score = (he / totals["he"] - she / totals["she"]) * math.sqrt(he + she)
        return {"word": word, "he": he, "she": she, "lean": round(score, 4)}

    excluded = ENGLISH_STOP_WORDS | FRAGMENTS
    words = [word for word in around["he"] | around["she"] if len(word) > 2 and word not in excluded]
    leaning = [lean(word) for word in words if around["he"][word] + around["she"][word] >= MIN_SENTENCES]
    leaning.sort(key=lambda entry: (-entry["lean"], entry["word"]))
    return {
        "sentences": {
            name: {pronoun: counts[pronoun] for pronoun in PRONOUNS} for name, counts in by_component.items()
        },
        "he": [entry for entry in leaning[:15] if entry["lean"] > 0],
        "she": [entry for entry in leaning[::-1][:15] if entry["lean"] < 0],
        "named": [lean(word) for word in PAPER_WORDS],
    }
