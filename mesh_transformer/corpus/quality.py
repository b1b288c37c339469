# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The Pile's quality classifier: linear in word 2-grams, trained on components of the corpus (the paper's appendix C and code).

The Pile used fastText. The Python package of fastText was not deterministic, even with one thread and a fixed seed, and
sometimes stopped at a NaN. Logistic regression of scikit-learn over hashed 1- and 2-grams is also linear, and deterministic.
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

# The classifier reads the last VIEW_CHARACTERS of the first PREFIX_CHARACTERS of a text.
PREFIX_CHARACTERS = 4000
VIEW_CHARACTERS = 1500
MIN_CHARACTERS = 100  # shorter training texts are excluded
FEATURES = 1 << 18  # buckets of the hashed 1- and 2-grams


def _view(text: str) -> str:
    return " ".join(text[:PREFIX_CHARACTERS][-VIEW_CHARACTERS:].split())


def _vectorizer() -> Any:
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError:
        raise install_hint("scikit-learn") from None
    return HashingVectorizer(ngram_range=(1, 2), n_features=FEATURES, alternate_sign=False, norm="l2")


def sample_texts(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Return a uniform sample of at most `count` texts (reservoir sampling), determined by the seed."""
    rng = random.Random(xxhash.xxh3_64_intdigest(f"{seed}:sample".encode()))
    sampled: list[str] = []
    for number, text in enumerate(texts):
        if len(sampled) < count:
            sampled.append(_view(text))
        elif (index := rng.randrange(number + 1)) < count:
            sampled[index] = _view(text)
    return sampled


def train_classifier(positives: list[str], negatives: list[str], path: Path, seed: int) -> None:
    """Write a model to `path` atomically; raise DataError if a class has too few texts."""
    vectorizer = _vectorizer()
    from sklearn.linear_model import LogisticRegression

    classes = [[text for text in texts if len(text) >= MIN_CHARACTERS] for texts in (negatives, positives)]
    for texts, name in zip(classes, ("negatives", "positives"), strict=True):
        if len(texts) < 10:
            raise DataError(
                f"quality filter: {len(texts)} {name} of at least {MIN_CHARACTERS} characters, 10 are required; add components "
                f"with more text to the filter's `{name}`"
            )
    labels = np.repeat([0, 1], [len(texts) for texts in classes])
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=200, random_state=seed)
    model.fit(vectorizer.transform(classes[0] + classes[1]), labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = np.append(np.ravel(model.coef_), np.ravel(model.intercept_)).astype(np.float32)  # [features + 1]
    replace_file(path, weights.tobytes())


def load_classifier(path: Path) -> Callable[[str], float]:
    """Return a function that computes the probability that a text belongs to the positives."""
    vectorizer = _vectorizer()
    weights = np.fromfile(path, np.float32)

    def score(text: str) -> float:
        features = vectorizer.transform([_view(text)])
        return float(scipy.special.expit(features.data @ weights[features.indices] + weights[-1]))

    return score
