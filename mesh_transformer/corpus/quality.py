# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The Pile's quality classifier: fastText with word 2-grams, trained on own positives (appendix C and its code)."""

import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash

from mesh_transformer.corpus.markup import install_hint
from mesh_transformer.data.documents import DataError

CHARACTERS, LAST = 4000, 1500  # of the first so many characters, the last so many are looked at
SHORTEST = 100  # shorter training lines are left out


def _view(text: str) -> str:
    return " ".join(text[:CHARACTERS][-LAST:].split())


def _library() -> Any:
    try:
        import fasttext
    except ImportError:
        raise install_hint("fasttext-numpy2") from None
    return fasttext


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
    lines = [f"__label__{label} {text}" for label, texts in (("yes", positives), ("no", negatives)) for text in texts]
    lines = [line for line in lines if len(line) >= SHORTEST + len("__label__no ")]
    for label, what in (("yes", "positives"), ("no", "negatives")):
        if sum(line.startswith(f"__label__{label}") for line in lines) < 10:
            raise DataError(f"quality: fewer than 10 {what} of {SHORTEST} characters to train on; add components to it")
    random.Random(seed).shuffle(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    examples = path.with_suffix(".txt")
    examples.write_text("\n".join(lines) + "\n", encoding="utf-8")
    # one thread and a seed: the same file every time
    model = _library().train_supervised(
        str(examples), wordNgrams=2, bucket=200_000, dim=32, thread=1, seed=seed, verbose=0
    )
    temporary = path.with_name(f"{path.name}.tmp")
    model.save_model(str(temporary))
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_classifier(path: Path) -> Callable[[str], float]:
    """A function from a text to the probability that it is like the positives."""
    model = _library().load_model(str(path))

    def score(text: str) -> float:
        # not model.predict, which numpy 2 refuses in some releases of fastText
        found = {label: value for value, label in model.f.predict(_view(text) + "\n", 2, 0.0, "strict")}
        return min(found.get("__label__yes", 0.0), 1.0)

    return score
