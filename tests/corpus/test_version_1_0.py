# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A corpus built by version 1.0 opens, is inspected, and is built again from its translated recipe to the same bytes."""

import json
import os
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
from mesh_transformer.config import ConfigError, read_toml
from mesh_transformer.corpus.build import build_corpus
from mesh_transformer.corpus.datasheet.content import read_datasheet, write_datasheet
from mesh_transformer.corpus.datasheet.page import make_page
from mesh_transformer.corpus.parts import read_dropped
from mesh_transformer.corpus.recipe import load_recipe, load_stored_recipe
from mesh_transformer.corpus.stages import CorpusError, Executor
from mesh_transformer.data.shards import TokenShard
from mesh_transformer.data.tokenizers import ByteTokenizer

ARCHIVE = Path(__file__).parents[1] / "golden" / "version_1_0.tar.gz"
RECIPE = """
[corpus]
name = "Legacy"
[heldout]
one_in = 4
[components.notes]
kind = "source"
paths = ["texts"]
licence = "Apache-2.0"
pieces_kb = 1
[evaluation.set]
path = "texts/1.txt"
[[steps]]
kind = "length"
without = []
min_bytes = 10
[[steps]]
kind = "decontaminate"
against = ["set"]
min_piece = 20
common = 3
[duplicates]
near = "own"
across = false
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The unpacked files of version 1.0 as the working directory, since the paths of the recipe are relative."""
    with tarfile.open(ARCHIVE) as archive:
        names = ("corpus", "texts", "corpus.toml")
        members = [one for one in archive.getmembers() if one.name.removeprefix("./").split("/")[0] in names]
        archive.extractall(tmp_path, members, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load_old(path: Path):
    return load_stored_recipe(read_toml(path), where=str(path))


def token_files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "tokens").iterdir())}


def test_the_recipe_file_is_refused_with_the_new_names(folder):
    with pytest.raises(ConfigError) as error:
        load_recipe(folder / "corpus.toml")
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for old, new in (
        ("components.notes.licence", "license"),
        ("components.notes.pieces_kb", "chunk_kb"),
        ("steps", "filters"),
    ):
        assert any(old in line and new in line for line in lines)


def test_the_datasheet_opens(folder):
    sheet = read_datasheet(folder / "corpus")
    assert sheet["components"]["notes"]["license"] == "Apache-2.0"
    assert sheet["recipe"]["components"]["notes"]["chunk_kb"] == 1
    assert sheet["recipe"]["filters"][0]["kind"] == "length"
    page = make_page(sheet)
    assert sheet["digest"] in page
    assert "8 held-out texts, 0 also occur in the training text" in page


def test_the_inspection_program_opens_it(folder, load_script, capsys):
    inspect = load_script("inspect_corpus").main
    assert inspect(["corpus", "--n", "2"]) == 0
    assert capsys.readouterr().out.count("--- texts/") == 2
    with pytest.raises(CorpusError, match=r'it was built with duplicates\.near = "none"'):
        inspect(["corpus", "--duplicates-of", "texts/1.txt"])


def test_its_shards_are_read(folder):
    shard = TokenShard(folder / "corpus/tokens/train")
    texts = {path.read_text(encoding="utf-8") for path in (folder / "texts").iterdir()}
    assert shard.n_documents == 16
    assert all(ByteTokenizer().decode(shard.document(i)) in texts for i in range(shard.n_documents))


def test_building_again_gives_the_same_bytes(folder):
    before = token_files(folder / "corpus")
    for out in ("corpus", "fresh"):  # continue the corpus of version 1.0, and start a new one
        corpus = build_corpus(load_old(folder / "corpus.toml"), folder / out, Executor())
        assert token_files(folder / out) == before
        sheet = write_datasheet(corpus, folder / out)
        assert json.loads(json.dumps(sheet)) == read_datasheet(folder / out)
    stored = json.loads((folder / "corpus/manifest.json").read_text())
    assert stored == json.loads((folder / "fresh/manifest.json").read_text())
    assert not list((folder / "corpus/work").glob("tokenise-*")), "stages of version 1.0 are not removed"


def test_filtered_parts_of_version_1_0_are_reused(folder):
    """The digests were computed by version 1.0 for this recipe and these modification times."""
    for path in (folder / "texts").iterdir():
        os.utime(path, ns=(10**18, 10**18))
    (folder / "old.toml").write_text(RECIPE)
    recipe = load_old(folder / "old.toml")
    corpus = build_corpus(recipe, folder / "out", Executor())
    stage = folder / "out/work/filter-cf36f7977f37"
    assert stage.is_dir()
    assert [record["inputs"] for record in corpus.filtered] == ["8722281e88855ac1407c065ff1379b24"]
    assert corpus.manifest["outputs"]["tokens/train.bin"]["digest"] == "b3830ae1e1ee1c6fe0ee5befc6986c8d"

    record = stage / "records/00000.json"
    table = json.loads(record.read_text())
    record.write_text(json.dumps({"steps" if key == "filters" else key: value for key, value in table.items()}))
    made = (stage / "documents/00000.jsonl.zst").stat().st_mtime_ns
    again = build_corpus(recipe, folder / "out", Executor())
    assert (stage / "documents/00000.jsonl.zst").stat().st_mtime_ns == made
    assert again.filtered == corpus.filtered
    assert again.manifest == corpus.manifest
    assert [document["meta"]["filter"] for document in read_dropped(folder / "out")] == ["1-decontaminate"]
