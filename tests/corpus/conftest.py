# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures: small source files and recipes for them."""

from pathlib import Path

import pytest

from mesh_transformer.config import check_table
from mesh_transformer.corpus.recipe import Recipe


@pytest.fixture
def make_recipe():
    """Return a function from tables to a checked recipe; components need only kind and paths."""

    def make(components: dict[str, dict], **tables) -> Recipe:
        corpus = {"name": "small"} | tables.pop("corpus", {})
        components = {name: {"license": "none"} | component for name, component in components.items()}
        return check_table(Recipe, {"corpus": corpus, "components": components, **tables}, where="small.toml")

    return make


@pytest.fixture
def write_texts(tmp_path):
    """Return a function that writes texts as FOLDER/NUMBER.txt and returns the folder."""

    def write(folder: str, texts: list[str]) -> Path:
        (tmp_path / folder).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
        return tmp_path / folder

    return write
