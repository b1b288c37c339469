# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every filter keeps what it should and states its reason for dropping the rest."""

import time
from pathlib import Path

import pytest
from invented_text import prose

pytest.importorskip("datatrove")
from datatrove.data import Document

from mesh_transformer.corpus.filters import FILTERS, make_filters
from mesh_transformer.corpus.markup import TO_TEXT
from mesh_transformer.corpus.quality import load_classifier, train_classifier
from mesh_transformer.corpus.recipe import Filter
from mesh_transformer.corpus.word_tokenizer import WORDS
from mesh_transformer.data.errors import DataError

ENGLISH = (
    "The house that we have lived in for all of these years stands at the end of the long road to the sea. "
    "It was built by people who wanted to be near the water, and with time it has become a part of the land.\n"
    "No one knows how many guests have slept there, but the book in the hall has more than a thousand names in it.\n"
    "When the winter comes, we close the upper rooms and live around the kitchen, which is warm and full of light.\n"
    "Every child of the family has learned to read at that table, and to listen to the wind as well.\n"
    "It is not a beautiful house, to be honest; yet it is the only one to which all of us would come back.\n"
)
GERMAN = (
    "Das Haus, in dem wir seit vielen Jahren wohnen, steht am Ende der langen Straße, die zum Meer hinunterführt. " * 3
)


@pytest.fixture
def apply(make_recipe):
    """Return a function that runs one filter and returns the reason for dropping and the document."""

    def run(text, model=None, name="a", **config):
        recipe = make_recipe({"a": {"kind": "text", "paths": ["a"]}}, filters=[config])
        document = Document(text, name)
        return FILTERS[config["kind"]](recipe.filters[0], recipe, model)(document), document

    return run


def test_every_kind_of_filter_has_a_factory():
    kinds = {one.__dataclass_fields__["kind"].type.__args__[0] for one in Filter.__args__}
    assert kinds == set(FILTERS)


@pytest.mark.parametrize(
    ("config", "bad", "reason"),
    [
        ({"kind": "length", "min_bytes": 10}, "short", "under 10 bytes"),
        ({"kind": "length", "max_bytes": 2000}, ENGLISH * 4, "over 2000 bytes"),
        ({"kind": "language", "keep": ["en"]}, GERMAN, "language de"),
        ({"kind": "gopher-repetition"}, "the same line again\n" * 50, "dup_line_frac"),
        ({"kind": "gopher-quality"}, "word " * 20, "gopher_short_doc"),
        ({"kind": "gopher-quality"}, "\u2022 one two three four five of the\n" * 20, "gopher_too_many_bullets"),
        ({"kind": "c4"}, ENGLISH + "Lorem ipsum dolor sit.", "lorem_ipsum"),
        ({"kind": "c4"}, ENGLISH + "int main(void) { return 0.", "curly_bracket"),
        ({"kind": "fineweb"}, "a list\nof short\nlines\nwithout\nends\n" * 5, "line_punct_ratio"),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else None,
)
def test_filters(apply, config, bad, reason):
    assert apply(ENGLISH, **config)[0] == ""
    assert apply(bad, **config)[0] == reason


def test_texts_without_words_are_dropped(apply):
    for kind in ("gopher-repetition", "gopher-quality", "fineweb", "c4"):
        assert apply("\u3000\n", kind=kind)[0] == "no words"


def test_repair_and_masking(apply):
    assert apply("schÃ¶n\x00 und gut", kind="repair")[1].text == "schön und gut"
    text = apply("Mail jane.doe@corp.example.net or ping 8.8.8.8 and 10.0.0.1.", kind="mask-pii")[1].text
    assert "jane" not in text
    assert "8.8.8.8" not in text
    assert "10.0.0.1" in text  # not public


def test_words_and_sentences():
    assert WORDS.word_tokenize("It's e-mail: --all (v1.2)!") == ["It's", "e-mail", ":", "--", "all", "(", "v1.2", ")!"]
    text = "One two. Three?! “Four.” Five"
    assert WORDS.sent_tokenize(text) == ["One two.", "Three?!", "“Four.”", "Five"]
    assert "".join(text[a:b] for a, b in WORDS.span_tokenize(text)) == text


def test_the_minimum_size_of_a_component_is_its_first_filter(make_recipe):
    recipe = make_recipe({"a": {"kind": "text", "paths": ["a"], "min_bytes": 9}}, filters=[{"kind": "mask-pii"}])
    filters = make_filters(recipe, "a", {})
    assert [name for name, _ in filters] == ["min_bytes", "0-mask-pii"]
    assert filters[0][1](Document("12345678", "x")) == "under 9 bytes"


def test_the_quality_filter_learns_from_its_positives_and_samples_by_pareto(tmp_path, apply):
    pytest.importorskip("sklearn")
    good = [f"{ENGLISH} number {i}" for i in range(60)]
    models = [tmp_path / "one.bin", tmp_path / "two.bin"]
    for model in models:
        train_classifier(good, [prose(i) for i in range(60)], model, seed=3)
    assert models[0].read_bytes() == models[1].read_bytes()
    score = load_classifier(models[0])
    assert score(ENGLISH) > 0.7 > 0.5 > score(prose(1000))
    config = {"kind": "quality", "positives": ["a"], "negatives": ["a"], "alpha": 3.0}
    kept = {
        text: sum(apply(text, model=models[0], name=f"{i}", **config)[0] == "" for i in range(300)) / 300
        for text in (ENGLISH, prose(1000))
    }
    for text, share in kept.items():  # a Pareto sample with alpha exceeds t with probability (1 + t)^-alpha
        assert share == pytest.approx((2 - score(text)) ** -3, abs=0.09)
    with pytest.raises(DataError, match="5 positives of at least 100 characters, 10 are required"):
        train_classifier(good[:5], good, tmp_path / "three.bin", seed=3)


@pytest.fixture
def evaluation(tmp_path):
    """An evaluation set of two examples: its path and texts."""
    path = Path(tmp_path / "set.jsonl")
    items = [prose(7, 40).replace("\n", " "), prose(8, 40).replace("\n", " ")]
    path.write_text("".join(f'{{"question": "{item[:60]}", "choices": ["{item[60:]}"]}}\n' for item in items))
    return path, items


@pytest.fixture
def clean(make_recipe, evaluation):
    """Return a function that decontaminates a text and returns reason and text."""

    def run(text, **fields):
        table = {"held": {"path": str(evaluation[0]), "text_keys": ["question", "choices"]}}
        config = {"kind": "decontaminate", "against": ["held"], **fields}
        recipe = make_recipe({"a": {"kind": "text", "paths": ["a"]}}, evaluation=table, filters=[config])
        document = Document(text, "x")
        return FILTERS["decontaminate"](recipe.filters[0], recipe, None)(document), document.text

    return run


def test_decontamination_cuts_the_overlap_with_a_margin(evaluation, clean):
    leak = " ".join(evaluation[1][0].split()[15:30]).upper()  # case and punctuation are ignored
    before, after = prose(1, 200), prose(2, 200)
    reason, text = clean(f"{before}{leak}\n{after}")
    assert reason == ""
    first, second = text.split("\n\n")
    assert before.startswith(first)
    assert len(before) - 210 < len(first) <= len(before) - 195
    assert after.rstrip().endswith(second)
    assert len(second) > len(after) - 210
    assert clean(f"{before}{leak}\n{after}", action="drop")[0] == "overlaps held"


def test_decontamination_leaves_other_text_unchanged(evaluation, clean):
    assert clean(prose(1)) == ("", prose(1))
    twelve = " ".join(evaluation[1][0].split()[15:27])
    assert clean(f"{prose(1)}{twelve} and no more")[0] == ""
    assert clean(evaluation[1][1]) == ("overlaps held, nothing left", "")
    many = "".join(prose(50 + i, 100) + " ".join(evaluation[1][i % 2].split()[15:30]) + "\n" for i in range(12))
    assert clean(many)[0] == "overlaps held in more than 10 places"


def test_an_evaluation_set_without_the_text_key_is_an_error(make_recipe, tmp_path):
    (tmp_path / "set.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    recipe = make_recipe(
        {"a": {"kind": "text", "paths": ["a"]}},
        evaluation={"held": {"path": str(tmp_path / "set.jsonl")}},
        filters=[{"kind": "decontaminate", "against": ["held"]}],
    )
    with pytest.raises(DataError, match=r"set.jsonl:2: expected a JSON object with text"):
        make_filters(recipe, "a", {})


def test_addresses_are_masked_at_any_position(apply):
    from datatrove.pipeline.formatters import PIIFormatter

    many = [f"{'x' * gap} (anna-{gap}@mail.example{gap}.net) " for gap in (0, 1, 100, 318, 319, 320, 321, 641, 5000)]
    text = "a@b " + "".join(many) + "3.4.5.6@ @x.y no@where " + "".join(many).replace("x", " ") + "last_one@a.org"
    masked = apply(text, kind="mask-pii")[1].text
    assert masked == PIIFormatter().format(text)
    assert "anna" not in masked
    assert apply("nothing here", kind="mask-pii")[1].text == "nothing here"


@pytest.mark.parametrize("run", ["a-", " ", ":a", "\n", "a.", '"'])
def test_long_runs_take_linear_time(apply, run):
    """A quadratic pattern takes over half a minute on these runs."""
    text, start = run * (80_000 // len(run)), time.process_time()
    for kind in ("mask-pii", "repair", "c4", "gopher-quality"):
        apply(text, kind=kind)
    for to_text in TO_TEXT.values():
        to_text(text)
    assert time.process_time() - start < 10
