# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""BERT, RoBERTa and ALBERT equal transformers: outputs with padding and token types, gradients, and the way back."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import import_arrays
from safetensors.numpy import load_file, save_file
from transformers_parity import Imported, import_model, save_with_random_weights

from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.convert.huggingface.reader import open_huggingface
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.transformer import make_model
from mesh_transformer.storage.errors import CheckpointError

pytestmark = pytest.mark.slow
SIZES = dict(vocab_size=61, num_hidden_layers=3, hidden_size=32, num_attention_heads=4, intermediate_size=56)
BERT = SIZES | dict(max_position_embeddings=20, type_vocab_size=3)
ROBERTA = SIZES | dict(max_position_embeddings=22, type_vocab_size=2, layer_norm_eps=1e-5)
ALBERT = SIZES | dict(max_position_embeddings=20, embedding_size=12)
LENGTHS = np.array([[14], [9], [3]])
MASK = (np.arange(14) < LENGTHS).astype(np.int32)


class Case(NamedTuple):
    kind: str
    model: str  # class of transformers
    keys: dict[str, Any]  # of its configuration


CASES = [
    Case("bert", "BertForMaskedLM", BERT),
    Case("bert", "BertForMaskedLM", BERT | dict(hidden_act="gelu_new")),
    Case("bert", "BertModel", BERT),
    Case("bert", "BertForPreTraining", BERT),
    Case("bert", "BertForSequenceClassification", BERT | dict(num_labels=5)),
    Case("roberta", "RobertaForMaskedLM", ROBERTA),
    Case("roberta", "RobertaModel", ROBERTA),
    Case("roberta", "RobertaForSequenceClassification", ROBERTA | dict(num_labels=3)),
    Case("albert", "AlbertForMaskedLM", ALBERT),
    Case("albert", "AlbertModel", ALBERT | dict(hidden_act="gelu")),
    Case("albert", "AlbertForPreTraining", ALBERT),
    Case("albert", "AlbertForSequenceClassification", ALBERT | dict(num_labels=2)),
]


def save_random_model(case: Case, folder: Path) -> Any:
    """Save a model of transformers with weights far from initial values, and return it."""
    import transformers

    model = getattr(transformers, case.model)(transformers.CONFIG_MAPPING[case.kind](**case.keys))
    return save_with_random_weights(model, folder)


def make_inputs(case: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    tokens = rng.integers(4, 61, MASK.shape, dtype=np.int32)
    types = rng.integers(0, case.keys.get("type_vocab_size", 2), MASK.shape, dtype=np.int32)
    return dict(tokens=np.where(MASK == 1, tokens, 1 if case.kind == "roberta" else 0), types=types)


def run_original(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the outputs of a model of transformers by their native names."""
    import torch

    ids, types, mask = (torch.tensor(x, dtype=torch.long) for x in (inputs["tokens"], inputs["types"], MASK))
    arguments = dict(input_ids=ids, token_type_ids=types, attention_mask=mask)
    base = model.base_model(**arguments)
    found = {"hidden_states": base.last_hidden_state}
    if base.get("pooler_output") is not None:
        found["pooled"] = base.pooler_output
    output = model(**arguments)
    for key, name in (
        ("logits", "logits" if "MaskedLM" in type(model).__name__ else "class_logits"),
        ("prediction_logits", "logits"),
        ("seq_relationship_logits", "class_logits"),
        ("sop_logits", "class_logits"),
    ):
        if output.get(key) is not None:
            found[name] = output[key]
    return found


def run_imported(imported: Imported, params: Any, inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    model = make_model(imported.config)
    arguments = dict(segment_ids=jnp.asarray(MASK), token_types=jnp.asarray(inputs["types"]))
    found = dict(model.encode(params, jnp.asarray(inputs["tokens"]), **arguments)._asdict())
    if imported.config.head == "masked-lm":
        found["logits"] = model.apply(params, jnp.asarray(inputs["tokens"]), **arguments)[0]
    return {name: value for name, value in found.items() if value is not None}


def weigh(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the fixed random factors of one output in the loss; hidden states of padding have none."""
    factors = np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)
    return factors * MASK[:, :, None] if len(shape) == 3 else factors


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.keys.get('hidden_act', 'default')}")
def test_equals_transformers(case, tmp_path):
    import torch
    import transformers

    original = save_random_model(case, tmp_path / "source")
    imported = import_model(tmp_path / "source", tmp_path / "native")
    inputs = make_inputs(case)
    wanted = run_original(original, inputs)
    found = run_imported(imported, imported.params, inputs)
    assert wanted.keys() <= found.keys()
    for name, value in wanted.items():
        expected = value.detach().numpy()
        visible = MASK.astype(bool) if expected.ndim == 3 else slice(None)
        assert np.std(expected[visible]) > 0.02
        np.testing.assert_allclose(found[name][visible], expected[visible], atol=2e-5, rtol=2e-5, err_msg=name)
    check_gradients(case, original, imported, inputs, wanted)

    back = tmp_path / "back"
    convert(ConversionOptions(source=tmp_path / "native", destination=back, format="huggingface"))
    assert json.loads((back / "config.json").read_text())["architectures"] == [case.model]
    again = getattr(transformers, case.model).from_pretrained(back, dtype=torch.float32).eval()
    for name, value in run_original(again, inputs).items():
        np.testing.assert_allclose(value.detach(), wanted[name].detach(), atol=1e-6, err_msg=name)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "source", back))
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)


def check_gradients(case: Case, original: Any, imported: Imported, inputs: Any, outputs: dict[str, Any]) -> None:
    import torch

    def loss(params):
        found = run_imported(imported, params, inputs)
        return sum(jnp.sum(found[name] * weigh(name, found[name].shape)) for name in outputs)

    found = flatten_names(jax.grad(loss)(imported.params))
    total: Any = sum((value * torch.tensor(weigh(name, value.shape))).sum() for name, value in outputs.items())
    total.backward()
    grads = {name: w.grad.numpy() for name, w in original.named_parameters() if w.grad is not None}
    wanted = flatten_names(import_arrays(grads, case.kind, imported.config))
    assert found.keys() == wanted.keys()
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        # A key's bias shifts all scores of a query equally, so its gradient is zero up to rounding.
        scale = largest if name.endswith("attention/b_k") else np.abs(gradient).max()
        if case.kind != "bert" and "w_positions" in name:  # transformers gives padding's row no gradient
            gradient, value = np.delete(gradient, 1, axis=0), np.delete(found[name], 1, axis=0)
        else:
            value = found[name]
        np.testing.assert_allclose(value, gradient, atol=1e-4 * scale, rtol=0, err_msg=name)


def test_files_with_more_than_their_class_keep_it(tmp_path):
    """A masked language model beside a pooler and a next-sentence classifier, with the names of TensorFlow's norms."""
    case = Case("bert", "BertForPreTraining", BERT)
    original = save_random_model(case, tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): values
        for name, values in load_file(file).items()
    }
    copies = {f"cls.predictions.decoder.{x}": tensors[y].copy() for x, y in (
        ("weight", "bert.embeddings.word_embeddings.weight"), ("bias", "cls.predictions.bias"))}  # fmt: skip
    save_file(tensors | copies, file)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["BertForMaskedLM"]}))
    imported = import_model(tmp_path / "source", tmp_path / "native")
    wanted = run_original(original, make_inputs(case))
    found = run_imported(imported, imported.params, make_inputs(case))
    for name in ("pooled", "class_logits"):
        np.testing.assert_allclose(found[name], wanted[name].detach(), atol=2e-5)
    save_file(tensors | copies | {"cls.predictions.decoder.bias": copies["cls.predictions.decoder.bias"] + 1}, file)
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.decoder\.bias differs from cls\.predictions\.bias"):
        open_huggingface(tmp_path / "source")


def test_a_classifier_leaves_out_other_heads(tmp_path):
    save_random_model(Case("roberta", "RobertaForSequenceClassification", ROBERTA), tmp_path)
    file = tmp_path / "model.safetensors"
    extra = {
        f"roberta.pooler.dense.{x}": np.zeros(shape, np.float32) for x, shape in (("weight", (32, 32)), ("bias", 32))
    }
    save_file(load_file(file) | extra, file)
    plan = open_huggingface(tmp_path)
    assert any("left out" in note and "roberta.pooler.dense.weight" in note for note in plan.notes)
    assert plan.config.n_labels == 2
    save_file(load_file(file) | {"something.else": np.zeros(1, np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"unexpected: something\.else"):
        open_huggingface(tmp_path)


def test_a_model_without_a_pooler_has_none(tmp_path):
    save_random_model(Case("bert", "BertModel", BERT), tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    save_file({name: values for name, values in load_file(file).items() if "pooler" not in name}, file)
    assert not import_model(tmp_path / "source", tmp_path / "native").config.pooler
    convert(ConversionOptions(source=tmp_path / "native", destination=tmp_path / "back", format="huggingface"))
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(file).keys()


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (CASES[0], dict(is_decoder=True), "is_decoder = true is not supported"),
        (CASES[0], dict(position_embedding_type="relative_key"), 'position_embedding_type = "relative_key"'),
        (CASES[0], dict(tie_word_embeddings=False), "tie_word_embeddings = false is not supported"),
        (CASES[0], dict(architectures=["BertForTokenClassification"]), 'BertForTokenClassification"] is not supported'),
        (CASES[5], dict(hidden_act="relu"), 'hidden_act = "relu" is not supported; supported: "gelu"'),
        (CASES[8], dict(num_hidden_groups=2), "num_hidden_groups = 2 is not supported"),
        (CASES[8], dict(inner_group_num=2), "inner_group_num = 2 is not supported"),
    ],
)
def test_other_functions_are_refused(case, changes, message, tmp_path):
    save_random_model(case, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError) as error:
        open_huggingface(tmp_path)
    assert message in str(error.value)
