# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: text survives encoding and decoding, text never becomes a special token, real vocabularies give known ids."""

import functools
import json
import pickle
import random
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
from small_tokenizers import END, llama_table, small_table, special

from mesh_transformer.data import file_tokenizer
from mesh_transformer.data.file_tokenizer import FileTokenizer
from mesh_transformer.data.stream_decoder import SpaceCleanUp, StreamDecoder, clean_up_spaces
from mesh_transformer.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_from_json
from mesh_transformer.data.vocabularies import TokenizerError

SHARED = Path(__file__).parents[2].parent / "shared"
REAL = [
    pytest.param(name, marks=pytest.mark.skipif(not folder.exists(), reason=f"{folder} does not exist"))
    for name in ("gpt2", "gpt-neox")
    for folder in [SHARED / "tokenizers" / name]
]
MIXED = (
    "naïve 中文 \U0001f600\U0001f469\u200d\U0001f680 e\u0301 \u0000\t\r\n  tabs\u2028and   spaces\n\n"
    + END
    + " don't 3.14"
)


@functools.cache
def load_real(name: str) -> Tokenizer:
    return load_tokenizer(SHARED / "tokenizers" / name)


def some_texts(count: int) -> list[str]:
    rng = random.Random(count)
    alphabet = [*map(chr, range(0xD800)), *map(chr, range(0xE000, 0x110000))]
    words = [" the", "the ", "\n", "  ", "\r\n", "don't", END, "\u0301", "é", "中", "\U0001f600", "1234", "\0"]
    texts = ["", " ", MIXED]
    for _ in range(count):
        texts.append("".join(rng.choice(rng.choice([words, alphabet])) for _ in range(rng.randrange(40))))
        texts.append(rng.randbytes(30).decode("utf-8", "replace"))
    return texts


ALL = ["bytes", "small", "llama", *REAL]


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made = {
        "bytes": ByteTokenizer,
        "small": lambda: FileTokenizer(small_table()),
        "llama": lambda: FileTokenizer(llama_table()),
    }
    return made[request.param]() if request.param in made else load_real(request.param)


@pytest.mark.parametrize("tokenizer", ALL, indirect=True)
def test_text_survives_encoding_and_never_becomes_special(tokenizer: Tokenizer) -> None:
    texts = some_texts(150)
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text)
        assert tokenizer.end_of_text not in ids
        assert ids.max(initial=0) < tokenizer.n_vocab
        composed = unicodedata.normalize("NFC", text)  # GPT-NeoX's vocabulary does so before encoding
        assert tokenizer.decode(ids) in (text, composed)
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("tokenizer", ALL, indirect=True)
def test_streamed_decoding_equals_decoding_at_once(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    chosen = [rng.choices(range(-2, tokenizer.n_vocab + 50), k=60) for _ in range(60)]  # mostly not UTF-8
    for ids in [*chosen, *map(tokenizer.encode, some_texts(40))]:
        stream, deltas, at = StreamDecoder(tokenizer), [], 0
        while at < len(ids):
            step = rng.randrange(4)
            deltas.append(stream.push(ids[at : at + step]))
            at += step
        assert "".join(deltas) + stream.finish() == tokenizer.decode(ids)
        rest = StreamDecoder(tokenizer, continues=True)
        assert rest.push(ids) + rest.finish() == tokenizer.decode_bytes(ids).decode(errors=tokenizer.utf8_errors)


@pytest.mark.parametrize("tokenizer", ALL, indirect=True)
def test_only_complete_characters_are_streamed(tokenizer: Tokenizer) -> None:
    text = "a中\U0001f600é"
    stream = StreamDecoder(tokenizer)
    deltas = [stream.push([token]) for token in tokenizer.encode(text)]
    assert len(deltas) > len(text)
    assert "\ufffd" not in "".join(deltas)
    assert "".join(deltas) == text
    assert stream.finish() == ""
    assert len(tokenizer.encode("\U00012000")) > 1
    stream.push(tokenizer.encode("\U00012000")[:-1])
    assert set(stream.finish()) == {"\ufffd"}


@pytest.mark.parametrize("tokenizer", ALL, indirect=True)
def test_ids_without_text(tokenizer: Tokenizer) -> None:
    letters = tokenizer.encode("hi")
    assert tokenizer.decode([*letters, tokenizer.end_of_text]) == "hi"
    assert tokenizer.decode([*letters, tokenizer.n_vocab, -1, 10**9]) == "hi\ufffd\ufffd\ufffd"
    assert tokenizer.decode(np.array(letters, np.int32)) == "hi"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("tokenizer", ALL, indirect=True)
def test_storage_in_a_checkpoint(tokenizer: Tokenizer) -> None:
    copied = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert copied.fingerprint == tokenizer.fingerprint
    assert (copied.n_vocab, copied.end_of_text) == (tokenizer.n_vocab, tokenizer.end_of_text)
    assert copied.encode(MIXED) == tokenizer.encode(MIXED)
    assert copied.decode(copied.encode(MIXED)) == tokenizer.decode(tokenizer.encode(MIXED))


@pytest.mark.parametrize("tokenizer", ["bytes", "small", "llama"], indirect=True)
def test_other_processes_get_an_equal_tokenizer(tokenizer: Tokenizer) -> None:
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert sent.encode(MIXED) == tokenizer.encode(MIXED)
    assert sent.fingerprint == tokenizer.fingerprint


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_unpickling_repeatedly_does_not_leak_memory() -> None:
    """Every new `tokenizers` object that encodes these words leaks 5 MB."""

    program = """
import json, pickle, sys
from pathlib import Path
from mesh_transformer.data.tokenizers import FileTokenizer
def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
sent = pickle.dumps(FileTokenizer(json.load(sys.stdin)))
texts = [" ".join(f"word{i}" for i in range(part, 40_000, 8)) for part in range(8)]
for _ in range(2):
    pickle.loads(sent).encode_batch(texts)
before = resident_mb()
for _ in range(16):
    pickle.loads(sent).encode_batch(texts)
print(resident_mb() - before)
"""  # in a separate process: the memory of the test process varies by 10 MB
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=json.dumps(small_table()), capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40, "16 objects would leak 80 MB"


@pytest.mark.parametrize("tokenizer", ALL, indirect=True)
def test_lone_surrogates_are_errors(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["good", text])):
        with pytest.raises(TokenizerError, match=r"lone surrogate U\+D83D at character 2"):
            encode("ab\ud83d")


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.encode("Aé") == [65, 0xC3, 0xA9]
    data = random.Random(0).randbytes(1000)
    assert tokenizer.decode_bytes(data) == data
    assert tokenizer.decode(data) == data.decode(errors="replace")
    # Caches of token shards and checkpoints are identified by it.
    assert tokenizer.fingerprint == "44db160ef62b8e6f59897f101a9b0bf327ce5cb8019ee9eedb5deb9a36e35945"


@pytest.mark.skipif(not (SHARED / "tokenizers").exists(), reason="shared/tokenizers does not exist")
def test_real_vocabularies_give_known_ids() -> None:
    gpt2, neox = load_real("gpt2"), load_real("gpt-neox")
    assert (gpt2.n_vocab, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" the\n\n") == [262, 628]
    assert gpt2.encode(END) == [27, 91, 437, 1659, 5239, 91, 29]
    assert (neox.n_vocab, neox.end_of_text) == (
        50278,
        0,
    )  # this file has a [PAD] at 50277 after the 50277 trained tokens
    assert neox.encode("Hello world") == [12092, 1533]
    assert neox.encode("def f():\n    return 1")[4] == 50274  # four spaces are one token
    assert gpt2.fingerprint == "6fdb36add83a89774f0ab7d71477b2ca5c56a7465c3e37379f36fcb37b1ec74e"
    assert len({gpt2.fingerprint, neox.fingerprint, ByteTokenizer().fingerprint}) == 3


@pytest.mark.parametrize("name", REAL)
def test_ids_are_those_of_the_tokenizers_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for long texts, which FileTokenizer encodes in parts and `tokenizers` at once."""
    folder = SHARED / "tokenizers" / name
    if name == "gpt2":
        model = hf.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        library = hf.Tokenizer(model)
        library.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        library = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_real(name)
    text = (SHARED / "data" / "wikitext2_test.txt").read_text(encoding="utf-8")[:150_000] + (MIXED * 20).replace(
        END, ""
    )
    expected = library.encode(text).ids
    assert tokenizer.encode(text) == expected
    monkeypatch.setattr(file_tokenizer, "_PART", 300)
    monkeypatch.setattr(tokenizer, "_part", 30)
    assert len(list(file_tokenizer._split_text(text, 30))) > 2000
    assert tokenizer.encode(text) == expected
    texts = [text[i : i + 1000] for i in range(0, 30_000, 1000)]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [library.encode(part).ids for part in texts]


def test_long_texts_are_split_only_if_that_does_not_change_the_ids() -> None:
    level = small_table()["pre_tokenizer"]
    unsplittable = [
        llama_table(),
        small_table(pre_tokenizer=dict(level, add_prefix_space=True)),
        small_table(pre_tokenizer=dict(level, use_regex=False)),
        small_table(normalizer={"type": "Lowercase"}),
        small_table(added_tokens=[special(259, END), special(260, "a b", special=False)]),
    ]
    assert FileTokenizer(small_table())._part
    assert [FileTokenizer(table)._part for table in unsplittable] == [None] * 5
    tokenizer, text = FileTokenizer(small_table()), "the the " * 150_000
    assert len(list(file_tokenizer._split_text(text, tokenizer._part))) == 2
    assert tokenizer.encode(text) == [257, *[258] * 299_999, tokenizer.encode(" ")[0]]


def test_truncation_padding_and_dropout_are_ignored() -> None:
    """A file may truncate, pad, prefix or randomly vary its ids; training text is encoded unchanged."""
    plain = FileTokenizer(small_table())
    table = small_table(
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
        },
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {END: {"id": END, "ids": [259], "tokens": [END]}},
        },
    )  # fmt: skip
    table["model"]["dropout"] = 0.9
    library = hf.Tokenizer.from_str(json.dumps(table))
    text = "the quick brown fox and the other one"
    assert library.encode(text).ids[:1] == [259]
    assert FileTokenizer(table).encode(text) == plain.encode(text)
    assert len(plain.encode(text)) > 4


@pytest.mark.parametrize("change", [{"special": False}, {"special": False, "normalized": True}])
def test_end_of_text_is_special_even_if_the_file_says_otherwise(change: dict[str, Any]) -> None:
    table = small_table(added_tokens=[special(259, END, **change)])
    assert 259 in hf.Tokenizer.from_str(json.dumps(table)).encode(f"a{END}b").ids
    tokenizer = FileTokenizer(table)
    assert 259 not in tokenizer.encode(f"a{END}b")
    assert tokenizer.decode([259]) == ""


def test_byte_fallback_decodes_like_the_tokenizers_package() -> None:
    tokenizer, library = FileTokenizer(llama_table()), hf.Tokenizer.from_str(json.dumps(llama_table()))
    ids = tokenizer.encode("hi hi é")
    assert ids == library.encode("hi hi é", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == library.decode(ids) == "hi hi é"
    assert tokenizer.end_of_text == 2
    stream = StreamDecoder(tokenizer, continues=True)
    assert stream.push(tokenizer.encode("hi")) == " hi"


def test_files_and_folders(tmp_path: Path) -> None:
    table = small_table()
    (tmp_path / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    (tmp_path / "my.json").write_text(json.dumps(table, indent=2), encoding="utf-8")
    loaded = [load_tokenizer(tmp_path), load_tokenizer(str(tmp_path / "my.json")), FileTokenizer(table)]
    assert len({tokenizer.fingerprint for tokenizer in loaded}) == 1
    (tmp_path / "two").mkdir()
    vocabulary = dict(table["model"]["vocab"]) | {END: 259}
    (tmp_path / "two" / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "#version: 0.2\r\n" + "\r\n".join(table["model"]["merges"]) + "\r\n"
    (tmp_path / "two" / "merges.txt").write_text(merges, encoding="utf-8")
    two = load_tokenizer(tmp_path / "two")
    assert two.encode(MIXED) == loaded[0].encode(MIXED)
    assert two.end_of_text == 259


def bos_processor(*before: str) -> dict[str, Any]:
    """Return the post-processor that puts tokens of llama_table before a text."""
    ids = {"<s>": 1, "</s>": 2}
    before_text: list[Any] = [{"SpecialToken": {"id": name, "type_id": 0}} for name in before]
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": [*before_text, *text],
        "pair": [*text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in ids},
    }


def test_special_tokens_are_added_and_parsed_on_request() -> None:
    table = llama_table() | {"post_processor": bos_processor("<s>")}
    tokenizer, library = FileTokenizer(table), hf.Tokenizer.from_str(json.dumps(table))
    assert (tokenizer.begin_of_text, FileTokenizer(llama_table()).begin_of_text) == (1, None)
    for text in ("", "hi", "hi</s> hi <s>", " "):
        plain = tokenizer.encode(text)
        assert tokenizer.encode(text, add_special_tokens=True) == [1, *plain]
        assert tokenizer.encode(text, parse_special=True) == library.encode(text, add_special_tokens=False).ids
        both = tokenizer.encode(text, add_special_tokens=True, parse_special=True)
        assert both == library.encode(text).ids
        assert 2 not in plain
    assert tokenizer.encode("hi</s>", parse_special=True)[-1] == 2
    assert tokenizer_from_json(tokenizer.to_json()).begin_of_text == 1
    two = FileTokenizer(llama_table() | {"post_processor": bos_processor("<s>", "</s>")})
    assert two.encode("hi", add_special_tokens=True) == [1, 2, *two.encode("hi")]
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode("ab\ud83d", parse_special=True)


def test_the_end_of_text_is_the_one_that_the_files_name(tmp_path: Path) -> None:
    table = llama_table()
    table["added_tokens"].append(special(len(table["model"]["vocab"]), END))
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    assert load_tokenizer(tmp_path).end_of_text == 264  # by name, as no file says anything
    plain = load_tokenizer(tmp_path).fingerprint
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 264]}))
    by_id = load_tokenizer(tmp_path)
    assert by_id.end_of_text == 2
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    assert load_tokenizer(tmp_path).end_of_text == 1
    for name in ({"content": "</s>", "__type": "AddedToken"}, "</s>"):
        settings = {"eos_token": name, "added_tokens_decoder": {}}  # special_tokens_map.json is then not read
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert load_tokenizer(tmp_path).end_of_text == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {}}))
    assert load_tokenizer(tmp_path).end_of_text == 2  # of config.json
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(settings, eos_token="<new>")))
    assert load_tokenizer(tmp_path).end_of_text == 265  # added, as by transformers
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(settings, eos_token=END)))
    assert load_tokenizer(tmp_path).fingerprint == plain  # the files say nothing new
    copied = tokenizer_from_json(json.loads(json.dumps(by_id.to_json())))
    assert (copied.end_of_text, copied.fingerprint) == (2, by_id.fingerprint)
    assert pickle.loads(pickle.dumps(by_id)).end_of_text == 2
    assert by_id.fingerprint != plain


def without(*tokens: str) -> dict[str, Any]:
    table = small_table()
    for token in tokens:
        del table["model"]["vocab"][token]
    return table


ERRORS = {
    "this tokenizer has no end-of-text token": small_table(added_tokens=[special(259, "[PAD]")]),
    "no end-of-text token; set eos_token in the tokenizer_config.json": small_table(
        added_tokens=[], model=dict(small_table()["model"], vocab=small_table()["model"]["vocab"] | {"</s>": 259})
    ),
    "model.vocab is missing or empty": {"version": "1.0"},
    "end_of_word_suffix='</w>' is not supported": small_table(
        model=dict(small_table()["model"], end_of_word_suffix="</w>")
    ),
    "not a usable tokenizer.json": small_table(pre_tokenizer={"type": "Unheard"}),
    "would be encoded as the special token": small_table(
        added_tokens=[special(257, "the")], pre_tokenizer=None, normalizer={"type": "ByteLevel"}
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_unusable_vocabularies(tmp_path: Path, message: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(ERRORS[message]))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "the"}' if "special token" in message else "{}")
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


LOSSY = {
    "lacks 1 of the 243 byte values": without("A"),
    "has no byte tokens: text that it lacks is dropped": small_table(
        pre_tokenizer={"type": "Whitespace"}, decoder=None
    ),
    "does not preserve all text": small_table(
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": ""}
    ),
}


@pytest.mark.parametrize("loss", LOSSY)
def test_vocabularies_that_lose_text_say_so(loss: str) -> None:
    tokenizer = FileTokenizer(LOSSY[loss])
    assert tokenizer.lossy
    assert loss in (tokenizer.loss or "")
    assert not FileTokenizer(small_table()).lossy
    assert FileTokenizer(small_table()).loss is None


def test_lost_characters_are_counted() -> None:
    tokenizer = FileTokenizer(without("A"))
    text = "A tale of AA"
    assert tokenizer.count_lost(text, np.array(tokenizer.encode(text))) == 3
    assert tokenizer.decode(tokenizer.encode(text)) == " tale of "
    words = FileTokenizer(word_pieces())
    for text, lost in {"the thing": 0, "the \u4e2d\u6587 thing": 2, "zebra the": 5, "": 0}.items():
        assert words.count_lost(text, np.array(words.encode(text))) == lost
    whole = FileTokenizer(small_table())
    assert whole.count_lost("A\u4e2d", np.array(whole.encode("A\u4e2d"))) == 0


def word_pieces() -> dict[str, Any]:
    """Return a tokenizer.json like BERT's."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "th", "##ing", "##e", ".", "'", "n", "t", "do"]
    return {
        "version": "1.0",
        "added_tokens": [special(i, token) for i, token in enumerate(tokens[:4])],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
            "strip_accents": None, "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": {token: i for i, token in enumerate(tokens)},
        },
    }  # fmt: skip


def pieces() -> dict[str, Any]:
    """Return a tokenizer.json like T5's: pieces with scores, no bytes."""
    scores = {
        "<pad>": 0.0,
        "</s>": 0.0,
        "<unk>": 0.0,
        "\u2581": -2.0,
        "\u2581the": -3.0,
        "th": -4.0,
        "ing": -4.5,
        ".": -5.0,
    }
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    return {
        "version": "1.0",
        "added_tokens": [special(i, token) for i, token in enumerate(list(scores)[:3])],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        "post_processor": bos_processor()
        | {
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "byte_fallback": False,
            "vocab": [list(pair) for pair in scores.items()],
        },
    }


@pytest.mark.parametrize("table", [word_pieces(), pieces()], ids=["WordPiece", "Unigram"])
def test_vocabularies_without_bytes(table: dict[str, Any]) -> None:
    tokenizer, library = FileTokenizer(table), hf.Tokenizer.from_str(json.dumps(table))
    rng = random.Random(0)
    for text in ["the thing.", "the", " thing", "", "the \u4e2d. thing thing", "\nthe\tthing "]:
        ids = library.encode(text).ids
        assert tokenizer.encode(text, add_special_tokens=True) == ids
        for chosen in (ids, [rng.randrange(tokenizer.n_vocab) for _ in range(12)]):
            for skip in (False, True):
                assert tokenizer.decode(chosen, skip_special_tokens=skip) == library.decode(
                    chosen, skip_special_tokens=skip
                )
                stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
                parts = [stream.push([token]) for token in chosen]
                assert "".join(parts) + stream.finish() == library.decode(chosen, skip_special_tokens=skip)
    assert tokenizer.lossy
    assert tokenizer.end_of_text == library.encode("the").ids[-1]


def test_special_tokens_in_pieces_stay_text() -> None:
    table = pieces()
    library = hf.Tokenizer.from_str(json.dumps(table))
    library.encode_special_tokens = True
    assert 1 in library.encode("th</s>", add_special_tokens=False).ids  # as a piece of the vocabulary
    tokenizer = FileTokenizer(table)
    assert tokenizer.encode("th</s>") == tokenizer.encode("th\u00e9")
    assert tokenizer.encode("th</s>", parse_special=True)[-1] == 1
    assert tokenizer.decode(tokenizer.encode("the th. ing"), skip_special_tokens=False) == "the th. ing"


def test_names_with_noncharacters_do_not_become_special() -> None:
    tokenizer = FileTokenizer(pieces())
    for noncharacters in ("\ufdd0", "\ufdd0\ufdef", "\uffff"):
        assert 1 not in tokenizer.encode(f"th{noncharacters}</s>")


def test_errors_of_the_library_give_a_reason() -> None:
    tokenizer = FileTokenizer(word_pieces())
    assert tokenizer.encode_pair("the", "thing") == ([2, 4, 3, 5, 6, 3], [0, 0, 0, 1, 1, 1])
    for pair in (("a\ud800", "b"), ("a", "b\ud800")):
        with pytest.raises(TokenizerError, match=r"lone surrogate U\+D800 at character 1"):
            tokenizer.encode_pair(*pair)
    table = pieces()
    table["model"]["unk_id"] = None  # the library then fails at unknown characters
    with pytest.raises(TokenizerError, match=r"the vocabulary cannot encode a text: .*use another tokenizer"):
        FileTokenizer(table)


def test_spaces_are_cleaned_up_as_by_transformers() -> None:
    tokenizer = FileTokenizer(word_pieces(), {"clean_up_tokenization_spaces": True})
    assert tokenizer.decode([12, 10, 9, 11, 8]) == "don't."
    rng = random.Random(3)
    for _ in range(3000):
        text = "".join(rng.choices(" .'nmtsvre?x", weights=[4, 1, 3, 2, 1, 2, 1, 1, 1, 1, 1, 2], k=rng.randrange(30)))
        cleaner, parts, at = SpaceCleanUp(), [], 0
        while at < len(text):
            step = rng.randrange(1, 5)
            parts.append(cleaner.push(text[at : at + step]))
            at += step
        assert "".join(parts) + cleaner.finish() == clean_up_spaces(text)


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="did you mean bytes"):
        load_tokenizer("byte")
    with pytest.raises(TokenizerError, match=r"has no tokenizer; add tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(small_table()["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e x\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt:3: got 'th e x', expected two tokens"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("t h\n")
    with pytest.raises(TokenizerError, match="no end-of-text token"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(small_table()["model"]["vocab"] | {END: 259}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nx yz\n")
    with pytest.raises(TokenizerError, match=r"not a usable.*yz"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not valid JSON.*copy it again"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenzier\.json: no such.*did you mean .*tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenzier.json")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\xff")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: not valid JSON.*give a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(TokenizerError, match='checkpoint: the stored tokenizer has type "words"'):
        tokenizer_from_json({"type": "words"})


def test_training_a_tokenizer(load_script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("train_tokenizer")
    for i in range(120):
        (tmp_path / f"{i}.txt").write_text(f"The number {i} is followed by the number {i + 1}. {END}\n" * 5)
    (tmp_path / "bad.jsonl").write_text("[]\n")
    written = tmp_path / "out" / "tokenizer.json"
    arguments = [str(tmp_path), str(tmp_path / "out"), "--vocab-size", "300"]
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: got a list"):
        script.main(arguments)
    assert not written.exists()
    assert script.main([*arguments, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert "300 tokens from" in captured.out
    assert "held-out documents" in captured.out
    assert "skipped 1 documents (not an object)" in captured.err
    assert [file.name for file in written.parent.iterdir()] == ["tokenizer.json"]
    tokenizer = load_tokenizer(tmp_path / "out")
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (300, 0)
    text = f"The number 7 is 中 {END}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" number")) == 1

    first = written.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    written.rename(tmp_path / "first.json")
    (tmp_path / "bad.jsonl").unlink()
    (tmp_path / "first.json").rename(tmp_path.parent / "first.json")
    assert script.main([*arguments, "--overwrite"]) == 0
    assert written.read_bytes() == first


@pytest.mark.parametrize("size", ["256", "many"])
def test_wrong_vocabulary_sizes(
    load_script: Any, tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        load_script("train_tokenizer").main([str(tmp_path), str(tmp_path / "out"), "--vocab-size", size])
    assert "--vocab-size" in capsys.readouterr().err


def test_help_shows_two_examples(load_script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        load_script("train_tokenizer").main(["--help"])
    assert capsys.readouterr().out.count("  python scripts/train_tokenizer.py") == 2
