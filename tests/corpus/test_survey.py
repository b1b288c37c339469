# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Content statistics: sentences with pronouns, biased words, profanity and topics of a sample."""

import pytest
from invented_text import prose

pytest.importorskip("datatrove")
from mesh_transformer.corpus.build import build_corpus
from mesh_transformer.corpus.stages import Executor
from mesh_transformer.corpus.survey import SAMPLE_DOCUMENTS, find_sentences, find_topics, measure_profanity


def test_sentences_with_pronouns():
    text = "He came. There the hero sat.\nShe, he said, is HERE\n\nthe next. (She left!) No one did."
    assert find_sentences(text) == [
        ({"he"}, {"he", "came"}),
        ({"he", "she"}, {"she", "he", "said", "is", "here"}),
        ({"she"}, {"she", "left"}),
    ]
    assert find_sentences("The other theme. Shell, then.") == []


def test_words_are_biased_to_the_pronoun_they_occur_with(tmp_path, write_texts, make_recipe):
    soldiers = [f"He is a military man {i}. " * 3 + prose(i) for i in range(8)]
    wives = [f"She is a happy married woman {i}. And she met a man. " + prose(100 + i) for i in range(16)]
    sources = {
        name: {"kind": "text", "paths": [str(write_texts(name, texts))]}
        for name, texts in (("a", soldiers), ("b", wives))
    }
    recipe = make_recipe(sources, heldout={"one_in": 0}, duplicates={"near": "none"}, corpus={"part_mb": 1})
    found = build_corpus(recipe, tmp_path / "out", Executor()).survey["pronouns"]
    assert found["sentences"] == {"a": {"he": 24, "she": 0}, "b": {"he": 0, "she": 32}}
    assert [entry["word"] for entry in found["he"]] == ["military", "man"]
    assert {entry["word"] for entry in found["she"]} == {"happy", "married", "woman", "met"}
    man = next(entry for entry in found["he"] if entry["word"] == "man")
    assert (man["he"], man["she"]) == (24, 16)
    assert man["lean"] == pytest.approx((24 / 24 - 16 / 32) * 40**0.5, abs=1e-3)
    assert [(entry["word"], entry["he"], entry["she"]) for entry in found["named"][:2]] == [
        ("military", 24, 0),
        ("criminal", 0, 0),
    ]


def test_profanity_and_topics_are_found_deterministically():
    rude, polite = ["You stupid fucking bastard. Good day."] * 3, ["A pleasant day in the garden. Good day."] * 3
    assert measure_profanity({"rude": rude, "polite": polite, "none": []}) == {
        "rude": {"sentences": 6, "profane": 3},
        "polite": {"sentences": 6, "profane": 0},
        "none": {"sentences": 0, "profane": 0},
    }
    texts = {
        "sea": [f"ship sail harbor captain anchor {prose(i, 8)}" for i in range(12)],
        "farm": [f"plow cow barn wheat harvest {prose(50 + i, 8)}" for i in range(12)],
    }
    found = find_topics(texts)
    assert found == find_topics(texts)
    main = {
        name: found["words"][max(range(len(shares)), key=shares.__getitem__)]
        for name, shares in found["shares"].items()
    }
    assert {"ship", "sail", "harbor"} <= set(main["sea"])
    assert {"plow", "cow"} <= set(main["farm"])
    assert find_topics({"a": ["1 2 3"]}) == {"words": [], "shares": {}}


def test_samples_are_bounded_and_do_not_depend_on_parts(tmp_path, write_texts, make_recipe):
    folder = write_texts("a", [f"text {i} " + prose(i, 600) for i in range(SAMPLE_DOCUMENTS + 50)])
    surveys = []
    for part_mb in (1, 2):
        recipe = make_recipe(
            {"a": {"kind": "text", "paths": [str(folder)]}},
            heldout={"one_in": 0},
            duplicates={"near": "none"},
            corpus={"part_mb": part_mb},
        )
        corpus = build_corpus(recipe, tmp_path / f"out{part_mb}", Executor())
        surveys.append(corpus.survey)
        assert len(corpus.parts) == 3 - part_mb
    assert surveys[0] == surveys[1]
    assert surveys[0]["profanity"]["a"]["sentences"] >= SAMPLE_DOCUMENTS
