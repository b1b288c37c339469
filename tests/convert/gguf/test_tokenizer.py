# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers in GGUF metadata: written and read back they give the same ids, special tokens and chat template."""

import json

import pytest
import tokenizers
from gguf import TokenType
from small_tokenizers import END, llama_table, small_table, special

from mesh_transformer.convert.gguf.pre_tokenizers import PRE_TOKENIZERS, name_pre_tokenizer
from mesh_transformer.convert.gguf.tokenizer import derive_merges, read_tokenizer, read_vocabulary
from mesh_transformer.convert.gguf.tokenizer_writer import write_tokenizer
from mesh_transformer.data.tokenizers import ByteTokenizer, tokenizer_from_json
from mesh_transformer.storage.errors import CheckpointError

TEXTS = ["the other  the\n\nhi", " 3 45 6\t'll don't", "\u4e2d\u6587 \U0001f600 \u00e9", "<0x41></s>", "  hi  hi"]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def make_meta(table, **ids):
    carried = {"tokenizer_config.json": json.dumps({"chat_template": TEMPLATE})}
    return {"tokenizer": {"type": "file", "tokenizer": table}, "special_ids": ids, "carried": carried}


def write(meta, n_vocab, architecture="llama"):
    return {"general.architecture": architecture} | write_tokenizer(meta, n_vocab)


@pytest.mark.parametrize("make", [small_table, llama_table], ids=["byte-level", "sentencepiece"])
def test_ids_after_a_round_trip(make):
    table = make()
    end = {token["content"]: token["id"] for token in table["added_tokens"]}.get(END, 2)
    meta = make_meta(table, eos_token_id=end)
    before = tokenizer_from_json(meta["tokenizer"])
    values = write(meta, before.n_vocab + 3)
    assert values["tokenizer.ggml.tokens"][-1] == f"[PAD{before.n_vocab + 2}]"
    assert len(values["tokenizer.ggml.token_type"]) == before.n_vocab + 3
    after = read_tokenizer(values, "m")
    tokenizer = tokenizer_from_json(after["tokenizer"])
    assert tokenizer.n_vocab == before.n_vocab
    for text in TEXTS:
        assert tokenizer.encode(text) == before.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == before.decode(before.encode(text))
    assert after["special_ids"] == {"eos_token_id": end}
    assert json.loads(after["carried"]["tokenizer_config.json"])["chat_template"] == TEMPLATE
    assert write(after, before.n_vocab + 3) == values


def test_bytes():
    meta = {"tokenizer": ByteTokenizer().to_json()}
    after = tokenizer_from_json(read_tokenizer(write(meta, 257), "m")["tokenizer"])
    for text in TEXTS:
        assert after.encode(text) == ByteTokenizer().encode(text)
    assert after.end_of_text == 256


def test_without_a_tokenizer():
    assert write_tokenizer({}, 10) == {"tokenizer.ggml.model": "no_vocab"}
    assert read_tokenizer({"tokenizer.ggml.model": "no_vocab"}, "m") == {}


def test_first_token_and_several_ends():
    table = llama_table()
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    ids = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    table["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, pieces[1]],
        "special_tokens": ids,
    }
    meta = make_meta(table, eos_token_id=[2, 0])
    values = write(meta, 267)
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.bos_token_id"] == 1
    assert values["tokenizer.ggml.eot_token_id"] == 0
    after = read_tokenizer(values, "m")
    tokenizer = tokenizer_from_json(after["tokenizer"])
    assert tokenizer.encode("hi", add_special_tokens=True)[0] == 1
    assert json.loads(after["carried"]["generation_config.json"])["eos_token_id"] == [2, 0]


def test_an_end_without_a_beginning_is_added_after_the_text():
    values = write(make_meta(llama_table(), eos_token_id=2), 267)
    values |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    values.pop("tokenizer.ggml.bos_token_id", None)
    tokenizer = tokenizer_from_json(read_tokenizer(values, "m")["tokenizer"])
    assert tokenizer.encode("hi", add_special_tokens=True) == [*tokenizer.encode("hi"), 2]


def test_merges_that_sentencepiece_would_not_make_are_refused():
    table = llama_table()
    table["model"]["merges"] = ["\u2581 hi"]  # without "h i", which the vocabulary implies
    with pytest.raises(CheckpointError, match=r"1 merges of this tokenizer are not those .* for example h \+ i"):
        write_tokenizer(make_meta(table), 300)


def test_merges_are_ordered_by_score():
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = derive_merges(list(vocabulary), vocabulary, [0, 0, 0, -2.0, -1.0, -3.0])
    assert merges == [["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]


def test_unused_rows_are_no_tokens():
    metadata = {
        "tokenizer.ggml.tokens": ["a", "[PAD1]", "b", "[PAD3]"],
        "tokenizer.ggml.token_type": [TokenType.NORMAL, TokenType.UNUSED, TokenType.NORMAL, TokenType.UNUSED],
    }
    assert read_vocabulary(metadata, "m")[0] == ["a", "[PAD1]", "b"]


def test_tokenizers_that_are_not_supported():
    with pytest.raises(
        CheckpointError,
        match=r"tokenizer\.ggml\.model = 'rwkv' is not supported; .*convert the model's Hugging Face folder",
    ):
        read_tokenizer({"tokenizer.ggml.model": "rwkv"}, "m")
    values = write(make_meta(small_table()), 300) | {"tokenizer.ggml.pre": "superbpe"}
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre = 'superbpe' is not supported; supported: gpt-2"):
        read_tokenizer(values, "m")
    table = small_table(pre_tokenizer={"type": "Whitespace"})
    assert name_pre_tokenizer(table) is None


def test_every_pre_tokenizer_is_named():
    for name, before in PRE_TOKENIZERS.items():
        table = small_table(pre_tokenizer=before.table, normalizer={"type": "NFC"} if before.nfc else None)
        table["model"]["ignore_merges"] = before.ignore_merges
        found = name_pre_tokenizer(table)
        assert found is not None
        assert PRE_TOKENIZERS[found]._replace(adds_bos=False) == before._replace(adds_bos=False), name
        vocabulary = tokenizer_from_json({"type": "file", "tokenizer": table})
        assert vocabulary.decode(vocabulary.encode(TEXTS[1])) == TEXTS[1]


def test_pre_tokenizers_differ():
    text = "It's 12345 HelloWorld'S\n\n x\u4e2d\u6587a"
    words = {}
    for name in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "deepseek-v3"):
        library = tokenizers.Tokenizer.from_str(json.dumps(small_table(pre_tokenizer=PRE_TOKENIZERS[name].table)))
        words[name] = tuple(word for word, _ in library.pre_tokenizer.pre_tokenize_str(text))
    assert len(set(words.values())) == len(words)
    assert "\u012012345" in words["gpt-2"]
    assert {"1", "5"} <= set(words["smollm"])
    assert "123" in words["llama-bpe"]


def test_user_defined_tokens_stay_text():
    table = small_table()
    table["added_tokens"].append(special(len(table["model"]["vocab"]) + 1, "<think>", special=False))
    after = read_tokenizer(write(make_meta(table), 262), "m")["tokenizer"]["tokenizer"]["added_tokens"]
    assert [(token["content"], token["special"]) for token in after] == [(END, True), ("<think>", False)]
