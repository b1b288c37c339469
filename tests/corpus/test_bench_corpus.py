# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of scripts/bench/corpus.py: training texts share no n-gram with held-out texts."""

import json
import re
from pathlib import Path

import pytest
from invented_text import prose

pytest.importorskip("datatrove")
from mesh_transformer.config import ConfigError
from mesh_transformer.corpus.build import build_corpus
from mesh_transformer.corpus.datasheet.content import write_datasheet
from mesh_transformer.corpus.parts import read_documents
from mesh_transformer.corpus.stages import Executor

WORDS = 13


@pytest.fixture(scope="module")
def bench(load_script):
    return load_script("bench/corpus")


def grams(texts) -> set[tuple[str, ...]]:
    found = set()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        found |= {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}
    return found


def test_training_texts_share_nothing_with_held_out_texts(bench, tmp_path, write_texts, make_recipe):
    """Every note occurs twice in the sources, the second time after other words, so that splits overlap."""
    once = [prose(i, 300) for i in range(40)]
    notes = write_texts("notes", [*once, *(f"{prose(500 + i, 200)}{text}" for i, text in enumerate(once))])
    books = write_texts("books", [prose(900 + i, 400) for i in range(30)])
    components = {
        "notes": {"kind": "text", "paths": [str(notes)]},
        "books": {"kind": "text", "paths": [str(books)], "epochs": 2.0},
    }
    out = tmp_path / "corpus"
    recipe = make_recipe(components, heldout={"one_in": 4}, duplicates={"near": "none"})
    write_datasheet(build_corpus(recipe, out, Executor()), out)
    sheet = bench.read_sheet(out)
    found = bench.prepare_texts(out, sheet, "books", tmp_path / "texts", 0.5)
    held_out = {
        name: [
            json.loads(line)["text"] for line in bench.held_out_file(tmp_path / "texts", name).read_text().splitlines()
        ]
        for name in ("notes", "books")
    }
    held_out_grams = grams(text for texts in held_out.values() for text in texts)
    assert len(held_out_grams) > 500
    assert held_out_grams & grams(
        path.read_text() for path in notes.iterdir() if path.read_text() not in held_out["notes"]
    )
    for name, text in found["trained"].items():
        records = list(read_documents(Path(text["path"])))
        assert not held_out_grams & grams(record["text"] for record in records), name
        assert 2e4 < text["bytes"] == sum(len(record["text"].encode()) for record in records)
        assert sum(text["components"].values()) == text["bytes"]
    assert found["trained"]["raw"]["cut"] + found["trained"]["raw"]["dropped"] > 0
    assert found["trained"]["books"]["components"].keys() == {"books"}
    assert bench.prepare_texts(out, sheet, "books", tmp_path / "texts", 0.5) == found
    with pytest.raises(ConfigError, match="choose another OUT"):
        bench.prepare_texts(out, sheet, "notes", tmp_path / "texts", 0.5)
    runs = {
        name: [{"notes": 2.0 + i, "all": 1.0}, {"notes": 3.0 + i, "all": 1.0}]
        for i, name in enumerate(found["trained"])
    }
    table = bench.make_table(runs)
    assert table["notes"]["mixture"] == {"mean": 2.5, "sd": pytest.approx(0.5**0.5)}
    text = bench.format_result(found, table)
    assert re.search(r"notes +2\.5000 ± 0\.7071\* +3\.5000 ± 0\.7071  +4\.5000", text)


def test_passages_are_sampled_by_their_fractions(bench):
    """A fraction of the passages of each document, deterministic, independent of other documents, and shuffled."""
    documents = [(0.25 * (i % 3 + 1), bench.Passage(f"c{i % 3}", f"d{i}", "x" * bench.PASSAGE * 20)) for i in range(60)]
    sampled = bench.sample(documents)
    for number, fraction in enumerate((0.25, 0.5, 0.75)):
        own = [passage for passage in sampled if passage.component == f"c{number}"]
        assert len(own) == pytest.approx(fraction * 400, abs=40)
        assert own == bench.sample(documents[number::3])
    assert [passage.name for passage in sampled] != sorted(passage.name for passage in sampled)


def test_wrong_usage_is_reported(bench, tmp_path):
    with pytest.raises(ConfigError, match=r"not a complete corpus; build it with scripts/build_corpus\.py"):
        bench.main([str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="--seeds 0: must be at least 1"):
        bench.parse([str(tmp_path), str(tmp_path / "out"), "--seeds", "0"])
