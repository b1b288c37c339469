# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The Pile's quality classifier: linear in word 2-grams, trained on own positives (appendix C and its code).

The Pile used fastText. Its Python package gave other bytes on the same text with one thread and a seed, and now and then
stopped at a NaN; scikit-learn's logistic regression over hashed 1- and 2-grams is as linear, and repeatable.
"""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
import xxhash

from mesh_transformer.corpus.markup import install_hint
from mesh_transformer.data.errors import DataError
from mesh_transformer.storage.atomic_files import replace_file

CHARACTERS, LAST = 4000, 1500  # of the first so many characters, the last so many are looked at
SHORTEST = 100  # shorter training lines are left out
FEATURES = 1 << 18  # that 1- and 2-grams of words are hashed to


def _view(text: str) -> str:
    return " ".join(text[:CHARACTERS][-LAST:].split())


def _vectorizer() -> Any:
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError:
        raise install_hint("scikit-learn") from None
    return HashingVectorizer(ngram_range=(1, 2), n_features=FEATURES, alternate_sign=False, norm="l2")


def sample_texts(texts: Iterable[tuple[str, str]], count: int, seed: int) -> list[str]:
    """At most `count` of (name, text), drawn evenly however many there are, the same ones for the same seed."""
    draw = random.Random(xxhash.xxh3_64_intdigest(f"{seed}:sample".encode()))
    kept: list[str] = []
    for number, (_, text) in enumerate(texts):
        if len(kept) < count:
            kept.append(_view(text))
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = _view(text)
    return kept


def train_classifier(positives: list[str], negatives: list[str], path: Path, seed: int) -> None:
    """A model in `path`, whole or not at all; DataError if either side has too little."""
    vectorizer = _vectorizer()
    from sklearn.linear_model import LogisticRegression

    sides = [[text for text in texts if len(text) >= SHORTEST] for texts in (negatives, positives)]
    for texts, what in zip(sides, ("negatives", "positives"), strict=True):
        if len(texts) < 10:
            raise DataError(f"quality: fewer than 10 {what} of {SHORTEST} characters to train on; add components to it")
    labels = np.repeat([0, 1], [len(texts) for texts in sides])
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=200, random_state=seed)
    model.fit(vectorizer.transform(sides[0] + sides[1]), labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = np.append(np.ravel(model.coef_), np.ravel(model.intercept_)).astype(np.float32)  # [features + 1]
    replace_file(path, weights.tobytes())


def load_classifier(path: Path) -> Callable[[str], float]:
    """A function from a text to the probability that it is like the positives."""
    vectorizer, weights = _vectorizer(), np.fromfile(path, np.float32)

    def score(text: str) -> float:
        row = vectorizer.transform([_view(text)])
        return float(scipy.special.expit(row.data @ weights[row.indices] + weights[-1]))

    return score
