# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The server of a converted model: prompts begin, texts end, and sampling defaults are as its Hugging Face files say.

It decodes speculatively, which changes no output.
"""

import pytest
from hf_folders import make_llama, only_ascii, save_folder, with_template
from server_process import TOKEN, Server
from small_tokenizers import llama_table

import mesh_transformer as mt

pytest.importorskip("openai")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [2, 70],
    "do_sample": False,
    "repetition_penalty": 1.2,
    "max_new_tokens": 9,
    "num_beams": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}
    table = with_template(llama_table(), ["<s>"], [])
    return save_folder(tmp_path_factory.mktemp("model"), only_ascii(make_llama()), table, config, GENERATION)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "converted"
    mt.reshard(folder, run)
    (run / "token").write_text(TOKEN + "\n")
    server = Server(run, speculative="prompt-lookup")
    server.wait()
    yield server
    server.kill()


def generate(folder, prompt, **options):
    """Return the text of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt", split_special_tokens=True)["input_ids"].long()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=1, pad_token_id=0, **options)
    return tokenizer.decode([*ids[0], *output[0, ids.shape[1] :]], skip_special_tokens=True)


def test_completions_are_those_of_transformers(server, folder):
    for prompt in ("hi there", "", "a </s> b"):
        [choice] = server.complete(prompt=prompt, echo=True)["choices"]
        assert choice["text"] == generate(folder, prompt), "without a parameter in the request"
    longer = server.complete(prompt="hi there", echo=True, max_tokens=20, repetition_penalty=1.0)["choices"][0]["text"]
    assert longer == generate(folder, "hi there", max_new_tokens=20, repetition_penalty=1.0)
    drawn = [server.complete(prompt="hi there", temperature=2.0, seed=i)["choices"][0]["text"] for i in range(3)]
    assert len(set(drawn)) == 3, "a request can sample"


def test_draft_tokens_are_counted(server):
    names = [f"mesh_transformer_spec_decode_num_{kind}_tokens_total" for kind in ("draft", "accepted")]
    before = [server.metric(name) for name in names]
    server.complete(prompt="a a a a a a a a", max_tokens=9, logit_bias={"71": 100})
    drafted, accepted = (server.metric(name) - earlier for name, earlier in zip(names, before, strict=True))
    assert drafted >= accepted > 0, "the tokens repeat, so some of them are drafted"


def test_special_tokens_of_prompts(server):
    def count(**body):
        return server.complete(prompt="</s>", max_tokens=1, **body)["usage"]["prompt_tokens"]

    text = count(add_special_tokens=False)
    assert text > 1
    assert count() == text + 1
    assert (count(parse_special=True), count(parse_special=True, add_special_tokens=False)) == (2, 1)
    scored = server.complete(prompt="hi", max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]
    assert (scored["tokens"][0], scored["text_offset"][:2]) == ("<|1|>", [0, 0])
    assert scored["token_logprobs"][0] is None
    assert scored["token_logprobs"][1] < 0.0
    status, _, body = server.call(
        "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "</s>"}], "parse_special": True}
    )
    assert (status, body["error"]["param"]) == (400, "parse_special"), "special tokens in messages are text"


def test_texts_end_at_every_end(server):
    for end in (2, 70):
        done = server.complete(prompt="a", max_tokens=8, logit_bias={str(end): 100})
        assert (done["usage"]["completion_tokens"], done["choices"][0]["finish_reason"]) == (1, "stop")
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 8, "logit_bias": {str(end): 100}}
        _, _, answered = server.call("POST", "/v1/chat/completions", chat)
        assert (answered["usage"]["completion_tokens"], answered["choices"][0]["finish_reason"]) == (1, "stop")
    going_on = server.complete(prompt="a", max_tokens=8, logit_bias={"71": 100})
    assert going_on["choices"][0]["finish_reason"] == "length"
    [choice] = server.complete(prompt="a", max_tokens=8, guided_regex="[b-d]{3}")["choices"]
    assert (len(choice["text"]), choice["finish_reason"]) == (3, "stop")


def test_defaults_are_shown(server):
    lines = server.stderr.read_text().splitlines()
    wanted = [
        "sampling defaults of this model (generation_config.json): repetition_penalty=1.2, max_tokens=9, temperature=0.0",
        "note: generation_config.json: num_beams=2 has no effect (not supported)",
    ]
    assert [line for line in lines if "generation_config" in line] == wanted
    _, _, card = server.call("GET", "/v1/models/converted")
    assert (card["defaults"]["temperature"], card["defaults"]["repetition_penalty"]) == (0.0, 1.2)
