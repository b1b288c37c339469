# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Small sources, and recipes over them."""

import random
from pathlib import Path

import pytest

from mesh_transformer.config import check_table
from mesh_transformer.corpus.recipe import Recipe

WORDS = [
    a + b
    for a in ("ba", "ko", "mi", "tu", "re", "sal", "von", "pir")
    for b in ("n", "ta", "do", "lex", "m", "ris", "gu", "ne")
]


def prose(seed: int, words: int = 120) -> str:
    """Sentences of invented words; texts of different seeds have next to nothing in common."""
    draw = random.Random(seed)
    sentences = []
    while words > 0:
        length = min(draw.randint(6, 12), words)
        words -= length
        sentences.append(" ".join(draw.choice(WORDS) for _ in range(length)).capitalize() + ".")
    return "\n".join(sentences) + "\n"


@pytest.fixture
def make_recipe():
    """A checked recipe from tables; components need only kind and paths."""

    def make(components: dict[str, dict], **tables) -> Recipe:
        corpus = {"name": "small"} | tables.pop("corpus", {})
        components = {name: {"licence": "none"} | component for name, component in components.items()}
        return check_table(Recipe, {"corpus": corpus, "components": components, **tables}, where="small.toml")

    return make


@pytest.fixture
def write_texts(tmp_path):
    """Texts as files FOLDER/NUMBER.txt; the folder."""

    def write(folder: str, texts: list[str]) -> Path:
        (tmp_path / folder).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
        return tmp_path / folder

    return write
