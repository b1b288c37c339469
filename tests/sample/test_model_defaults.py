# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Converted models begin and end texts, and sample, as `transformers` does with the same folder."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from hf_folders import BOS, EOS, always, make_llama, save_folder, two_ends_table, with_template
from small_tokenizers import llama_table, special

import mesh_transformer as mt
from mesh_transformer.config import ConfigError, ModelConfig, SampleConfig, config_to_dict, parse_config
from mesh_transformer.config.presets import T5
from mesh_transformer.convert.huggingface.text_files import read_text_files
from mesh_transformer.convert.model_cache import CACHE
from mesh_transformer.data.span_corruption import SentinelTokenizer
from mesh_transformer.data.tokenizers import ByteTokenizer, FileTokenizer
from mesh_transformer.sample.loading import load_model
from mesh_transformer.sample.model_defaults import make_defaults, read_defaults, read_sampling
from mesh_transformer.sample.text_generation import complete_texts
from mesh_transformer.storage.errors import CheckpointError

CASES = Path(__file__).parents[3] / "shared" / "cases" / "conversion"
MODEL = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=272, seq_len=64)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
PROMPTS = ("hi there", "", "a </s> b", "  two")


def read(tokenizer, *, special_ids=None, model=MODEL, **files):
    carried = {f"{name}.json": value if isinstance(value, str) else json.dumps(value) for name, value in files.items()}
    meta = {"config": {"model": {}}, "carried": carried, "special_ids": special_ids or {}}
    return read_defaults(meta, tokenizer, model, "step_0")


def test_a_model_without_files_ends_with_end_of_text():
    tokenizer = FileTokenizer(with_template(llama_table(), ["<s>"], []))
    for defaults in (make_defaults(tokenizer), read_defaults({"config": {}}, tokenizer, MODEL, "step_0")):
        assert tokenizer.begin_of_text == BOS, "not used, because the model was trained without it"
        assert defaults.encode("hi") == tokenizer.encode("hi")
        assert defaults.encode("") == [EOS]
        assert defaults.eos_token_ids == defaults.chat_eos_token_ids == (EOS,)
        assert (defaults.prefix_token_id, defaults.decoder, defaults.describe()) == (EOS, None, [])


def test_special_tokens_of_prompts():
    defaults = read(FileTokenizer(with_template(llama_table(), ["<s>"], [])), tokenizer_config=SPECIAL)
    plain = defaults.tokenizer.encode("a</s>")
    assert EOS not in plain
    assert defaults.encode("a</s>") == [BOS, *plain]
    assert defaults.encode("a</s>", add_special_tokens=False) == plain
    assert defaults.encode("a</s>", parse_special=True)[-1] == EOS
    assert defaults.encode("") == defaults.encode("", add_special_tokens=False) == [BOS]


def test_ends_and_beginnings_come_from_the_files():
    table = two_ends_table()
    tokenizer = FileTokenizer(table)
    im_end = tokenizer.n_vocab - 1
    ids = {"bos_token_id": 5, "eos_token_id": 3}
    both = read(tokenizer, special_ids=ids, generation_config={"eos_token_id": [im_end, 70, 999]})
    assert both.eos_token_ids == (im_end, 70), "generation_config.json has precedence; the model has no token 999"
    assert set(both.chat_eos_token_ids) >= {im_end, 70, 3}
    assert both.first_token_id == both.prefix_token_id == 5
    alone = read(tokenizer, special_ids=ids, generation_config={"temperature": 0.5})
    assert alone.eos_token_ids == (3,)
    named = read(tokenizer, tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "bos_token": None})
    assert named.eos_token_ids == (im_end,)
    assert named.prefix_token_id == im_end, "the tokenizer has no beginning, so its end precedes a text"
    older = read(tokenizer, tokenizer_config={}, special_tokens_map={"eos_token": "</s>", "bos_token": "<s>"})
    assert (older.eos_token_ids, older.prefix_token_id) == ((EOS,), BOS)
    for value in ("2", 2.0, True, [2, "x"]):
        with pytest.raises(ConfigError, match=r"step_0: generation_config\.json: eos_token_id=.*is not a token id"):
            read(tokenizer, generation_config={"eos_token_id": value})
    for text in ("{", "[]"):
        with pytest.raises(ConfigError, match=r"step_0: generation_config\.json .*not (valid JSON|a JSON object)"):
            read(tokenizer, generation_config=text)


def test_decoder_tokens():
    model = dataclasses.replace(MODEL, n_encoder_layers=1)
    plain, ends = (FileTokenizer(with_template(llama_table(), [], after)) for after in ([], ["</s>"]))
    trained = make_defaults(SentinelTokenizer(plain, MODEL.n_vocab)).decoder
    assert trained == (EOS, EOS), "without a padding token, the decoder starts with the end"
    assert read(plain, model=model).decoder == (EOS, EOS)
    assert read(ends, model=model, special_ids={"decoder_start_token_id": 7}).decoder == (7, None)
    assert read(ends, model=model).encode("hi")[-1:] == [EOS]


@pytest.mark.parametrize(
    ("generation", "sampling", "words"),
    [
        ({}, {}, ""),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": None}, {"temperature": 0.6, "top_p": 0.9}, ""),
        ({"do_sample": True, "top_k": 20.0, "min_p": 0.1}, {"temperature": 1.0, "top_k": 20, "min_p": 0.1}, ""),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}, ""),
        ({"do_sample": False, "top_p": 0.9, "temperature": 0.7}, {"temperature": 0.0}, ""),
        ({"repetition_penalty": 1.3, "max_new_tokens": 9}, {"repetition_penalty": 1.3, "max_tokens": 9}, ""),
        ({"num_beams": 4, "no_repeat_ngram_size": 0, "typical_p": 1.0}, {}, r"num_beams=4 has no effect \(not supp"),
        ({"top_p": 1.5}, {}, r"top_p=1.5 has no effect \(input should be less than or equal to 1\)"),
        ({"max_length": 20}, {}, "max_length=20"),
        ({"max_length": 64, "chat_format": "x", "pad_token_id": 3}, {}, ""),
    ],
)
def test_sampling_defaults(generation, sampling, words):
    found, notes = read_sampling(generation, 64)
    assert found == sampling
    assert len(notes) == bool(words)
    for note in notes:
        assert re.search(words, note), note
    SampleConfig(**found)


def test_a_section_of_a_run_has_precedence():
    generation = {"generation_config.json": '{"temperature": 0.3, "num_beams": 2}'}
    meta = {"config": {"sample": {"temperature": 0.8}}, "carried": generation}
    defaults = read_defaults(meta, ByteTokenizer(), MODEL, "step_0")
    assert (defaults.sampling, defaults.notes) == ({}, ())


def test_damaged_files_are_not_converted(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [70, 71')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not valid JSON"):
        read_text_files(tmp_path, {})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [70, 71]}')
    assert read_text_files(tmp_path, {"bos_token_id": 1, "vocab_size": 3}) == {
        "carried": {"generation_config.json": '{"eos_token_id": [70, 71]}'},
        "special_ids": {"bos_token_id": 1},
    }


# The rest compares with transformers.


def convert(folder, out):
    mt.reshard(folder, out)
    return load_model(out)


def greedy_of_transformers(folder, prompts, max_new_tokens=12, **options):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    is_t5 = json.loads((folder / "config.json").read_text())["model_type"] == "t5"
    kind = transformers.AutoModelForSeq2SeqLM if is_t5 else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", split_special_tokens=True)
        ids = inputs["input_ids"].long()
        with torch.no_grad():
            output = model.generate(
                **({"input_ids": ids, "attention_mask": torch.ones_like(ids)} if ids.shape[1] else {}),
                do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0, **options,
            )  # fmt: skip
        found.append(output[0, 1 if is_t5 else max(ids.shape[1], 1) :].tolist())
    return found


def greedy(model, prompts, **changes):
    options = dataclasses.replace(model.config.sample, **{"temperature": 0.0, "max_tokens": 12, **changes})
    return [each.tokens for each in complete_texts(model.engine, model.defaults, list(prompts), options)]


@pytest.fixture(scope="module")
def bos_folder(tmp_path_factory):
    """A Llama whose tokenizer adds <s>."""
    folder = tmp_path_factory.mktemp("bos")
    return save_folder(folder, make_llama(), with_template(llama_table(), ["<s>"], []), SPECIAL, {"bos_token_id": 1})


@pytest.mark.slow
def test_prompts_begin_as_in_transformers(bos_folder, tmp_path):
    model = convert(bos_folder, tmp_path / "out")
    wanted = greedy_of_transformers(bos_folder, PROMPTS)
    assert greedy(model, PROMPTS) == wanted
    without = greedy(model, PROMPTS[:1], add_special_tokens=False)
    assert without != wanted[:1], "the first token matters"
    assert greedy(model, [model.tokenizer.encode("hi there")]) == without, "token ids are taken as they are"
    assert greedy(load_model(str(bos_folder)), PROMPTS) == wanted, "the folder itself is a model too"
    library = mt.load_model(tmp_path / "out")
    completions = library.generate(list(PROMPTS), temperature=0.0, max_tokens=12)
    assert [each.tokens for each in completions] == wanted
    assert library.logits("hi").shape[0] == 1 + len(library.tokenizer.encode("hi"))
    mt.reshard(tmp_path / "out", tmp_path / "back", format="huggingface")
    assert greedy_of_transformers(tmp_path / "back", PROMPTS) == wanted


@pytest.mark.slow
def test_speculative_decoding_begins_and_ends_alike(bos_folder, tmp_path):
    prompts = ["hi hi hi hi hi", *PROMPTS]
    convert(bos_folder, tmp_path / "out")
    for name, extra in {"prompt-lookup": [], "draft-model": [f'serve.draft_model="{tmp_path / "out"}"']}.items():
        model = load_model(tmp_path / "out", [f'serve.speculative="{name}"', *extra])
        assert model.engine.is_speculative
        assert greedy(model, prompts) == greedy_of_transformers(bos_folder, prompts)


@pytest.mark.slow
def test_a_run_that_starts_from_a_model_folder_keeps_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "models"))
    generation = {"eos_token_id": [70, 71], "temperature": 0.5}
    table = with_template(llama_table(), ["<s>"], [])
    folder = save_folder(tmp_path / "model", make_llama(), table, SPECIAL, generation)
    (folder / "LICENSE").write_text("a license")
    (folder / "README.md").write_text("describes other weights")
    before = load_model(folder)
    (tmp_path / "text.txt").write_text("hi there " * 200)
    config = {
        "run": {"dir": str(tmp_path / "run"), "init_from": str(folder)},
        "model": config_to_dict(before.config)["model"],
        "data": {
            "train": {"texts": {"path": str(tmp_path / "text.txt")}},
            "tokenizer": str(folder / "tokenizer.json"),
            "cache_dir": str(tmp_path / "cache"),
        },
        "train": {"steps": 2, "batch_size": 8},
        "checkpoint": {"every": 1},
    }
    mt.train_model(parse_config(config, where="test"))
    tuned = load_model(tmp_path / "run")
    assert (tuned.step, tuned.defaults.eos_token_ids) == (2, (70, 71, EOS)), "documents end with </s>"
    assert tuned.defaults.sampling == {}, "the run has a [sample] section"
    mt.reshard(tmp_path / "run", tmp_path / "back", format="huggingface")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == generation
    assert (tmp_path / "back" / "LICENSE").read_text() == "a license"
    assert not (tmp_path / "back" / "README.md").exists()
    assert greedy(tuned, PROMPTS) == greedy_of_transformers(tmp_path / "back", PROMPTS)


ENDS = {
    "list in generation_config.json": (70, EOS, {"eos_token_id": [2, 70]}, "</s>"),
    "one in generation_config.json": (70, EOS, {"eos_token_id": 70}, "</s>"),
    "not that of config.json": (70, 70, {"eos_token_id": 2}, "</s>"),
    "list in config.json": (70, [2, 70], None, "</s>"),
    "one in config.json": (70, 70, None, "</s>"),
    "an unused <|endoftext|>": (264, EOS, {"eos_token_id": 2}, "</s>"),
    "</s> beside <|endoftext|>": (EOS, EOS, {"eos_token_id": 2}, "</s>"),
    "chatml": (266, 266, {"eos_token_id": 266}, "<|im_end|>"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_texts_end_as_in_transformers(name, tmp_path):
    token, config, generation, eos_token = ENDS[name]
    model = always(make_llama(eos_token_id=config), token)
    config = {"bos_token": "<s>", "eos_token": eos_token}
    folder = save_folder(tmp_path / "model", model, two_ends_table(), config, generation)
    wanted = greedy_of_transformers(folder, PROMPTS[:1], 5)
    assert set(wanted[0]) == {token}
    found = convert(folder, tmp_path / "out")
    assert greedy(found, PROMPTS[:1], max_tokens=5) == wanted
    assert (len(wanted[0]) == 5) == (name in ("an unused <|endoftext|>", "not that of config.json"))
    (completion,) = mt.load_model(tmp_path / "out").generate(["hi"], temperature=0.0, max_tokens=5, n=1)
    assert completion.finish == ("length" if len(wanted[0]) == 5 else "stop")


def save_t5(folder, start, generation_start):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    sizes = dict(vocab_size=272, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=start, eos_token_id=EOS, pad_token_id=0)
    )
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.6
    generation = {"decoder_start_token_id": generation_start, "eos_token_id": EOS, "pad_token_id": 0}
    table = with_template(llama_table(), [], ["</s>"])
    table["added_tokens"][0] = special(0, "<pad>")
    table["model"]["vocab"] = {"<pad>": 0, **{name: i for name, i in table["model"]["vocab"].items() if i}}
    table["model"]["unk_token"] = None
    return save_folder(folder, model.eval(), table, {"eos_token": "</s>", "pad_token": "<pad>"}, generation)


@pytest.mark.slow
def test_t5_starts_as_in_transformers(tmp_path):
    prompts = ["hi there", "a"]
    folder = save_t5(tmp_path / "seven", 7, 7)
    wanted = greedy_of_transformers(folder, prompts)
    assert wanted != greedy_of_transformers(save_t5(tmp_path / "zero", 0, 0), prompts), "the start matters"
    found = convert(folder, tmp_path / "out")
    assert greedy(found, prompts) == wanted
    mt.reshard(tmp_path / "out", tmp_path / "back", format="huggingface")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["decoder_start_token_id"] == 7
    assert greedy_of_transformers(tmp_path / "back", prompts) == wanted
    other = save_t5(tmp_path / "other", 7, 0)
    assert greedy(convert(other, tmp_path / "other_out"), prompts) == greedy_of_transformers(other, prompts)


@pytest.mark.slow
def test_a_t5_that_was_trained_here_starts_alike_in_transformers(save_run, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run = save_run(**T5 | dict(n_encoder_layers=1, d_ff=24, d_head=8, n_vocab=264, seq_len=64))
    model = load_model(run)
    [wanted] = greedy(model, ["hi there"])
    mt.reshard(run, tmp_path / "out", format="huggingface")
    exported = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[*b"hi there", 256]])
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert exported.generate(ids, **options)[0].tolist() == [256, *wanted]
    assert exported.generate(ids, **options, decoder_start_token_id=0)[0, 1:].tolist() != wanted, "the start matters"


@pytest.mark.slow
def test_settings_of_generation_config_are_defaults(tmp_path, device_sample):
    generation = {"do_sample": False, "repetition_penalty": 1.8, "max_new_tokens": 7, "num_beams": 1, "min_length": 3}
    folder = save_folder(
        tmp_path / "model", make_llama(), with_template(llama_table(), ["<s>"], []), SPECIAL, generation
    )
    convert(folder, tmp_path / "out")
    wanted = greedy_of_transformers(folder, PROMPTS[:1], 7)
    assert wanted != greedy_of_transformers(folder, PROMPTS[:1], 7, repetition_penalty=1.0)
    done = device_sample(tmp_path / "out", "--prompt", PROMPTS[0], "--json")
    assert [json.loads(line)["tokens"] for line in done.stdout.splitlines()] == wanted, done.stderr
    header, note = done.stderr.splitlines()
    assert header == (
        "sampling defaults of this model (generation_config.json): repetition_penalty=1.8, max_tokens=7, temperature=0.0"
    )
    assert note == "note: generation_config.json: min_length=3 has no effect (not supported)"
    changed = device_sample(
        tmp_path / "out", "--prompt", "</s>", "--json", "--max-tokens", 4, "--set", "sample.repetition_penalty=1.0",
        "--parse-special", "--no-add-special-tokens",
    )  # fmt: skip
    [line] = [json.loads(line) for line in changed.stdout.splitlines()]
    model = load_model(tmp_path / "out", ["sample.repetition_penalty=1.0"])
    assert model.config.sample == SampleConfig(max_tokens=7, temperature=0.0)
    assert [line["tokens"]] == greedy(model, [[EOS]], max_tokens=4)
    assert model.defaults.request_defaults == {"repetition_penalty": 1.0, "max_tokens": 7, "temperature": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_bos", "llama_eos_list", "llama_deepseek_eos", "llama_chatml_eos_ignored"])
def test_cases_that_failed(name, tmp_path):
    if not (CASES / name).is_dir():
        pytest.skip("the folder of cases is not here")
    shutil.copytree(CASES / name, tmp_path / "model")
    wanted = greedy_of_transformers(tmp_path / "model", PROMPTS)
    assert greedy(convert(tmp_path / "model", tmp_path / "out"), PROMPTS) == wanted


@pytest.mark.slow
def test_the_start_of_a_t5_that_failed(tmp_path):
    if not (CASES / "t5_start2").is_dir():
        pytest.skip("the folder of cases is not here")
    mt.reshard(CASES / "t5_start2", tmp_path / "out", tokenizer="bytes")
    mt.reshard(tmp_path / "out", tmp_path / "back", format="huggingface")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["decoder_start_token_id"] == 2
