# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Text comes back from its ids, whole or bit by bit; special tokens cannot be written; real vocabularies give known ids."""

import copy
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

from mesh_transformer.data import tokenizers
from mesh_transformer.data.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    StreamDecoder,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    tokenizer_from_json,
)
from mesh_transformer.data.vocabularies import make_byte_alphabet

SHARED = Path(__file__).parents[2].parent / "shared"
REAL = [
    pytest.param(name, marks=pytest.mark.skipif(not folder.exists(), reason=f"{folder} is not there"))
    for name in ("gpt2", "gpt-neox")
    for folder in [SHARED / "tokenizers" / name]
]
END = "<|endoftext|>"
MIXED = (
    "naïve 中文 \U0001f600\U0001f469\u200d\U0001f680 e\u0301 \u0000\t\r\n  tabs\u2028and   spaces\n\n"
    + END
    + " don't 3.14"
)


def special(index: int, content: str, **changes: Any) -> dict[str, Any]:
    fixed = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return dict(fixed, id=index, content=content) | changes


def small_table(**changes: Any) -> dict[str, Any]:
    """Bytes, "th", "the", " the" and the end of text, as a tokenizer.json."""
    tokens = [*sorted(make_byte_alphabet()), "th", "the", "\u0120the"]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    table = {
        "version": "1.0",
        "added_tokens": [special(len(tokens), END)],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": ["t h", "th e", "\u0120 the"],
        },
    }
    return copy.deepcopy(table) | changes


def llama_table() -> dict[str, Any]:
    """A vocabulary with byte fallback and a space before the first word, as converted from SentencePiece."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "h", "i", "hi", "\u2581hi"]
    return {
        "version": "1.0",
        "added_tokens": [special(i, token) for i, token in enumerate(tokens[:3])],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": ["h i", "\u2581 hi"],
        },
    }


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
def test_text_comes_back_and_never_becomes_special(tokenizer: Tokenizer) -> None:
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
def test_streamed_is_decoded_at_once(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    chosen = [rng.choices(range(-2, tokenizer.n_vocab + 50), k=60) for _ in range(60)]  # mostly not UTF-8
    for ids in [*chosen, *map(tokenizer.encode, some_texts(40))]:
        stream, pieces, at = StreamDecoder(tokenizer), [], 0
        while at < len(ids):
            step = rng.randrange(4)
            pieces.append(stream.push(ids[at : at + step]))
            at += step
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
        rest = StreamDecoder(tokenizer, continues=True)
        assert (rest.push(ids) + rest.finish()).encode() == tokenizer.decode_bytes(ids).decode(
            errors="replace"
        ).encode()


@pytest.mark.parametrize("tokenizer", ALL, indirect=True)
def test_characters_stream_only_whole(tokenizer: Tokenizer) -> None:
    text = "a中\U0001f600é"
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push([token]) for token in tokenizer.encode(text)]
    assert len(pieces) > len(text)
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert stream.finish() == ""
    assert len(tokenizer.encode("\U00012000")) > 1
    stream.push(tokenizer.encode("\U00012000")[:-1])
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("tokenizer", ALL, indirect=True)
def test_ids_without_text(tokenizer: Tokenizer) -> None:
    letters = tokenizer.encode("hi")
    assert tokenizer.decode([*letters, tokenizer.end_of_text]) == "hi"
    assert tokenizer.decode([*letters, tokenizer.n_vocab, -1, 10**9]) == "hi\ufffd\ufffd\ufffd"
    assert tokenizer.decode(np.array(letters, np.int32)) == "hi"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("tokenizer", ALL, indirect=True)
def test_a_checkpoint_carries_it(tokenizer: Tokenizer) -> None:
    copied = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert copied.fingerprint == tokenizer.fingerprint
    assert (copied.n_vocab, copied.end_of_text) == (tokenizer.n_vocab, tokenizer.end_of_text)
    assert copied.encode(MIXED) == tokenizer.encode(MIXED)
    assert copied.decode(copied.encode(MIXED)) == tokenizer.decode(tokenizer.encode(MIXED))


@pytest.mark.parametrize("tokenizer", ["bytes", "small", "llama"], indirect=True)
def test_other_processes_get_the_same_rules(tokenizer: Tokenizer) -> None:
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert sent.encode(MIXED) == tokenizer.encode(MIXED)
    assert sent.fingerprint == tokenizer.fingerprint


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_a_process_that_gets_one_for_every_part_does_not_grow() -> None:
    """The library keeps 5 MB of each of its objects that encoded these words."""

    program = """
import json, pickle, sys
from pathlib import Path
from mesh_transformer.data.tokenizers import FileTokenizer
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
sent = pickle.dumps(FileTokenizer(json.load(sys.stdin)))
texts = [" ".join(f"word{i}" for i in range(part, 40_000, 8)) for part in range(8)]
for _ in range(2):
    pickle.loads(sent).encode_batch(texts)
before = held()
for _ in range(6):
    pickle.loads(sent).encode_batch(texts)
print(held() - before)
"""  # in a process of its own: what else one of tests holds moves by ten
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=json.dumps(small_table()), capture_output=True, text=True, check=True)
    assert float(done.stdout) < 8


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
    # Caches of token shards and checkpoints are known by it.
    assert tokenizer.fingerprint == "44db160ef62b8e6f59897f101a9b0bf327ce5cb8019ee9eedb5deb9a36e35945"


@pytest.mark.skipif(not (SHARED / "tokenizers").exists(), reason="shared/tokenizers is not there")
def test_real_vocabularies_give_known_ids() -> None:
    gpt2, neox = load_real("gpt2"), load_real("gpt-neox")
    assert (gpt2.n_vocab, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" the\n\n") == [262, 628]
    assert gpt2.encode(END) == [27, 91, 437, 1659, 5239, 91, 29]
    assert (neox.n_vocab, neox.end_of_text) == (
        50278,
        0,
    )  # this file has a [PAD] at 50277 behind the 50277 trained ones
    assert neox.encode("Hello world") == [12092, 1533]
    assert neox.encode("def f():\n    return 1")[4] == 50274  # four spaces are one token
    assert gpt2.fingerprint == "6fdb36add83a89774f0ab7d71477b2ca5c56a7465c3e37379f36fcb37b1ec74e"
    assert len({gpt2.fingerprint, neox.fingerprint, ByteTokenizer().fingerprint}) == 3


@pytest.mark.parametrize("name", REAL)
def test_ids_are_the_library_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of long texts, which we encode in parts and the library at once."""
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
    monkeypatch.setattr(tokenizers, "_PART", 300)
    monkeypatch.setattr(tokenizer, "_part", 30)
    assert len(list(tokenizers._split_text(text, 30))) > 2000
    assert tokenizer.encode(text) == expected
    texts = [text[i : i + 1000] for i in range(0, 30_000, 1000)]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [library.encode(part).ids for part in texts]


def test_parts_only_where_they_change_nothing() -> None:
    level = small_table()["pre_tokenizer"]
    whole = [
        llama_table(),
        small_table(pre_tokenizer=dict(level, add_prefix_space=True)),
        small_table(pre_tokenizer=dict(level, use_regex=False)),
        small_table(normalizer={"type": "Lowercase"}),
        small_table(added_tokens=[special(259, END), special(260, "a b", special=False)]),
    ]
    assert FileTokenizer(small_table())._part
    assert [FileTokenizer(table)._part for table in whole] == [None] * 5
    tokenizer, text = FileTokenizer(small_table()), "the the " * 150_000
    assert len(list(tokenizers._split_text(text, tokenizer._part))) == 2
    assert tokenizer.encode(text) == [257, *[258] * 299_999, tokenizer.encode(" ")[0]]


def test_settings_in_the_file_change_no_ids() -> None:
    """Files may cut, fill, begin or randomly vary what they encode; training text is taken as it is."""
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


def test_byte_fallback_decodes_as_the_library_does() -> None:
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


def without(*tokens: str) -> dict[str, Any]:
    table = small_table()
    for token in tokens:
        del table["model"]["vocab"][token]
    return table


ERRORS = {
    "no token ends a document": small_table(added_tokens=[special(259, "[SEP]")]),
    "no token ends a document; add one of": small_table(
        added_tokens=[], model=dict(small_table()["model"], vocab=small_table()["model"]["vocab"] | {"</s>": 259})
    ),
    "1 bytes are not in the vocabulary": without("A"),
    "no vocabulary in it": {"version": "1.0"},
    "neither byte-level nor with byte fallback": small_table(pre_tokenizer={"type": "Whitespace"}, decoder=None),
    "neither byte-level nor": small_table(pre_tokenizer=None),
    "alters texts": small_table(normalizer={"type": "Replace", "pattern": {"String": " "}, "content": ""}),
    "marks at the parts of words": small_table(model=dict(small_table()["model"], end_of_word_suffix="</w>")),
    "not a usable tokenizer.json": small_table(pre_tokenizer={"type": "Unheard"}),
    "would end the document": small_table(
        added_tokens=[],
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        model=dict(small_table()["model"], vocab=small_table()["model"]["vocab"] | {END: 259}, ignore_merges=True),
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_unusable_vocabularies(tmp_path: Path, message: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(ERRORS[message]))
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="did you mean bytes"):
        load_tokenizer("byte")
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor vocab"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(small_table()["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e x\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt:3: two tokens"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nx yz\n")
    with pytest.raises(TokenizerError, match=r"not a usable.*yz"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("t h\n")
    with pytest.raises(TokenizerError, match="no token ends a document"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not valid JSON.*copy it again"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokeniser\.json: no such.*did you mean .*tokenizer\.json"):
        load_tokenizer(tmp_path / "tokeniser.json")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\xff")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: not valid JSON.*give a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(TokenizerError, match="checkpoint: not the record of a tokenizer"):
        tokenizer_from_json({"type": "words"})


def test_training_one(load_script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("train_tokenizer")
    for i in range(120):
        (tmp_path / f"{i}.txt").write_text(f"The number {i} is followed by the number {i + 1}. {END}\n" * 5)
    (tmp_path / "bad.jsonl").write_text("[]\n")
    written = tmp_path / "out" / "tokenizer.json"
    arguments = [str(tmp_path), str(tmp_path / "out"), "--vocab-size", "300"]
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: a list"):
        script.main(arguments)
    assert not written.exists()
    assert script.main([*arguments, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert "300 tokens from" in captured.out
    assert "held-out documents" in captured.out
    assert "left out 1 (not an object)" in captured.err
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
