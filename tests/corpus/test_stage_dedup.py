# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Exact and near duplicates are removed across parts and components; held-out text is never in the training split."""

import numpy as np
import pytest
import xxhash
from invented_text import prose

pytest.importorskip("datatrove")
from mesh_transformer.corpus import stage_dedup
from mesh_transformer.corpus.build import build_corpus
from mesh_transformer.corpus.parts import read_documents
from mesh_transformer.corpus.stage_dedup import BoundedSignature, RemovalStage, minhash_config
from mesh_transformer.corpus.stages import Executor
from mesh_transformer.corpus.word_tokenizer import WORDS


@pytest.fixture
def remove(make_recipe, write_texts, tmp_path):
    """Return a function from texts by component to the numbers of the retained training texts and the matrices."""

    def run(texts, heldout=0, **tables):
        components = {name: {"kind": "text", "paths": [str(write_texts(name, own))]} for name, own in texts.items()}
        recipe = make_recipe(components, heldout={"one_in": heldout}, **tables)
        corpus = build_corpus(recipe, tmp_path / "out", Executor())
        kept = {name: [] for name in texts}
        for path in sorted((tmp_path / "out/documents/train").iterdir()):
            kept[path.name.rpartition("-")[0]] += [int(r["id"][-7:-4]) for r in read_documents(path)]
        return kept, corpus.matrix

    return run


def test_exact_duplicates_across_components_keep_the_first(remove):
    a, b = [prose(1), prose(2), prose(1).upper()], [prose(3), prose(2).replace("\n", "  "), prose(3)]
    kept, matrix = remove({"a": a, "b": b}, duplicates={"near": "none"})
    assert kept == {"a": [0, 1], "b": [0]}
    assert matrix["exact"] == [["a", "a", 1], ["b", "a", 1], ["b", "b", 1]]


def test_duplicates_within_components_only(remove):
    a, b = [prose(1), prose(2), prose(1)], [prose(2), prose(3)]
    kept, _ = remove({"a": a, "b": b}, duplicates={"near": "none", "across_components": False})
    assert kept == {"a": [0, 1], "b": [0, 1]}


def test_only_the_listed_components_lose_documents(remove):
    a, b = [prose(1), prose(1)], [prose(2), prose(2), prose(1)]
    kept, _ = remove({"a": a, "b": b}, duplicates={"near": "none", "components": ["b"]})
    assert kept == {"a": [0, 1], "b": [0]}


@pytest.mark.parametrize("near", ["pile", "fineweb"])
def test_near_duplicates(remove, near):
    changed = prose(1, 300).split(" ")
    changed[100] = changed[200] = "other"  # of 300 words: Jaccard about 0.93
    kept, matrix = remove(
        {"a": [prose(1, 300), prose(2, 300)], "b": [" ".join(changed), prose(3, 300)]}, duplicates={"near": near}
    )
    assert kept == {"a": [0, 1], "b": [1]}
    assert matrix == {"exact": [], "near": [["b", "a", 1]]}


def test_training_text_that_is_held_out_elsewhere_is_removed(make_recipe):
    """Columns of the groups: group, part, document, held out."""
    groups = np.array([[0, 0, 0, 0], [0, 1, 5, 1], [0, 1, 6, 0], [1, 0, 1, 0], [1, 1, 2, 0]])
    for across_components, expected in ((True, [(0, 0), (1, 2), (1, 6)]), (False, [(0, 0), (1, 6)])):
        recipe = make_recipe(
            {n: {"kind": "text", "paths": ["x"]} for n in "ab"}, duplicates={"across_components": across_components}
        )
        removals = RemovalStage(recipe, ("a", "b"), *[None] * 3, 1, None)._find_removals(groups)
        assert [(entry["rank"], entry["document"]) for entry in removals] == expected
        assert tuple(removals[0])[2:] == (1, 5)


def test_recurring_lines_are_removed(remove):
    menu = "this line occurs in every single document"
    texts = [prose(i, 60) + menu + "\n" + prose(100 + i, 60) for i in range(5)]
    kept, _ = remove({"a": [*texts, menu.upper()]}, lines={"min_documents": 5}, duplicates={"near": "none"})
    assert kept == {"a": [0, 1, 2, 3, 4]}


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return len(np.intersect1d(a, b)) / len(np.union1d(a, b))


def test_the_fraction_of_equal_hashes_is_the_similarity(make_recipe, tmp_path):
    recipe = make_recipe(
        {"a": {"kind": "text", "paths": ["x"]}}, duplicates={"near": "custom", "bands": 40, "rows": 50}
    )
    block = BoundedSignature(str(tmp_path), minhash_config(recipe), language=WORDS)
    words = prose(1, 3000).split(" ")
    other = words[:2000] + prose(2, 1000).split(" ")
    one, two = (block.get_shingles(" ".join(text)) for text in (words, other))
    equal = np.mean(
        [
            a == b
            for x, y in zip(block.get_signature(one), block.get_signature(two), strict=True)
            for a, b in zip(x, y, strict=True)
        ]
    )
    assert equal == pytest.approx(jaccard(one, two), abs=0.04)


def test_the_signature_does_not_depend_on_chunks(make_recipe, tmp_path):
    recipe = make_recipe({"a": {"kind": "text", "paths": ["x"]}})
    block = BoundedSignature(str(tmp_path), minhash_config(recipe), language=WORDS)
    shingles = block.get_shingles(prose(1, 20_000))
    assert len(shingles) > 2 * 8192
    assert block.get_signature(shingles) == super(BoundedSignature, block).get_signature(shingles)
    assert len(block.get_shingles("only four words here")) == 0


def test_the_hash_does_not_depend_on_chunks(monkeypatch):
    texts = ["", " \n", "ΟΔΟΣ\u2003Der  WEG\x1czum\xa0Meer\n", "x" * 50, "Σ ΑΣ  " * 9, prose(5)]
    for size in (1, 3, 8, 1 << 20):
        monkeypatch.setattr(stage_dedup, "HASH_CHARACTERS", size)
        for text in texts:
            assert stage_dedup.hash_text(text) == xxhash.xxh3_64_intdigest(" ".join(text.lower().split()).encode())
