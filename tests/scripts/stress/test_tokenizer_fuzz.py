# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every kind of tokenizer gives what AutoTokenizer gives on 300 difficult texts; the deliberate differences are asserted."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers as hf
from tokenizer_kinds import KINDS, write_json

from mesh_transformer.data.chat_template import ChatTemplate
from mesh_transformer.data.tokenizers import load_tokenizer

pytestmark = pytest.mark.slow
pytest.importorskip("transformers", reason="needs pip install transformers")
SHARED = Path(__file__).parents[4] / "shared" / "tokenizers"
LOSSY = {"t5", "mt5", "albert", "bert", "bert-cased", "vocab.txt", "tokenizer.model-t5"}


def load_chat_template(folder, tokenizer):
    texts = {path.name: path.read_text() for path in folder.glob("*") if path.suffix in (".json", ".jinja")}
    return ChatTemplate(tokenizer, {"carried": texts})


def change_json(path, **changes):
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_difficult_texts_equal_transformers(kind, tmp_path, load_script):
    fuzz = load_script("stress/tokenizer_fuzz")
    KINDS[kind](tmp_path, fuzz.WORDS)
    reference = fuzz.load_reference(tmp_path, "auto")
    assert reference.chat_template
    assert fuzz.compare(tmp_path, reference, texts=300, seed=1) == []
    loss = load_tokenizer(tmp_path).loss or ""
    assert loss.startswith("the vocabulary has no byte tokens: text that it lacks becomes ") == (kind in LOSSY)
    assert (loss == "") == (kind not in LOSSY)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox"])
def test_difficult_texts_equal_transformers_with_published_vocabularies(name, tmp_path, load_script):
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs the published tokenizer in {SHARED / name}")
    fuzz = load_script("stress/tokenizer_fuzz")
    for path in (SHARED / name).iterdir():
        shutil.copy(path, tmp_path)
    write_json(tmp_path / "config.json", {"model_type": name.replace("-", "_")})
    assert fuzz.compare(tmp_path, fuzz.load_reference(tmp_path, "auto"), texts=300, seed=2) == []


def test_a_difference_is_found(tmp_path, load_script, monkeypatch):
    fuzz = load_script("stress/tokenizer_fuzz")
    KINDS["gpt2"](tmp_path, fuzz.WORDS)
    load = fuzz.load_tokenizer

    def load_other(folder):
        tokenizer = load(folder)
        encode = tokenizer.encode
        monkeypatch.setattr(tokenizer, "encode", lambda text, **options: encode(text.lower(), **options))
        return tokenizer

    monkeypatch.setattr(fuzz, "load_tokenizer", load_other)
    found = fuzz.compare(tmp_path, fuzz.load_reference(tmp_path, "auto"), texts=40, seed=0)
    assert {each.check for each in found} >= {"ids, special tokens added: False", "ids, special tokens as text"}


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "mistral", "t5", "bert"])
def test_special_tokens_in_messages_stay_text_unlike_in_transformers(kind, tmp_path, load_script):
    fuzz = load_script("stress/tokenizer_fuzz")
    KINDS[kind](tmp_path, fuzz.WORDS)
    reference, tokenizer = fuzz.load_reference(tmp_path, "auto"), load_tokenizer(tmp_path)
    name = reference.eos_token or reference.sep_token
    special = reference.convert_tokens_to_ids(name)
    plain = [{"role": "user", "content": "a"}]
    marked = [{"role": "user", "content": f"a {name} b\ufdd0{name}"}]
    template = load_chat_template(tmp_path, tokenizer)
    count = template.encode(template.render(plain)).count(special)
    assert fuzz.prompt_of_reference(reference, plain).count(special) == count > 0
    assert fuzz.prompt_of_reference(reference, marked).count(special) == count + 2
    ids = template.encode(template.render(marked))
    assert ids.count(special) == count
    if not tokenizer.lossy:  # Llama 2's vocabulary writes a space into the name
        assert marked[0]["content"].replace(" ", "") in tokenizer.decode(ids).replace(" ", "")


def test_the_pre_tokenizer_of_the_file_is_used_unlike_in_transformers(tmp_path, load_script):
    """AutoTokenizer replaces Llama 2's own rule for spaces by the rule of its class, and joins GPT-2's digits apart."""
    fuzz = load_script("stress/tokenizer_fuzz")
    for kind, name, text in (("mistral", "LlamaTokenizer", " the"), ("smollm", "GPT2Tokenizer", "1234567890")):
        folder = tmp_path / kind
        folder.mkdir()
        KINDS[kind](folder, fuzz.WORDS)
        change_json(folder / "tokenizer_config.json", tokenizer_class=name)
        own = load_tokenizer(folder).encode(text)
        assert own == hf.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        assert own != fuzz.load_reference(folder, "auto").encode(text, add_special_tokens=False)


def test_decoding_that_differs_from_transformers(tmp_path, load_script):
    """Described in mesh_transformer/data/tokenizers.py."""
    fuzz = load_script("stress/tokenizer_fuzz")
    for kind in ("llama2", "gpt2"):
        (tmp_path / kind).mkdir()
        KINDS[kind](tmp_path / kind, fuzz.WORDS)
    llama, reference = load_tokenizer(tmp_path / "llama2"), fuzz.load_reference(tmp_path / "llama2", "auto")
    run = reference.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0xFF>"])
    assert llama.decode(run) == "\u00e9\ufffd"
    assert reference.decode(run) == "\ufffd\ufffd\ufffd"
    assert llama.decode([llama.n_vocab]) == "\ufffd"
    assert reference.decode([llama.n_vocab]) == ""
    size = load_tokenizer(tmp_path / "gpt2").n_vocab
    added = {str(size): {"content": "caf\u00e9", "special": False}}
    change_json(tmp_path / "gpt2" / "tokenizer_config.json", added_tokens_decoder=added)
    assert load_tokenizer(tmp_path / "gpt2").decode([size]) == "caf\u00e9"
    assert fuzz.load_reference(tmp_path / "gpt2", "auto").decode([size]) == "caf\ufffd"


def test_named_tokens_are_special(tmp_path, load_script):
    """Tokens that tokenizer.json lists as ordinary, or that only the class of the tokenizer names."""
    fuzz = load_script("stress/tokenizer_fuzz")
    for kind, name, key in (
        ("gemma", "<mask>", "mask_token"),
        ("mistral", "</s>", "eos_token"),
        ("neox", "<|padding|>", "pad_token"),
        ("smollm", "<|im_start|>", "bos_token"),
    ):
        for named in (True, False):
            folder = tmp_path / f"{kind}-{named}"
            folder.mkdir()
            KINDS[kind](folder, fuzz.WORDS)
            table = json.loads((folder / "tokenizer.json").read_text())
            entry = next(token for token in table["added_tokens"] if token["content"] == name)
            entry |= {"special": False, "normalized": kind != "mistral", "lstrip": True}
            write_json(folder / "tokenizer.json", table)
            config = json.loads((folder / "tokenizer_config.json").read_text())
            if not named and kind in ("gemma", "neox"):
                del config[key]
            write_json(folder / "tokenizer_config.json", config)
            reference = fuzz.load_reference(folder, "auto")
            assert reference.convert_tokens_to_ids(name) in reference.all_special_ids
            assert fuzz.compare(folder, reference, texts=len(fuzz.WORDS) + 60, seed=3) == []
