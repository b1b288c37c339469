# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Building a corpus: the same bytes for any number of workers and interruptions, the configured mixture, valid shards."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from invented_text import prose

pytest.importorskip("datatrove")
from mesh_transformer.config import ConfigError
from mesh_transformer.corpus.build import build_corpus
from mesh_transformer.corpus.datasheet.content import write_datasheet
from mesh_transformer.corpus.parts import read_documents
from mesh_transformer.corpus.stage_filter import split_of
from mesh_transformer.corpus.stages import CorpusError, Executor
from mesh_transformer.data.errors import DataError
from mesh_transformer.data.shards import TokenShard
from mesh_transformer.data.tokenizers import ByteTokenizer

ROOT = Path(__file__).parents[2]
MIN_BYTES = 650  # some of the notes are shorter


@pytest.fixture
def sources(write_texts):
    """Two components: 60 short texts, and 40 longer ones in two JSON-lines files, one with a broken line."""
    books = write_texts("books", [])
    for half in (0, 1):
        lines = [json.dumps({"text": prose(1000 + half * 20 + i, 200)}) for i in range(20)]
        (books / f"{half}.jsonl").write_text("\n".join([*lines, '{"text": ' * half]) + "\n")
    return {
        "notes": {"kind": "text", "paths": [str(write_texts("notes", [prose(i) for i in range(60)]))]},
        "books": {"kind": "jsonl", "paths": [str(books)], "epochs": 2.5},
    }


def texts_of(folder: Path) -> dict[str, str]:
    return {record["id"]: record["text"] for path in sorted(folder.iterdir()) for record in read_documents(path)}


def test_a_corpus_end_to_end(tmp_path, sources, make_recipe):
    recipe = make_recipe(
        sources, heldout={"one_in": 8}, filters=[{"kind": "language"}, {"kind": "length", "min_bytes": MIN_BYTES}]
    )
    corpus = build_corpus(recipe, tmp_path / "out", Executor())
    train, heldout = (texts_of(tmp_path / "out/documents" / split) for split in ("train", "heldout"))
    dropped = [r for path in (tmp_path / "out/work").glob("*/dropped/*") for r in read_documents(path)]
    assert len(train) + len(heldout) + len(dropped) == 100
    assert {record["meta"]["reason"] for record in dropped} == {f"under {MIN_BYTES} bytes"}
    assert len(heldout) > 4
    assert all(split_of(name, recipe) == "heldout" for name in heldout)
    assert not set(train.values()) & set(heldout.values())
    assert corpus.split_check["in_both"] == 0
    assert corpus.split_check["heldout_texts"] == len(heldout)

    # The shard holds every copy of every document, in a different order from the sources.
    shard, tokenizer = TokenShard(tmp_path / "out/tokens/train"), ByteTokenizer()
    copies = [tokenizer.decode(shard.document(i)) for i in range(shard.n_documents)]
    counts = {name: copies.count(text) for name, text in train.items()}
    assert len(copies) == sum(counts.values())
    notes, books = ([count for name, count in counts.items() if part in name] for part in ("/notes/", "/books/"))
    assert set(notes) == {1}
    assert set(books) == {2, 3}
    assert 2.2 < np.mean(books) < 2.8
    assert all(shard.document(i)[-1] == tokenizer.end_of_text for i in range(shard.n_documents))
    order = [next(name for name, text in train.items() if text == copy) for copy in copies]
    assert order != sorted(order)
    for component in sources:
        shard = TokenShard(tmp_path / f"out/tokens/heldout-{component}")
        assert [tokenizer.decode(shard.document(i)) for i in range(shard.n_documents)] == [
            text for name, text in heldout.items() if f"/{component}/" in name
        ]

    sheet = write_datasheet(corpus, tmp_path / "out")
    parts = sheet["components"]
    assert parts["books"]["raw_documents"] == 40
    assert parts["books"]["skipped"] == {"broken JSON": 1}
    assert parts["books"]["weight"] + parts["notes"]["weight"] == pytest.approx(1)
    assert parts["books"]["effective_bytes"] / parts["books"]["train_bytes"] == pytest.approx(np.mean(books), rel=0.02)
    assert sum(part["train_documents"] for part in parts.values()) == len(train)
    page = (tmp_path / "out/datasheet.html").read_text()
    assert not re.search(r"""(src|href)=["']?http|@import|url\(""", page), "the page requests external resources"
    for word in ("Composition", f"under {MIN_BYTES} bytes", sheet["digest"], "broken JSON", "<svg"):
        assert word in page

    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert set(manifest["outputs"]) == {
        path.relative_to(tmp_path / "out").as_posix()
        for kind in ("documents", "tokens")
        for path in (tmp_path / "out" / kind).rglob("*")
        if path.is_file()
    }
    assert len(manifest["inputs"]) == 62

    # A change of the mixture rebuilds no documents.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/work").glob("select*/*/*.zst")}
    fewer = make_recipe(
        {name: own | {"epochs": 1} for name, own in sources.items()},
        heldout={"one_in": 8},
        filters=[{"kind": "language"}, {"kind": "length", "min_bytes": MIN_BYTES}],
    )
    again = build_corpus(fewer, tmp_path / "out", Executor())
    assert TokenShard(tmp_path / "out/tokens/train").n_documents == len(train)
    assert again.manifest["digest"] != corpus.manifest["digest"]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/work").glob("select*/*/*.zst")}


def test_a_killed_build_resumes_to_the_same_bytes(tmp_path, sources, make_recipe):
    expected = build_corpus(make_recipe(sources), tmp_path / "uninterrupted", Executor()).manifest
    tables = [
        f'[components.{name}]\nkind = "{own["kind"]}"\npaths = {own["paths"]}\nlicense = "none"\n'
        f"epochs = {own.get('epochs', 1)}\n"
        for name, own in sources.items()
    ]
    (tmp_path / "small.toml").write_text(f'[corpus]\nname = "small"\n{"".join(tables)}')
    command = [
        sys.executable,
        "scripts/build_corpus.py",
        str(tmp_path / "small.toml"),
        str(tmp_path / "out"),
        "--workers",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for stage in ("filter", "signatures"):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.PIPE)
        while process.poll() is None and not list((tmp_path / "out/work").glob(f"{stage}-*/records/*.json")):
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "out/manifest.json").exists(), "an incomplete corpus has a manifest"
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == expected


def test_a_change_rebuilds_only_the_affected_parts(tmp_path, write_texts, make_recipe):
    """Each file is a part of its own, since two exceed the part size of 1 MB."""
    notes = write_texts("notes", [prose(i, 2000) * 50 for i in range(3)])
    more = write_texts("more", [prose(9)])
    components = {name: {"kind": "text", "paths": [str(folder)]} for name, folder in (("notes", notes), ("more", more))}
    length = {"kind": "length", "components": ["notes"]}

    def build(out: str, filters: list[dict]) -> tuple[str, list[int]]:
        recipe = make_recipe(components, corpus={"part_mb": 1}, duplicates={"near": "none"}, filters=filters)
        digest = build_corpus(recipe, tmp_path / out, Executor()).manifest["digest"]
        kept = sorted((tmp_path / out / "work").glob("filter-*/documents/*"))
        assert [path.name for path in kept] == [f"{rank:05d}.jsonl.zst" for rank in range(len(kept))]
        return digest, [path.stat().st_ino for path in kept]

    _, first = build("out", [length])
    (notes / "001.txt").write_text(prose(7, 2000) * 50)
    (notes / "000.txt").unlink()  # changes the numbers of the other parts
    _, second = build("out", [length])
    assert [new == old for new, old in zip(second, first[1:], strict=True)] == [False, True, True]
    digest, third = build("out", [length | {"min_bytes": 9}])
    assert [new == old for new, old in zip(third, second, strict=True)] == [False, False, True]
    assert digest == build("again", [length | {"min_bytes": 9}])[0]


def test_unattainable_weights_and_empty_components_are_errors(tmp_path, sources, make_recipe):
    weighted = {
        name: {k: v for k, v in own.items() if k != "epochs"} | {"weight": 1.0} for name, own in sources.items()
    }
    with pytest.raises(
        ConfigError, match=r"components.notes.weight = 1.0 requires 0.5 MB.*lower the weight or mixture.bytes"
    ):
        build_corpus(make_recipe(weighted, mixture={"bytes": 1_000_000}), tmp_path / "out", Executor())
    assert not (tmp_path / "out/manifest.json").exists()
    corpus = build_corpus(make_recipe(weighted, mixture={"bytes": 100_000}), tmp_path / "out", Executor())
    shares = [sum(r["train"]["copied_bytes"] for r in corpus.tokenized if r["component"] == name) for name in sources]
    assert shares == pytest.approx([50_000, 50_000], rel=0.2)
    with pytest.raises(
        CorpusError, match="component notes: no training text is left after filtering and deduplication"
    ):
        build_corpus(
            make_recipe(sources, filters=[{"kind": "length", "min_bytes": 1000, "components": ["notes"]}]),
            tmp_path / "out",
            Executor(),
        )
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_quality_filter_trains_its_own_classifier(tmp_path, sources, make_recipe):
    odd = [prose(2000 + i).replace("an", "xx") for i in range(30)]
    for number, text in enumerate(odd):
        (tmp_path / "notes" / f"odd-{number}.txt").write_text(text)
    step = {"kind": "quality", "positives": ["books"], "negatives": ["notes"], "components": ["notes"], "alpha": 2.0}
    corpus = build_corpus(
        make_recipe(sources, filters=[step], duplicates={"near": "none"}), tmp_path / "out", Executor()
    )
    counts = [record["filters"] for record in corpus.filtered]
    assert [len(filters) for filters in counts] == [1, 0]
    dropped = counts[0][0]["dropped"]
    assert set(dropped) == {"low quality"}
    kept = texts_of(tmp_path / "out/documents/train")
    assert dropped["low quality"] + len(kept) == 90 + 40


def test_an_unreadable_component_reports_its_first_error(tmp_path, sources, make_recipe, write_texts):
    sources["empty"] = {"kind": "text", "paths": [str(write_texts("empty", [" "]))]}
    with pytest.raises(
        CorpusError, match=r"component empty: none of its documents could be read; first error: .*000.txt: empty text"
    ):
        build_corpus(make_recipe(sources), tmp_path / "out", Executor())


def open_full(path: Path, mode: str):
    """Open /dev/full instead of a file that is to be written."""
    return open("/dev/full" if "w" in mode else path, mode)


def write_full(run):
    """Raise NumPy's error for a full disk."""
    np.zeros(1 << 20, np.uint8).tofile("/dev/full")


@pytest.mark.parametrize(
    ("target", "replacement"),
    [
        ("mesh_transformer.corpus.parts.open", open_full),
        ("mesh_transformer.corpus.stage_mix._RunWriter._write", write_full),
    ],
)
def test_a_full_disk_is_reported_and_the_next_build_resumes(
    tmp_path, sources, make_recipe, monkeypatch, target, replacement
):
    recipe = make_recipe(sources, duplicates={"near": "none"})
    with monkeypatch.context() as patch:
        patch.setattr(target, replacement, raising=False)
        with pytest.raises(CorpusError, match=f"{tmp_path}/out: the disk or quota is full .*; free some space and run"):
            build_corpus(recipe, tmp_path / "out", Executor())
    assert not (tmp_path / "out/manifest.json").exists()
    assert build_corpus(recipe, tmp_path / "out", Executor()).manifest["outputs"]


def test_a_source_that_disappears_during_the_build(tmp_path, sources, make_recipe, monkeypatch):
    from mesh_transformer.corpus import build

    def find_and_lose(recipe):
        found = find_parts(recipe)
        os.unlink(found[0][0].files[5].path)
        return found

    find_parts = build.find_parts
    monkeypatch.setattr(build, "find_parts", find_and_lose)
    with pytest.raises(DataError, match=r"005.txt: removed during the build"):
        build_corpus(make_recipe(sources), tmp_path / "out", Executor())
    assert not (tmp_path / "out/manifest.json").exists()


def test_one_build_at_a_time(tmp_path, sources, make_recipe):
    import fcntl

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CorpusError, match="another build is running in this folder"):
            build_corpus(make_recipe(sources), tmp_path / "out", Executor())
