# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Span corruption: nothing is lost, lengths are those of the paper's code, and the same text is hidden everywhere."""

import numpy as np
import pytest

from mesh_transformer.config import Config, ConfigError, parse_config
from mesh_transformer.data.dataset import preview_sequences, open_data
from mesh_transformer.data.span_corruption import SentinelTokenizer, corrupt_spans, make_span_corruption
from mesh_transformer.data.tokenizers import ByteTokenizer, TokenizerError

SIZES = dict(n_layers=1, n_encoder_layers=1, d_model=8, n_heads=2, n_vocab=264, seq_len=32)


def make_config(folder, model=(), **data) -> Config:
    path = folder / "texts"
    if not path.exists():
        path.mkdir()
        for number in range(12):
            (path / f"{number}.txt").write_text(f"document {number}: " + "abcdefghij" * (20 + number))
    table = {
        "model": SIZES | dict(model),
        "data": {"train": {"a": {"path": str(path)}}, "holdout_one_in": 3, "cache_dir": str(folder / "cache"), **data},
        "train": {"steps": 4, "batch_size": 4},
    }
    return parse_config(table, where="test")


def restore(sources: np.ndarray, targets: np.ndarray, spans) -> np.ndarray:
    """The text that both sides were made of."""
    is_sentinel = lambda x: (x <= spans.sentinel) & (x > spans.sentinel - spans.count)  # noqa: E731
    sides = [np.split(side[:-1], np.flatnonzero(is_sentinel(side[:-1]))) for side in (sources, targets)]
    assert len(sides[0][0]) > 0 == len(sides[1][0]), "a text begins with what is seen, what is written with a sentinel"
    parts = [sides[0][0]]
    for seen, hidden in zip(sides[0][1:], sides[1][1:], strict=True):
        assert seen[0] == hidden[0]
        parts += [hidden[1:], seen[1:]]
    return np.concatenate(parts)


def test_lengths_are_those_of_the_papers_code():
    """T5's random_spans_helper: 568 tokens make inputs of 512 and targets of 114."""
    config = make_config_of(seq_len=512)
    assert config.data.measure_spans(512) == (568, 85, 28)
    assert config.target_len == 114


def make_config_of(**model) -> Config:
    table = {"model": SIZES | model, "data": {"train": {"a": {"path": "x"}}}, "train": {"steps": 1, "batch_size": 4}}
    return parse_config(table, where="test")


@pytest.mark.parametrize("seq_len", [32, 114, 250])
def test_nothing_is_lost_and_nothing_is_padded(tmp_path, seq_len):
    config = make_config(tmp_path, dict(seq_len=seq_len, n_vocab=320))
    spans = make_span_corruption(config, SentinelTokenizer(ByteTokenizer(), config.model.n_vocab))
    text, hidden = np.random.default_rng(0).integers(0, 256, spans.text_len), []
    for sequence in range(40):
        sources, targets = corrupt_spans(text, spans, 0, sequence)
        assert (len(sources), len(targets)) == (seq_len, config.target_len)
        assert sources[-1] == targets[-1] == 256
        np.testing.assert_array_equal(restore(sources, targets, spans), text)
        hidden.append(tuple(targets))
    assert len(set(hidden)) > 30, "sequences hide other spans"


def test_batches_are_a_function_of_the_sequences_alone(tmp_path):
    config = make_config(tmp_path)
    loader = open_data(config).train
    whole = loader.batch(0, 8)
    assert whole.encoder_tokens.shape == (8, 32)
    assert whole.tokens.shape == whole.targets.shape == (8, config.target_len)
    np.testing.assert_array_equal(whole.tokens[:, 1:], whole.targets[:, :-1])
    assert (whole.tokens[:, 0] == 256).all()
    for name in ("sources", "targets"):
        parts = [getattr(loader.batch(4 * i, 4, rows), name) for i in range(2) for rows in ([0, 1], [2, 3])]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(whole, name))
    again, other = open_data(config).train, open_data(make_config(tmp_path, noise_density=0.3)).train
    np.testing.assert_array_equal(again.batch(0, 8).encoder_tokens, whole.encoder_tokens)
    assert again.fingerprint == loader.fingerprint != other.fingerprint


def test_a_text_that_comes_again_has_other_spans_hidden(tmp_path):
    loader = open_data(make_config(tmp_path)).train
    count = loader.lengths[0]
    passes = [[loader.locate(i) for i in range(start, start + count)] for start in (0, count)]
    assert [sorted(n for _, n in one) for one in passes] == [list(range(count)), list(range(count, 2 * count))]
    first, again = (
        loader.read_sequences(sorted(one, key=lambda row: row[1] % count)) for one in passes
    )  # the same texts in the same order
    hidden = [
        (restore(a.encoder_tokens[i], a.targets[i], loader.spans)).tolist() for a in (first, again) for i in range(count)
    ]
    assert hidden[:count] == hidden[count:]
    assert np.mean(np.any(first.encoder_tokens != again.encoder_tokens, axis=1)) > 0.9


def test_every_held_out_sequence_counts_once(tmp_path):
    config = make_config(tmp_path)
    data = open_data(config)
    held = data.validation["a"]
    batches = list(held.batches(None))
    assert len(batches) == held.n_batches
    assert sum(batch.mask.sum() for batch in batches) == held.n_tokens
    assert not batches[-1].mask.all(), "the last batch is filled up"
    halves = [list(held.batches(rows)) for rows in ([0, 1], [2, 3])]
    for whole, *parts in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([part.sources for part in parts]), whole.sources)
    assert "<extra_id_0>" in preview_sequences(config, data, 1)
    assert "--- to write\n<extra_id_0>" in preview_sequences(config, data, 1)


def test_sentinels_in_texts():
    tokenizer = SentinelTokenizer(ByteTokenizer(), 264)
    ids = tokenizer.encode("a<extra_id_0>é<extra_id_6>")
    assert ids == [97, 263, 0xC3, 0xA9, 257]
    assert tokenizer.decode(ids) == "a<extra_id_0>é<extra_id_6>"
    assert tokenizer.decode_bytes(ids) == b"a<extra_id_0>\xc3\xa9<extra_id_6>"
    with pytest.raises(TokenizerError, match="there are 7 sentinels"):
        tokenizer.encode("<extra_id_7>")


class Named(ByteTokenizer):
    """Bytes with T5's own sentinels, as its tokenizer.json has them."""

    n_vocab = 270

    def to_json(self):
        added = [{"id": 260, "content": "<pad>"}, *({"id": 269 - i, "content": f"<extra_id_{i}>"} for i in range(5))]
        return {"type": "file", "tokenizer": {"added_tokens": added}}


def test_sentinels_of_the_tokenizer_come_first():
    tokenizer = SentinelTokenizer(Named(), 320)
    assert (tokenizer.first_sentinel, tokenizer.n_sentinels, tokenizer.decoder_start) == (269, 5, 260)
    spans = make_span_corruption(make_config_of(n_vocab=320), tokenizer)
    assert (spans.first_sentinel, spans.decoder_start, spans.end_of_text) == (269, 260, 256)
    with pytest.raises(ConfigError, match=r"hide 14 spans, for which there are 5 sentinels; lower model\.seq_len"):
        make_span_corruption(make_config_of(n_vocab=320, seq_len=256), tokenizer)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"hide 14 spans, for which there are 7 sentinels; set model\.n_vocab=320"):
        open_data(make_config(tmp_path, dict(seq_len=256)))
    with pytest.raises(ConfigError, match=r"cannot be had with model\.seq_len=32; lower the share"):
        make_config(tmp_path, noise_density=0.9, mean_noise_span_length=1.0)
    with pytest.raises(ConfigError, match=r"isolate_documents has no effect with model\.n_encoder_layers"):
        make_config(tmp_path, isolate_documents=True)
