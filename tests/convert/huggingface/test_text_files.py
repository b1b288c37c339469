# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Small files of a model's folder: what is stored with the weights, copied, and written back."""

import json

import pytest
from small_tokenizers import END, llama_table, small_table

from mesh_transformer.convert.huggingface.text_files import (
    copy_small_files,
    is_stored_text,
    read_text_files,
    write_text_files,
)
from mesh_transformer.data.tokenizers import load_tokenizer
from mesh_transformer.storage.errors import CheckpointError

FILES = {
    "tokenizer_config.json": '{"eos_token": "</s>"}',
    "chat_template.json": '{"chat_template": "x"}',
    "additional_chat_templates/rag.jinja": "{{ messages }} \u00fc",
    "tokenizer.model": "binary",
    "README.md": "a model \u00fc",
    "LICENSE.txt": "a license",
    "notes.txt": "no",
}


def make_folder(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_texts_are_stored_and_written_back(tmp_path):
    source = make_folder(
        tmp_path / "source", FILES | {"tokenizer.json": json.dumps(llama_table()), "config.json": "{}"}
    )
    read = read_text_files(source, {"eos_token_id": 2, "other": 1})
    carried = read["carried"]
    assert read["special_ids"] == {"eos_token_id": 2}
    assert carried.keys() == {"tokenizer_config.json", "chat_template.json", "additional_chat_templates/rag.jinja"}
    files = read["carried_files"]
    assert files.keys() == {"tokenizer.model", "README.md", "LICENSE.txt"}
    meta = {
        "carried": carried | {"../outside.jinja": "no"},
        "carried_files": files | {"../README.md": "no", "weights.bin": "no"},
        "tokenizer": load_tokenizer(source).to_json(),
    }
    result = make_folder(tmp_path / "result", {"config.json": '{"model_type": "llama"}'})
    write_text_files(result, meta)
    assert {name: (result / name).read_text(encoding="utf-8") for name in carried} == carried
    assert {name: (result / name).read_bytes() for name in files} == {name: FILES[name].encode() for name in files}
    assert not (tmp_path / "README.md").exists()
    assert not (result / "weights.bin").exists()
    assert load_tokenizer(result).fingerprint == load_tokenizer(source).fingerprint
    assert json.loads((result / "config.json").read_text())["eos_token_id"] == 2
    assert not (tmp_path / "outside.jinja").exists()
    assert not is_stored_text("additional_chat_templates/x.py")
    assert not is_stored_text("additional_chat_templates/../x.jinja")


def test_ids_of_the_text_part_are_read(tmp_path):
    table = {"text_config": {"eos_token_id": 1, "bos_token_id": 2}, "eos_token_id": [1, 106]}
    assert read_text_files(tmp_path, table)["special_ids"] == {"bos_token_id": 2, "eos_token_id": [1, 106]}


def test_files_are_copied_from_folder_to_folder(tmp_path):
    source = make_folder(tmp_path / "source", FILES | {"config.json": "{}"})
    (tmp_path / "result").mkdir()
    copy_small_files(source, tmp_path / "result")
    found = {str(path.relative_to(tmp_path / "result")) for path in (tmp_path / "result").rglob("*") if path.is_file()}
    assert found == FILES.keys() - {"notes.txt"}


def test_large_files_are_not_stored(tmp_path):
    folder = make_folder(tmp_path / "source", {"LICENSE": "a license"})
    with open(folder / "tokenizer.model", "wb") as file:
        file.truncate((8 << 20) + 1)
    assert read_text_files(folder, {})["carried_files"].keys() == {"LICENSE"}


def test_damaged_texts_are_errors(tmp_path):
    folder = make_folder(tmp_path / "source", {"generation_config.json": "{"})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not valid JSON: .*copy it again"):
        read_text_files(folder, {})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mistral", "t5"])
def test_transformers_reads_an_exported_tokenizer_as_it_is(tmp_path, kind):
    """Also where no tokenizer_config.json was carried: it would otherwise choose a class by the type of the model."""
    transformers = pytest.importorskip("transformers")
    source = make_folder(tmp_path / "source", {"tokenizer.json": json.dumps(small_table())})
    tokenizer = load_tokenizer(source)
    result = make_folder(tmp_path / "result", {"config.json": json.dumps({"model_type": kind})})
    write_text_files(result, {"tokenizer": tokenizer.to_json()})
    reference = transformers.AutoTokenizer.from_pretrained(str(result))
    text = "the other\n\nthe 12 \u4e2d"
    assert reference.encode(text) == tokenizer.encode(text, add_special_tokens=True)
    assert (reference.eos_token, len(reference)) == (END, tokenizer.n_vocab)
    assert reference.decode(tokenizer.encode(text)) == text
