# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Structured output: text sampled under the masks matches, with byte tokens and with longer tokens."""

import json
import re

import numpy as np
import pytest
import tokenizers as hf

from mesh_transformer.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer
from mesh_transformer.sample.engine.requests import PromptError
from mesh_transformer.sample.model_defaults import make_defaults
from mesh_transformer.serve.structured_output import GrammarCompiler


def trained_tokenizer() -> Tokenizer:
    library = hf.Tokenizer(hf.models.BPE())
    library.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(['{"name": "true", "other": [12, 34]} café 2024-11-25 '] * 50, trainer)
    return FileTokenizer(json.loads(library.to_str()))


def sample_tokens(tokenizer, grammar, seed, max_tokens=300):
    rng, tokens = np.random.default_rng(seed), []
    while len(tokens) < max_tokens:
        token = int(rng.choice(np.flatnonzero(grammar.allowed())))
        grammar.accept(token)
        if token == tokenizer.end_of_text:
            assert np.flatnonzero(grammar.allowed()).tolist() == [token]  # nothing can follow it
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("make", [ByteTokenizer, trained_tokenizer])
def test_texts_match(make):
    tokenizer = make()
    compiler = GrammarCompiler(
        make_defaults(tokenizer), tokenizer.n_vocab + 7
    )  # a model's embedding matrix may have more rows
    regex = r"(true|false)-[0-9]{2,4} café"
    first = compiler.from_regex(regex)
    assert first.allowed().shape == (tokenizer.n_vocab + 7,)
    assert not first.allowed()[tokenizer.n_vocab :].any()
    sampled = [sample_tokens(tokenizer, first.fork(), seed) for seed in range(20)]
    texts = {tokenizer.decode(tokens) for tokens in sampled}
    assert len(texts) > 10
    assert all(re.fullmatch(regex, text) for text in texts), texts
    if make is trained_tokenizer:
        assert any(len(tokens) < len(tokenizer.decode(tokens)) for tokens in sampled)
    items = dict(type="array", items=dict(enum=["a", 1, None]), minItems=1, maxItems=3)
    schema = dict(type="object", properties=dict(name=items), required=["name"], additionalProperties=False)
    answers = [
        json.loads(tokenizer.decode(sample_tokens(tokenizer, compiler.from_schema(schema), seed))) for seed in range(10)
    ]
    assert all(set(answer["name"]) <= {"a", 1, None} and list(answer) == ["name"] for answer in answers)


def test_invalid_grammars_are_refused_at_once():
    compiler = GrammarCompiler(make_defaults(ByteTokenizer()), 257)
    with pytest.raises(PromptError, match=r"guided_regex: .*unclosed"):
        compiler.from_regex("([")
    with pytest.raises(PromptError, match=r"response_format: .*nonsense"):
        compiler.from_schema({"type": "nonsense"})
    with pytest.raises(PromptError, match=r"response_format: .*retriev"):
        compiler.from_schema({"$ref": "file:///etc/passwd"})
    with pytest.raises(PromptError, match="the schema has 70"):
        compiler.from_schema({"const": "x" * 70_000})
