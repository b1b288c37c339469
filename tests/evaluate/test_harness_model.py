# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness: the adapter agrees with the harness's `transformers` model, its API client, and its own tasks."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tokenizers
from hf_folders import always, make_llama, only_ascii, save_folder, two_ends_table, with_template
from reference_models import NEOX, draw, make_case, make_torch

from mesh_transformer.config import ConfigError
from mesh_transformer.data.errors import DataError
from mesh_transformer.evaluate.harness_tasks import TaskInputs, import_harness, make_task, run_tasks
from mesh_transformer.evaluate.loglikelihood import make_scorer
from mesh_transformer.evaluate.superglue import score_record
from mesh_transformer.evaluate.tasks import Example, read_examples
from mesh_transformer.sample.loading import load_model

ROOT = Path(__file__).parents[2]
pytest.importorskip("lm_eval", reason="the harness needs pip install 'mesh-transformer[evaluate]'")
from mesh_transformer.evaluate.harness_model import HarnessModel, split_continuation  # noqa: E402 (imports the harness)

pytestmark = pytest.mark.filterwarnings("default")  # warnings of the harness are not errors of this project

TOLERANCE = 1e-4  # nats of a continuation
TEXT = (
    "The mesh of devices holds every layer, and each token knows its place. Where are the tokens? Here they are, " * 3
)
PAIRS = [
    ("The mesh of devices", " holds every layer"),
    ("Where are the tokens?", " Here"),
    ("", "each token knows"),
    ("a context that ends in a space ", "and goes on"),
    (TEXT, " The mesh"),  # its beginning has to go
    ("é and ü", ", nothing known"),
]
GREEDY = {"until": ["."], "do_sample": False, "max_gen_toks": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random `transformers` model with a small vocabulary."""
    path = tmp_path_factory.mktemp("neox")
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    library.save(str(path / "tokenizer.json"))
    n_vocab = library.get_vocab_size()
    sizes = dict(n_layers=2, d_model=32, n_heads=4, n_vocab=n_vocab, seq_len=64)
    case = make_case("gpt_neox", {**NEOX, "rope_dims": 4}, n_vocab, **sizes)
    model, parameters = make_torch(case)
    torch = pytest.importorskip("torch", reason="the live comparison needs pip install transformers torch")
    weights, _, _ = draw(case, parameters, seed=3)
    for name, parameter in parameters.items():
        parameter.data = torch.tensor(weights[name])
    model.save_pretrained(path)
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return path


@pytest.fixture(scope="module")
def reference_model(folder):
    pytest.importorskip("accelerate", reason="the harness's own model needs pip install transformers torch accelerate")
    return import_harness("lm_eval.models.huggingface").HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=1
    )


@pytest.fixture(scope="module")
def native_model(folder):
    trained = load_model(str(folder))
    return HarnessModel(make_scorer(trained.engine), trained.defaults, trained.engine)


def ask(model: Any, kind: str, arguments: list[tuple]) -> list:
    instance = import_harness("lm_eval.api.instance").Instance
    return getattr(model, kind)([instance(kind, {}, of_it, i) for i, of_it in enumerate(arguments)])


def test_likelihoods_are_those_of_the_harness_own_model(native_model, reference_model):
    for (mine, greedy), (wanted, is_best) in zip(
        ask(native_model, "loglikelihood", PAIRS), ask(reference_model, "loglikelihood", PAIRS), strict=True
    ):
        assert mine == pytest.approx(wanted, abs=TOLERANCE)
        assert greedy == is_best


def test_rolling_likelihoods_are_those_of_the_harness_own_model(native_model, reference_model):
    texts = [(TEXT,), (TEXT * 2,), ("short",)]
    assert len(native_model.tok_encode(TEXT * 2)) > 2 * native_model.max_length
    np.testing.assert_allclose(
        ask(native_model, "loglikelihood_rolling", texts),
        ask(reference_model, "loglikelihood_rolling", texts),
        rtol=1e-6,
    )


def test_answers_are_those_of_the_harness_own_model(native_model, reference_model):
    prompts = [(context, GREEDY) for context, _ in PAIRS[:2]]
    answers = ask(native_model, "generate_until", prompts)
    assert answers == ask(reference_model, "generate_until", prompts)
    assert any(answers)


def make_pair(folder: Path) -> tuple[Any, Any]:
    """Return our model and the harness's own model of a folder."""
    pytest.importorskip("accelerate", reason="the harness's own model needs pip install transformers torch accelerate")
    trained = load_model(str(folder))
    own = import_harness("lm_eval.models.huggingface").HFLM
    reference = own(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    return HarnessModel(make_scorer(trained.engine), trained.defaults, trained.engine), reference


BEGINNINGS = {  # before a text, after it, bos_token, eos_token
    "added": (["<s>"], [], "<s>", "</s>"),
    "not added": ([], [], "<s>", "</s>"),
    "none": ([], [], None, "<|im_end|>"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BEGINNINGS)
def test_texts_begin_as_in_the_harness_own_model(name, tmp_path):
    before, after, bos, eos = BEGINNINGS[name]
    table = with_template(two_ends_table(), before, after)
    config = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    folder = save_folder(
        tmp_path / "model", only_ascii(make_llama()), table, config, {"eos_token_id": 2, "repetition_penalty": 1.4}
    )
    mine, reference = make_pair(folder)
    assert mine.prefix_token_id == reference.prefix_token_id == (1 if bos else 266)
    assert mine.eot_token_id == reference.eot_token_id
    pairs = [*PAIRS, ("<s>Where are", " the"), ("<s>", "a"), ("", "</s>hi<|im_end|>")]
    for text in {text for pair in pairs for text in pair}:
        assert mine.tok_encode(text) == reference.tok_encode(text)
        assert mine.tok_encode(text, add_special_tokens=False) == reference.tok_encode(text, add_special_tokens=False)
    for (found, greedy), (wanted, is_best) in zip(
        ask(mine, "loglikelihood", pairs), ask(reference, "loglikelihood", pairs), strict=True
    ):
        assert found == pytest.approx(wanted, rel=1e-6, abs=TOLERANCE)
        assert greedy == is_best
    texts = [(TEXT,), ("short",), ("",), ("<s>short",)]
    found, wanted = (ask(model, "loglikelihood_rolling", texts) for model in (mine, reference))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    prompts = [("hi there", {"until": [], "max_gen_toks": 20}), ("<s>hi", GREEDY), (TEXT, GREEDY), ("a</s>b", GREEDY)]
    assert ask(mine, "generate_until", prompts) == ask(reference, "generate_until", prompts)


@pytest.mark.slow
def test_answers_end_as_in_the_harness_own_model(tmp_path):
    """At every end of generation_config.json, and at the tokenizer's own."""
    for token, generation in {70: {"eos_token_id": [2, 70]}, 266: {"eos_token_id": 2}}.items():
        config = {"eos_token": "<|im_end|>", "bos_token": "<s>"}
        model = always(make_llama(), token)
        mine, reference = make_pair(
            save_folder(tmp_path / str(token), model, with_template(two_ends_table(), [], []), config, generation)
        )
        prompts = [("hi", {"until": [], "max_gen_toks": 20})]
        [answer] = ask(mine, "generate_until", prompts)
        assert len(answer) <= 1, "it would have 20 characters"
        assert [answer] == ask(reference, "generate_until", prompts)


def test_the_harness_client_gets_the_same_numbers_from_our_server(folder, native_model, tmp_path):
    """The client is local-completions with token ids, echo and logprobs."""
    pytest.importorskip("tenacity", reason="the harness's client needs pip install 'lm_eval[api]'")
    subprocess.run(
        [sys.executable, "scripts/reshard_checkpoint.py", str(folder), str(tmp_path / "run")], cwd=ROOT, check=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    command = [sys.executable, "device_serve.py", str(tmp_path / "run"), "--port", "0", "--set=serve.warmup_tokens=0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            client = import_harness("lm_eval.models.openai_completions").LocalCompletionsAPI(
                model="run",
                base_url=f"http://127.0.0.1:{port}/v1/completions",
                tokenizer=str(folder),
                max_length=native_model.max_length - 1,  # the client requests one more token, which must fit as well
                batch_size=1,
            )
            pairs = [pair for pair in PAIRS if pair[0] != TEXT]
            for (served, is_best), (mine, greedy) in zip(
                ask(client, "loglikelihood", pairs), ask(native_model, "loglikelihood", pairs), strict=True
            ):
                assert served == pytest.approx(mine, abs=TOLERANCE)
                assert greedy == is_best
        finally:
            server.terminate()


RECORDS: dict[str, tuple[str, dict[str, Any]]] = {
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        dict(
            activity_label="Baking", ctx_a="A man [note] stands.", ctx_b="he [title] kneads",
            endings=["it.", "[step]  two.", "three.", "four."], label="1",
        ),
    ),
    "piqa": ("piqa/piqa.yaml", dict(goal="Cut bread", sol1="with a knife", sol2="with a spoon", label=0)),
    "winogrande": (
        "winogrande/default.yaml",
        dict(sentence="Ann gave Eve the book because _ had read it.", option1="Ann", option2="Eve", answer="1"),
    ),
    "arc_easy": (
        "arc/arc_easy.yaml",
        dict(question="Which is hot?", choices={"text": ["ice", "fire"], "label": ["A", "B"]}, answerKey="B"),
    ),
    "sciq": (
        "sciq/sciq.yaml",
        dict(support=" Fire is hot.", question="Hot?", distractor1="a", distractor2="b", distractor3="c", correct_answer="d"),
    ),
    "boolq": ("super_glue/boolq/default.yaml", dict(passage="Fire is hot.", question="is fire hot", label=1)),
    "copa": (
        "super_glue/copa/default.yaml",
        dict(premise="It broke. ", choice1="It fell.", choice2="It flew.", question="cause", label=0),
    ),
    "cb": ("super_glue/cb/default.yaml", dict(premise="He ran.", hypothesis="He moved", label=2)),
    "rte": ("super_glue/rte/default.yaml", dict(premise="He ran.", hypothesis="He moved.", label=1)),
    "wic": (
        "super_glue/wic/default.yaml",
        dict(sentence1="A bank of sand.", sentence2="The bank lends.", start1=2, end1=6, word="bank", label=0),
    ),
    "wsc": (
        "super_glue/wsc/default.yaml",
        dict(
            text="The men refused it because They feared it.", span1_index=0, span1_text="The men", span2_index=5,
            span2_text="They", label=1,
        ),
    ),
    "record": (
        "super_glue/record/default.yaml",
        dict(
            passage="Ann met Bob in Rome.\n@highlight\nAnn is happy", query="@placeholder was met",
            entities=["Rome", "Ann", "Bob"], answers=["Bob"],
        ),
    ),
    "lambada": ("lambada/lambada_openai.yaml", dict(text="She took the key and opened the door")),
}  # fmt: skip


# The same as authors publish it, where the Hub has another form.
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "arc_easy": dict(
        question={"stem": "Which is hot?", "choices": [dict(text="ice", label="A"), dict(text="fire", label="B")]},
        answerKey="B",
    ),
    "boolq": RECORDS["boolq"][1] | {"label": True},
    "cb": RECORDS["cb"][1] | {"label": "neutral"},
    "rte": RECORDS["rte"][1] | {"label": "not_entailment"},
    "wic": RECORDS["wic"][1] | {"label": False},
    "winogrande": RECORDS["winogrande"][1] | {"answer": 1},
    "hellaswag": RECORDS["hellaswag"][1] | {"label": 1},
    "wsc": dict(
        text="The men refused it because They feared it.",
        target=dict(span1_index=0, span1_text="the men.", span2_index=5, span2_text="they"),
        label=True,
    ),
    "record": dict(
        passage=dict(
            text="Ann met Bob in Rome.\n@highlight\nAnn is happy",
            entities=[dict(start=0, end=2), dict(start=8, end=10), dict(start=15, end=18), dict(start=32, end=34)],
        ),
        qas=[dict(query="@placeholder was met", answers=[dict(text="Bob"), dict(text="Bob")])],
    ),
}


def make_reference_task(name: str, requests: list[dict], examples: list[dict], shots: int) -> Any:
    """Return the harness's own task over Hub records, set up as in its simple_evaluate."""
    path, _ = RECORDS[name]
    lm_eval, tasks = import_harness(), import_harness("lm_eval.api.task")
    dataset = import_harness("datasets").Dataset
    config = import_harness("lm_eval.tasks._yaml_loader").load_yaml(Path(lm_eval.__file__).parent / "tasks" / path)
    sets = {"train": dataset.from_list(examples), **dict.fromkeys(("validation", "test"), dataset.from_list(requests))}
    for key in ("dataset_path", "dataset_name", "tag"):
        config.pop(key, None)
    task = tasks.ConfigurableTask(config=config | {"custom_dataset": lambda **_: sets, "num_fewshot": shots})
    task.set_fewshot_seed(1234)
    return task


def describe(task: Any) -> list:
    """Return the requests of a task, and its results for some answers."""
    task.build_all_requests()
    of_one = [instance for instance in task.instances if instance.doc_id == 0]
    requests = [instance.args for instance in task.instances]
    if task.config.task == "record":
        return [requests]
    return [requests, task.process_results(task.eval_docs[0], [(-float(i), False) for i in range(len(of_one))])]


def vary(record: dict, number: int) -> dict:
    """Return a variant of a record."""
    field = next(
        name
        for name in ("text", "passage", "premise", "goal", "support", "sentence", "question", "ctx_a", "sentence1")
        if name in record
    )
    return record | {field: f"{number} {record[field]}" if field != "text" else f"{record[field]} {number}"}


@pytest.mark.parametrize("name", RECORDS)
def test_tasks_have_the_requests_of_the_harness(name, tmp_path, monkeypatch):
    """The harness's own task, given the same records, has the same requests, examples and correct answers."""
    if name == "record":  # it imports modules that newer versions of transformers lack, and does not use them
        pytest.importorskip("transformers", reason="the harness's ReCoRD imports transformers")
        for module in ("transformers.data.metrics", "transformers.data.metrics.squad_metrics"):
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
    record, file = RECORDS[name][1], tmp_path / "records.jsonl"
    file.write_text(json.dumps(AS_PUBLISHED.get(name, record)))
    task = make_task(name, TaskInputs(read_examples(name, str(file))))
    reference = make_reference_task(name, [record], [record], 0)
    assert describe(task) == describe(reference)
    assert len(task.instances) > 1 or name == "lambada"
    if name == "lambada":  # its definition has no training records
        return
    requests, examples = [vary(record, i) for i in range(3)], [vary(record, i) for i in range(10, 18)]
    items, shown = ([Example(one, "") for one in read_back(name, of_it, tmp_path)] for of_it in (requests, examples))
    task = make_task(name, TaskInputs(items, shown, 3))
    reference = make_reference_task(name, requests, examples, 3)
    wanted = describe(reference)
    assert describe(task) == wanted
    prompts = {arguments[0] for arguments in wanted[0]}
    assert len(prompts) >= 3, "few-shot examples are sampled for every question"
    assert describe(make_task(name, TaskInputs(items, shown, 3))) == wanted, "the same examples every time"


def read_back(name: str, records: list[dict], folder: Path) -> list[dict]:
    file = folder / "several.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [item.record for item in read_examples(name, str(file))]


def test_multirc_counts_correct_answers(tmp_path):
    """F1a over all answers and EM over questions, as its authors do; the harness's definition swaps yes and no."""
    answers = [[("a", 1), ("b", 0)], [("c", 1), ("d", 1)]]
    questions = [
        dict(question=f"q{i}?", idx=i, answers=[dict(text=t, label=label, idx=j) for j, (t, label) in enumerate(of_it)])
        for i, of_it in enumerate(answers)
    ]
    file = tmp_path / "multirc.jsonl"
    file.write_text(json.dumps(dict(idx=7, passage=dict(text="P.", questions=questions))))
    task = make_task("multirc", TaskInputs(read_examples("multirc", str(file))))
    task.build_all_requests()
    requests = [instance.args for instance in task.instances]
    assert requests[:2] == [
        ("P.\nQuestion: q0?\nAnswer:", f" a\nIs the answer correct? {word}") for word in ("no", "yes")
    ]
    said = [1, 0, 1, 0]  # all but the last are right
    judged = [
        task.process_results(doc, [(-1.0, False), (-0.5 if yes else -2.0, False)])
        for doc, yes in zip(task.eval_docs, said, strict=True)
    ]
    averages = {name: task.aggregation()[name]([one[name] for one in judged]) for name in ("acc", "f1a", "em")}
    assert averages == {"acc": 0.75, "f1a": pytest.approx(2 * 2 / (2 + 3)), "em": 0.5}
    utils = import_harness("lm_eval.tasks._yaml_loader")._load_module_with_cache(
        Path(import_harness().__file__).parent / "tasks/super_glue/multirc/t5_utils.py"
    )
    assert averages["f1a"] == pytest.approx(utils.agg_f1([one["f1a"] for one in judged]))
    in_groups = [
        (str(one["em"][0]), int(yes), label)
        for one, yes, (_, label) in zip(judged, said, answers[0] + answers[1], strict=True)
    ]
    assert averages["em"] == utils.agg_em(in_groups)


def test_record_counts_words_and_whole_answers():
    """The best score over all correct answers, without case, punctuation and articles, as in SQuAD."""
    document = {"entities": ["The Hague", "Rome", "New York City"], "answers": ["hague.", "York"]}
    for likeliest, expected in ((0, (1.0, 1.0)), (1, (0.0, 0.0)), (2, (0.5, 0.0))):
        answers = [(float(i == likeliest), False) for i in range(3)]
        assert tuple(score_record(document, answers).values()) == pytest.approx(expected)


def test_classes_of_cb_count_alike():
    """CB is scored by macro-F1, as the harness defines it."""
    items = [Example(dict(premise="p", hypothesis="h", label=label), "") for label in (0, 0, 0, 1, 2, 2)]
    task = make_task("cb", TaskInputs(items))
    predictions = (0, 0, 1, 1, 2, 0)
    judged = [
        task.process_results(doc, [(-float(i != said), False) for i in range(3)])["f1"]
        for doc, said in zip(task.eval_docs, predictions, strict=True)
    ]
    assert task.aggregation()["f1"](judged) == pytest.approx(np.mean([2 * 2 / 6, 2 * 1 / 3, 2 * 1 / 3]))


def test_results_have_the_harness_form(native_model):
    records = [{"query": TEXT[:40], "choices": [" a", " mesh", " of"], "gold": gold} for gold in (0, 1, 2, 1)]
    line = [{"query": TEXT, "target": "devices"}]
    with warnings.catch_warnings():
        found = run_tasks(
            native_model,
            {name: TaskInputs([Example(one, "") for one in of_it], num_fewshot=0)
             for name, of_it in (("local_choice", records), ("local_line", line))},
        )  # fmt: skip
    results = found["results"]["local_choice"]
    likelihoods = np.array(
        [
            [total for total, _ in ask(native_model, "loglikelihood", [(i["query"], c) for c in i["choices"]])]
            for i in records
        ]
    )
    assert results["acc,none"] == np.mean(likelihoods.argmax(1) == [0, 1, 2, 1])
    assert 0 < results["acc_stderr,none"] < 1
    assert found["n-samples"]["local_choice"] == {"original": 4, "effective": 4}
    assert found["n-samples"]["local_line"]["cut"] == 1, "its prompt is longer than the model reads"
    assert found["n-shot"] == {"local_choice": 0, "local_line": 0}
    assert found["results"]["local_line"]["exact_match,none"] == 0.0
    assert "acc_norm,none" in results


DEFINITION = """
task: sums
dataset_path: nowhere
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "{{question}} ="
doc_to_target: "{{answer}}"
generation_kwargs: {until: [" "], max_gen_toks: 4}
num_fewshot: 2
"""


def test_a_definition_named_by_its_file(native_model, tmp_path):
    """The definition's num_fewshot is used; a record that its templates cannot read is an error with its line."""
    (tmp_path / "sums.yaml").write_text(DEFINITION)
    name = str(tmp_path / "sums.yaml")
    items = [Example({"question": f"{i} + 1", "answer": f"{i + 1}"}, f"sums.jsonl:{i + 1}") for i in range(5)]
    task = make_task(name, TaskInputs(items[:2], items[2:]))
    task.build_all_requests()
    prompt, kwargs = task.instances[0].args
    assert prompt.endswith("\n\n0 + 1 =")
    assert prompt.count("=") == 3
    assert kwargs["until"] == [" "]
    assert run_tasks(native_model, {name: TaskInputs(items[:2], items[2:])})["n-shot"] == {"sums": 2}
    with pytest.raises(
        ConfigError,
        match="needs 2 examples, got 0; give training records with --fewshot-data sums=FILE",
    ):
        make_task(name, TaskInputs(items))
    broken = [items[0], Example({"question": "1 + 1"}, "sums.jsonl:2")]
    with pytest.raises(DataError, match=r"sums\.jsonl:2: task .*'answer' is undefined.* it has the fields question"):
        make_task(name, TaskInputs(broken, num_fewshot=0))
    with pytest.raises(ConfigError, match=r"absent\.yaml nor .*absent\.yaml exists"):
        make_task("absent.yaml", TaskInputs(items))
    assert make_task("gsm8k/gsm8k.yaml", TaskInputs(items, num_fewshot=0)).config.task == "gsm8k"


def test_requests_that_cannot_be_served_are_errors(folder):
    trained = load_model(str(folder))
    adapter = HarnessModel(make_scorer(trained.engine), trained.defaults)
    with pytest.raises(ConfigError, match="needs a sampling engine"):
        ask(adapter, "generate_until", [("a", GREEDY)])
    with pytest.raises(ConfigError, match=r"continuation .* has no tokens"):
        ask(adapter, "loglikelihood", [("a", "")])


@pytest.mark.parametrize(("n_context", "n"), [(1, 8), (30, 8), (3, 9), (20, 30)])
def test_continuations_are_scored_once_however_long(n_context, n):
    queries = split_continuation(range(100, 100 + n_context), range(n), 8)
    assert [token for query in queries for token in query.tokens[-query.n_scored :]] == list(range(n))
    assert all(query.n_scored < len(query.tokens) <= 9 for query in queries)
    assert len(queries) == 1 or all(len(query.tokens) - query.n_scored >= 4 for query in queries[1:])
