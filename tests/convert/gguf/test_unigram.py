# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Unigram and WordPiece in GGUF metadata: the ids are those of the tokenizer.json that they were written from."""

import base64
import json
import struct

import pytest
import tokenizers
from gguf import TokenType
from small_tokenizers import special, unigram_table

from mesh_transformer.convert.gguf.tokenizer import read_tokenizer
from mesh_transformer.convert.gguf.tokenizer_writer import write_tokenizer
from mesh_transformer.convert.gguf.unigram import SPACE
from mesh_transformer.data.tokenizers import tokenizer_from_json
from mesh_transformer.data.vocabulary_files import make_affix_processor
from mesh_transformer.storage.errors import CheckpointError

TEXTS = ["the other  the", " hi there ", "the</s>hi", "hello the", "un\u00e9 the the"]
# A map of SentencePiece without any replacements: an empty trie and no texts.
CHARSMAP = base64.b64encode(struct.pack("<I", 1024) + bytes(1024)).decode()


def bert_table():
    """Return a WordPiece vocabulary as BERT's tokenizer.json has it."""
    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "hi",
        "other",
        "un",
        "##e",
        "##the",
        "there",
        ",",
        "o",
    ]
    vocabulary = {token: i for i, token in enumerate(names)}
    return {
        "version": "1.0",
        "added_tokens": [special(i, token) for i, token in enumerate(names[:5])],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": make_affix_processor(vocabulary, "[CLS]", "[SEP]"),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }


def write(table, **ids):
    return write_tokenizer({"tokenizer": {"type": "file", "tokenizer": table}, "special_ids": ids}, 30)


RUNS = [
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
]
PLAIN = unigram_table()
T5_SPACES = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, PLAIN["pre_tokenizer"]]}
TABLES = {
    "plain": PLAIN,
    "spaces": unigram_table(normalizer={"type": "Sequence", "normalizers": RUNS}),
    "t5": unigram_table(normalizer={"type": "Precompiled", "precompiled_charsmap": CHARSMAP}, pre_tokenizer=T5_SPACES),
    "no prefix": unigram_table(pre_tokenizer=PLAIN["pre_tokenizer"] | {"prepend_scheme": "never"}),
    "no end": unigram_table(post_processor=None),
    "bert": bert_table(),
}


@pytest.mark.parametrize("name", TABLES)
def test_ids_are_those_of_the_tokenizer(name):
    table = TABLES[name]
    library = tokenizers.Tokenizer.from_str(json.dumps(table))
    end = "[SEP]" if name == "bert" else "</s>"
    values = write(table, eos_token_id=library.token_to_id(end))
    after = tokenizer_from_json(read_tokenizer(values, "m")["tokenizer"])
    assert after.n_vocab == library.get_vocab_size()
    for text in TEXTS:
        expected = library.encode(text).ids
        assert after.encode(text, add_special_tokens=True, parse_special=True) == expected, text


def test_tables_differ():
    encoded = {
        name: [tokenizers.Tokenizer.from_str(json.dumps(table)).encode(text).ids for text in TEXTS]
        for name, table in TABLES.items()
        if name != "t5"  # which divides these texts as "spaces" does
    }
    assert all(a == b or encoded[a] != encoded[b] for a in encoded for b in encoded)


def test_wordpiece_is_stored_as_llama_cpp_reads_it():
    values = write(bert_table(), eos_token_id=3)
    assert values["tokenizer.ggml.model"] == "bert"
    assert values["tokenizer.ggml.tokens"][2:10] == [
        "[CLS]", "[SEP]", "[MASK]", SPACE + "the", SPACE + "hi", SPACE + "other", SPACE + "un", "e",
    ]  # fmt: skip
    assert values["tokenizer.ggml.seperator_token_id"] == 3
    assert (values["tokenizer.ggml.unknown_token_id"], values["tokenizer.ggml.cls_token_id"]) == (1, 2)


def test_unigram_is_stored_as_llama_cpp_reads_it():
    values = write(TABLES["t5"], eos_token_id=1)
    assert values["tokenizer.ggml.model"] == "t5"
    assert values["tokenizer.ggml.token_type"][:4] == [
        TokenType.CONTROL, TokenType.CONTROL, TokenType.UNKNOWN, TokenType.NORMAL,
    ]  # fmt: skip
    assert values["tokenizer.ggml.scores"][4] == -3.0
    assert bytes(values["tokenizer.ggml.precompiled_charsmap"]) == base64.b64decode(CHARSMAP)
    assert values["tokenizer.ggml.add_space_prefix"]
    assert values["tokenizer.ggml.remove_extra_whitespaces"]
    assert values["tokenizer.ggml.add_eos_token"]


def test_other_divisions_are_refused():
    with pytest.raises(CheckpointError, match="no Unigram tokenizer that divides texts as the tokenizer of this model"):
        write(unigram_table(pre_tokenizer={"type": "Whitespace"}))
    cased = bert_table()
    cased["normalizer"]["lowercase"] = False
    with pytest.raises(CheckpointError, match="no WordPiece tokenizer with the normalizer of this model's tokenizer"):
        write(cased)
