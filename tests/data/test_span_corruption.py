# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Span corruption: no token is lost, lengths match the paper's code, and the noise spans are the same on any mesh."""

import numpy as np
import pytest
from small_tokenizers import llama_table

from mesh_transformer.config import Config, ConfigError, parse_config
from mesh_transformer.data.dataset import open_data, preview_sequences
from mesh_transformer.data.span_corruption import SentinelTokenizer, corrupt_spans, make_span_corruption
from mesh_transformer.data.tokenizers import ByteTokenizer, FileTokenizer, TokenizerError

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


def restore(encoder_tokens: np.ndarray, targets: np.ndarray, corruption) -> np.ndarray:
    """Return the text from which the encoder tokens and the targets were made."""

    def split_at_sentinels(tokens: np.ndarray) -> list[np.ndarray]:
        first = corruption.first_sentinel
        is_sentinel = (tokens <= first) & (tokens > first - corruption.n_spans)
        return np.split(tokens, np.flatnonzero(is_sentinel))

    encoder_runs, target_runs = split_at_sentinels(encoder_tokens[:-1]), split_at_sentinels(targets[:-1])
    assert len(encoder_runs[0]) > 0, "the encoder tokens begin with text"
    assert len(target_runs[0]) == 0, "the targets begin with a sentinel"
    parts = [encoder_runs[0]]
    for text, noise in zip(encoder_runs[1:], target_runs[1:], strict=True):
        assert text[0] == noise[0]
        parts += [noise[1:], text[1:]]
    return np.concatenate(parts)


def test_lengths_match_the_papers_code():
    """T5's random_spans_helper makes inputs of 512 and targets of 114 from 568 tokens."""
    config = make_config_of(seq_len=512)
    assert config.data.measure_spans(512) == (568, 85, 28)
    assert config.target_len == 114


def make_config_of(**model) -> Config:
    table = {"model": SIZES | model, "data": {"train": {"a": {"path": "x"}}}, "train": {"steps": 1, "batch_size": 4}}
    return parse_config(table, where="test")


@pytest.mark.parametrize("seq_len", [32, 114, 250])
def test_nothing_is_lost_and_nothing_is_padded(tmp_path, seq_len):
    config = make_config(tmp_path, dict(seq_len=seq_len, n_vocab=320))
    corruption = make_span_corruption(config, SentinelTokenizer(ByteTokenizer(), config.model.n_vocab))
    text, all_targets = np.random.default_rng(0).integers(0, 256, corruption.text_len), []
    for sequence in range(40):
        encoder_tokens, targets = corrupt_spans(text, corruption, 0, sequence)
        assert (len(encoder_tokens), len(targets)) == (seq_len, config.target_len)
        assert encoder_tokens[-1] == targets[-1] == 256
        np.testing.assert_array_equal(restore(encoder_tokens, targets, corruption), text)
        all_targets.append(tuple(targets))
    assert len(set(all_targets)) > 30, "sequences have different noise spans"


def test_batches_depend_only_on_their_sequences(tmp_path):
    config = make_config(tmp_path)
    loader = open_data(config).train
    full = loader.batch(0, 8)
    assert full.encoder_tokens.shape == (8, 32)
    assert full.tokens.shape == full.targets.shape == (8, config.target_len)
    np.testing.assert_array_equal(full.tokens[:, 1:], full.targets[:, :-1])
    assert (full.tokens[:, 0] == 256).all()
    for name in ("encoder_tokens", "targets"):
        parts = [getattr(loader.batch(4 * i, 4, rows), name) for i in range(2) for rows in ([0, 1], [2, 3])]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(full, name))
    again, other = open_data(config).train, open_data(make_config(tmp_path, noise_density=0.3)).train
    np.testing.assert_array_equal(again.batch(0, 8).encoder_tokens, full.encoder_tokens)
    assert again.fingerprint == loader.fingerprint != other.fingerprint


def test_noise_spans_differ_between_epochs(tmp_path):
    loader = open_data(make_config(tmp_path)).train
    count = loader.lengths[0]
    epochs = [[loader.locate(i) for i in range(start, start + count)] for start in (0, count)]
    assert [sorted(n for _, n in one) for one in epochs] == [list(range(count)), list(range(count, 2 * count))]
    first, again = (
        loader.read_sequences(sorted(one, key=lambda row: row[1] % count)) for one in epochs
    )  # the same texts in the same order
    texts = [
        restore(a.encoder_tokens[i], a.targets[i], loader.corruption).tolist()
        for a in (first, again)
        for i in range(count)
    ]
    assert texts[:count] == texts[count:]
    assert np.mean(np.any(first.encoder_tokens != again.encoder_tokens, axis=1)) > 0.9


def test_every_held_out_sequence_counts_once(tmp_path):
    config = make_config(tmp_path)
    data = open_data(config)
    held_out = data.validation["a"]
    batches = list(held_out.batches(None))
    assert len(batches) == held_out.n_batches
    assert sum(batch.mask.sum() for batch in batches) == held_out.n_tokens
    assert not batches[-1].mask.all(), "the last batch is padded"
    halves = [list(held_out.batches(rows)) for rows in ([0, 1], [2, 3])]
    for full, *parts in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([part.encoder_tokens for part in parts]), full.encoder_tokens)
    assert "<extra_id_0>" in preview_sequences(config, data, 1)
    assert "--- targets\n<extra_id_0>" in preview_sequences(config, data, 1)


def test_sentinels_in_texts():
    tokenizer = SentinelTokenizer(ByteTokenizer(), 264)
    ids = tokenizer.encode("a<extra_id_0>é<extra_id_6>")
    assert ids == [97, 263, 0xC3, 0xA9, 257]
    assert tokenizer.decode(ids) == "a<extra_id_0>é<extra_id_6>"
    assert tokenizer.decode_bytes(ids) == b"a<extra_id_0>\xc3\xa9<extra_id_6>"
    with pytest.raises(TokenizerError, match="the vocabulary has 7 sentinels"):
        tokenizer.encode("<extra_id_7>")


class Named(ByteTokenizer):
    """Byte tokenizer with named sentinels, as in T5's tokenizer.json."""

    n_vocab = 270

    def to_json(self):
        added = [{"id": 260, "content": "<pad>"}, *({"id": 269 - i, "content": f"<extra_id_{i}>"} for i in range(5))]
        return {"type": "file", "tokenizer": {"added_tokens": added}}


def test_sentinels_of_the_tokenizer_come_first():
    tokenizer = SentinelTokenizer(Named(), 320)
    assert (tokenizer.first_sentinel, tokenizer.n_sentinels, tokenizer.decoder_start) == (269, 5, 260)
    corruption = make_span_corruption(make_config_of(n_vocab=320), tokenizer)
    assert (corruption.first_sentinel, corruption.decoder_start, corruption.end_of_text) == (269, 260, 256)
    with pytest.raises(
        ConfigError, match=r"have 14 noise spans, but the vocabulary has 5 sentinels; lower model\.seq_len"
    ):
        make_span_corruption(make_config_of(n_vocab=320, seq_len=256), tokenizer)


def test_invalid_configs_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"have 14 noise spans, but the vocabulary has 7 sentinels; set model\.n_vocab=320"
    ):
        open_data(make_config(tmp_path, dict(seq_len=256)))
    with pytest.raises(
        ConfigError, match=r"do not give an encoder input of exactly model\.seq_len=32 tokens; lower the density"
    ):
        make_config(tmp_path, noise_density=0.9, mean_noise_span_length=1.0)
    with pytest.raises(ConfigError, match=r"isolate_documents=true has no effect with model\.n_encoder_layers"):
        make_config(tmp_path, isolate_documents=True)


def test_sentinels_are_special_in_any_text_and_other_tokens_on_request():
    table = llama_table()
    table["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    tokenizer = SentinelTokenizer(FileTokenizer(table), 300)
    assert (tokenizer.begin_of_text, tokenizer.lossy) == (1, False)
    plain = tokenizer.encode("hi</s><extra_id_1>hi")
    assert 2 not in plain
    assert plain.count(298) == 1
    assert tokenizer.encode("hi</s><extra_id_1>hi", add_special_tokens=True) == [1, *plain]
    assert tokenizer.encode("hi</s><extra_id_1>hi", parse_special=True) == [263, 2, 298, 263]
