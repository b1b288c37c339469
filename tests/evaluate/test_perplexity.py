# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Bits per byte: every token is scored once with the context of the protocol; WikiText round trips."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import make_llama, save_folder, with_template
from small_tokenizers import llama_table

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.data.errors import DataError, Document
from mesh_transformer.data.tokenizers import ByteTokenizer
from mesh_transformer.evaluate.checkpoint_eval import evaluate_checkpoint
from mesh_transformer.evaluate.loglikelihood import LoglikelihoodScorer
from mesh_transformer.evaluate.perplexity import TextScore, is_sampled, score_documents, sliding_windows, weighted_total
from mesh_transformer.evaluate.wikitext import WikiText, wikitext_results
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.model_defaults import make_defaults

DEFAULTS = make_defaults(ByteTokenizer())

SHARED = Path(__file__).parents[3] / "shared" / "data"
CONFIG = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=264, seq_len=32)
TEXTS = ["A first text, which is longer than the model's context.", "Another: é.", "", "Third text of it."]


@pytest.fixture(scope="module")
def scorer():
    return LoglikelihoodScorer(CONFIG, make_model(CONFIG).init(jax.random.key(0)), None)


@pytest.mark.parametrize(("length", "context", "stride"), [(1, 8, 8), (8, 8, 8), (9, 8, 8), (50, 8, 3), (50, 8, 1)])
def test_windows_score_every_token_once(length, context, stride):
    queries = list(sliding_windows(range(length), 99, context, stride))
    scored = [token for query in queries for token in query.tokens[-query.n_scored :]]
    assert scored == list(range(length))
    assert queries[0].tokens[0] == 99
    assert all(len(query.tokens) - 1 <= context for query in queries)
    if stride < context:
        assert all(len(query.tokens) - query.n_scored >= context - stride for query in queries[1:-1])
    else:
        assert all(query.n_scored == len(query.tokens) - 1 for query in queries), "segments do not overlap"


def test_an_empty_document_has_no_windows():
    assert list(sliding_windows([], 99, 8)) == []


def test_bits_per_byte_equal_the_definition(scorer):
    """Scores equal those from the logits of a plain forward pass, one document at a time."""
    total_loss = 0.0
    forward = jax.jit(make_model(CONFIG).apply)
    for text in TEXTS:
        ids = list(text.encode())
        for first in range(0, len(ids), CONFIG.seq_len):
            targets = ids[first : first + CONFIG.seq_len]
            inputs = [ids[first - 1] if first else 256, *targets[:-1]]
            padded = jnp.asarray([inputs + [0] * (CONFIG.seq_len - len(inputs))])
            logits, _ = forward(scorer.params, padded)
            total_loss -= float(jax.nn.log_softmax(logits[0])[np.arange(len(targets)), np.array(targets)].sum())
    documents = [("ours", Document(text, f"{i}")) for i, text in enumerate(TEXTS)]
    score = score_documents(scorer, DEFAULTS, documents)["ours"]
    n_bytes = len("".join(TEXTS).encode())
    assert (score.tokens, score.n_bytes, score.documents) == (n_bytes, n_bytes, 4)
    assert score.bits_per_byte == pytest.approx(total_loss / math.log(2) / n_bytes, rel=1e-5)
    assert score.to_results()["token_perplexity"] == pytest.approx(math.exp(total_loss / n_bytes), rel=1e-5)


def test_components_limits_and_fractions(scorer):
    documents = [(f"part {i % 2}", Document(text * 3, f"name {i}")) for i, text in enumerate(TEXTS * 4)]
    whole = score_documents(scorer, DEFAULTS, documents)
    assert [whole[name].documents for name in ("part 0", "part 1")] == [8, 8]
    first = score_documents(scorer, DEFAULTS, documents, limit=2)
    assert first["part 1"].n_bytes == sum(len(documents[i][1].text.encode()) for i in (1, 3))
    assert first["part 1"].n_total_bytes == whole["part 1"].n_total_bytes
    part = score_documents(scorer, DEFAULTS, documents, fraction=0.6)
    picked = sum(is_sampled(document.name, 0.6) for _, document in documents)
    assert 0 < picked < len(documents)
    assert sum(score.documents for score in part.values()) == picked
    names = [f"{i}" for i in range(10_000)]
    assert sum(is_sampled(name, 0.1) for name in names) == pytest.approx(1000, abs=100)
    assert {name for name in names if is_sampled(name, 0.1)} <= {name for name in names if is_sampled(name, 0.2)}


def test_a_stride_gives_tokens_more_context(scorer):
    """The same tokens are scored, with longer contexts and a different result."""
    documents = [("ours", Document("Every token of a text knows those before it. " * 4, "0"))]
    apart = score_documents(scorer, DEFAULTS, documents)["ours"]
    strided = score_documents(scorer, DEFAULTS, documents, stride=4)["ours"]
    assert apart.tokens == strided.tokens
    assert apart.negative_logprob != strided.negative_logprob


def test_total_is_weighted_by_size():
    parts = {"a": TextScore(math.log(2) * 10, 5, 10, 1, 300), "b": TextScore(math.log(2) * 30, 5, 10, 1, 100)}
    assert weighted_total(parts)["bits_per_byte"] == pytest.approx((1 * 300 + 3 * 100) / 400)


@pytest.mark.parametrize(
    ("documents", "options", "error", "words"),
    [
        ([], {}, DataError, "no documents"),
        ([("empty", Document("", "0"))], {}, DataError, "component 'empty': all its documents are empty"),
        ([("a", Document("text", "0"))], {"context": 33}, ConfigError, "must be between 1 and model.seq_len=32"),
        ([("a", Document("text", "0"))], {"stride": 33}, ConfigError, "evaluate.stride=33: must be between 1 and"),
    ],
)
def test_nothing_to_score_is_an_error(scorer, documents, options, error, words):
    with pytest.raises(error, match=words):
        score_documents(scorer, DEFAULTS, documents, **options)


LINES = [
    " \n",
    " = A 2 @-@ part Title = \n",
    " \n",
    ' He said , " It is 1 @,@ 000 ( or 3 @.@ 5 ) , Mr. Smith \'s " ; then St. Paul and $ 5 . \n',
    " Smith , Mr . \n",
    ' " odd , \n',
]


def test_wikitext_is_detokenized_and_restored():
    corpus = WikiText("".join(LINES))
    joined = [corpus.join(line) for line in LINES]
    assert joined[3] == 'He said, "It is 1,000 (or 3.5), Mr. Smith\'s"; then St. Paul and $5.\n'
    assert joined[4] == "Smith, Mr .\n", "together this would be the word Mr."
    assert [corpus.split(line) for line in joined] == LINES
    (article,) = corpus.articles()
    assert article.document.text == "".join(joined)
    assert article.n_words == len("".join(LINES).split()) + len(LINES)
    with pytest.raises(DataError, match=r"my\.txt:2: .* not a WikiText line"):
        WikiText(" a b \nrunning text\n", "my.txt")


@pytest.mark.parametrize(("name", "n_words", "articles"), [("test", 245_569, 62), ("valid", 217_646, 60)])
def test_wikitext_2_is_restored(name, n_words, articles):
    path = SHARED / f"wikitext2_{name}.txt"
    if not path.exists():
        pytest.skip("WikiText-2 is not in ../shared/data")
    corpus = WikiText(path.read_text(encoding="utf-8"))
    joined = [corpus.join(line) for line in corpus.lines]
    assert [corpus.split(line) for line in joined] == corpus.lines
    assert sum(line.count(" .") + line.count(" ,") for line in joined) < 60
    found = [article.n_words for article in corpus.articles()]
    assert (sum(found), len(found)) == (n_words, articles)


def test_word_perplexity_divides_the_loss_by_the_original_words():
    results = wikitext_results(
        TextScore(negative_logprob=20.0, tokens=10, n_bytes=40, documents=1, n_total_bytes=40), n_words=5
    )
    assert results["word_perplexity"] == pytest.approx(math.exp(4))
    assert results["token_perplexity"] == pytest.approx(math.exp(2))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_documents_begin_as_in_transformers(tmp_path):
    """device_evaluate.py --data gives the loss of transformers with <s> in front."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = save_folder(
        tmp_path / "model",
        make_llama(),
        with_template(llama_table(), ["<s>"], []),
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"eos_token_id": 2},
    )
    text = "hi there, a text of fewer tokens than the context"
    (tmp_path / "text.txt").write_text(text)
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = model(ids, labels=ids).loss.item()
        ids[0, 0] = 2
        other = model(ids, labels=ids).loss.item()
    assert abs(wanted - other) > 1e-3, "the first token matters"
    evaluation = evaluate_checkpoint(str(folder), [f'evaluate.data.x="{tmp_path / "text.txt"}"'], quiet=True)
    assert evaluation["results"]["text:x"]["nats_per_token,none"] == pytest.approx(wanted, abs=1e-5)
