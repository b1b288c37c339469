# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a corpus is worth: the texts that are trained on share nothing with the held-out ones, whichever they are."""

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


def test_no_text_has_anything_of_what_is_held_out(bench, tmp_path, write_texts, make_recipe):
    """Every note is there twice in the sources, in the second file behind other words, so that sides are mixed."""
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
    unseen = grams(text for texts in held_out.values() for text in texts)
    assert len(unseen) > 500
    assert unseen & grams(path.read_text() for path in notes.iterdir() if path.read_text() not in held_out["notes"])
    for name, of_it in found["trained"].items():
        records = list(read_documents(Path(of_it["path"])))
        assert not unseen & grams(record["text"] for record in records), name
        assert 2e4 < of_it["bytes"] == sum(len(record["text"].encode()) for record in records)
        assert sum(of_it["components"].values()) == of_it["bytes"]
    assert found["trained"]["raw"]["cut"] + found["trained"]["raw"]["dropped"] > 0
    assert found["trained"]["books"]["components"].keys() == {"books"}
    assert bench.prepare_texts(out, sheet, "books", tmp_path / "texts", 0.5) == found
    with pytest.raises(ConfigError, match="name another OUT"):
        bench.prepare_texts(out, sheet, "notes", tmp_path / "texts", 0.5)
    runs = {
        name: [{"notes": 2.0 + i, "all": 1.0}, {"notes": 3.0 + i, "all": 1.0}]
        for i, name in enumerate(found["trained"])
    }
    table = bench.make_table(runs)
    assert table["notes"]["mixture"] == {"mean": 2.5, "sd": pytest.approx(0.5**0.5)}
    text = bench.format_result(found, table)
    assert re.search(r"notes +2\.5000 ± 0\.7071\* +3\.5000 ± 0\.7071  +4\.5000", text)


def test_passages_are_drawn_by_their_shares(bench):
    """A share of each document's passages, the same every time and whatever else there is, in no order of documents."""
    documents = [(0.25 * (i % 3 + 1), bench.Passage(f"c{i % 3}", f"d{i}", "x" * bench.PASSAGE * 20)) for i in range(60)]
    drawn = bench.draw(documents)
    for number, share in enumerate((0.25, 0.5, 0.75)):
        own = [passage for passage in drawn if passage.component == f"c{number}"]
        assert len(own) == pytest.approx(share * 400, abs=40)
        assert own == bench.draw(documents[number::3])
    assert [passage.name for passage in drawn] != sorted(passage.name for passage in drawn)


def test_what_is_no_corpus_is_said(bench, tmp_path):
    with pytest.raises(ConfigError, match=r"not a whole corpus: build it with scripts/build_corpus\.py"):
        bench.main([str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="--seeds is at least 1"):
        bench.parse([str(tmp_path), str(tmp_path / "out"), "--seeds", "0"])
