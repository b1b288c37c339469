# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness: our adapter = its own model of `transformers` = its own client before our server; tasks as it has them."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from reference_models import NEOX, draw, make_case, make_torch

from mesh_transformer.config import ConfigError
from mesh_transformer.evaluate.harness import cut_continuation, import_harness, make_adapter, make_task, run_tasks
from mesh_transformer.evaluate.likelihood import make_scorer
from mesh_transformer.evaluate.tasks import TASKS, read_items
from mesh_transformer.evaluate.trained import open_trained

ROOT = Path(__file__).parents[2]
pytest.importorskip("lm_eval", reason="the harness needs pip install 'mesh-transformer[evaluate]'")
pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to mend

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
    """A random model of `transformers` with a small vocabulary of its own."""
    path = tmp_path_factory.mktemp("neox")
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    library.save(str(path / "tokenizer.json"))
    n_vocab = library.get_vocab_size()
    sizes = dict(n_layers=2, d_model=32, n_heads=4, n_vocab=n_vocab, seq_len=64)
    case = make_case("gpt_neox", {**NEOX, "rotary_dims": 4}, n_vocab, **sizes)
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
def theirs(folder):
    pytest.importorskip("accelerate", reason="the harness's own model needs pip install transformers torch accelerate")
    return import_harness("lm_eval.models.huggingface").HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=1
    )


@pytest.fixture(scope="module")
def ours(folder):
    trained = open_trained(str(folder))
    return make_adapter(make_scorer(trained.engine), trained.tokenizer, trained.engine)


def ask(model: Any, kind: str, arguments: list[tuple]) -> list:
    instance = import_harness("lm_eval.api.instance").Instance
    return getattr(model, kind)([instance(kind, {}, of_it, i) for i, of_it in enumerate(arguments)])


def test_likelihoods_are_those_of_the_harness_own_model(ours, theirs):
    for (mine, greedy), (wanted, is_best) in zip(
        ask(ours, "loglikelihood", PAIRS), ask(theirs, "loglikelihood", PAIRS), strict=True
    ):
        assert mine == pytest.approx(wanted, abs=TOLERANCE)
        assert greedy == is_best


def test_rolling_likelihoods_are_those_of_the_harness_own_model(ours, theirs):
    texts = [(TEXT,), (TEXT * 2,), ("short",)]
    assert len(ours.tok_encode(TEXT * 2)) > 2 * ours.max_length
    np.testing.assert_allclose(
        ask(ours, "loglikelihood_rolling", texts), ask(theirs, "loglikelihood_rolling", texts), rtol=1e-6
    )


def test_answers_are_those_of_the_harness_own_model(ours, theirs):
    prompts = [(context, GREEDY) for context, _ in PAIRS[:2]]
    answers = ask(ours, "generate_until", prompts)
    assert answers == ask(theirs, "generate_until", prompts)
    assert any(answers)


def test_the_harness_client_gets_the_same_numbers_from_our_server(folder, ours, tmp_path):
    """Its local-completions with token ids, echo and logprobs."""
    pytest.importorskip("tenacity", reason="the harness's client needs pip install 'lm_eval[api]'")
    subprocess.run(
        [sys.executable, "scripts/reshard_checkpoint.py", str(folder), str(tmp_path / "run")], cwd=ROOT, check=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    command = [sys.executable, "device_serve.py", str(tmp_path / "run"), "--port", "0", "--set=serve.warm_up=0"]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            client = import_harness("lm_eval.models.openai_completions").LocalCompletionsAPI(
                model="run",
                base_url=f"http://127.0.0.1:{port}/v1/completions",
                tokenizer=str(folder),
                max_length=ours.max_length - 1,  # it asks for one token more, which has to fit as well
                batch_size=1,
            )
            pairs = [pair for pair in PAIRS if pair[0] != TEXT]
            for (served, is_best), (mine, greedy) in zip(
                ask(client, "loglikelihood", pairs), ask(ours, "loglikelihood", pairs), strict=True
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
    "lambada": ("lambada/lambada_openai.yaml", dict(text="She took the key and opened the door")),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_tasks_ask_what_the_harness_asks(name, tmp_path):
    """Its own task of this name, given the same record, has the same requests and the same right answer."""
    path, record = RECORDS[name]
    lm_eval, tasks = import_harness(), import_harness("lm_eval.api.task")
    dataset = import_harness("datasets").Dataset.from_list([record])
    loader = import_harness("lm_eval.tasks._yaml_loader")
    config = loader.load_yaml(Path(lm_eval.__file__).parent / "tasks" / path)
    config |= {"custom_dataset": lambda **_: {"train": dataset, "validation": dataset, "test": dataset}}
    for key in ("dataset_path", "dataset_name", "tag", "training_split"):
        config.pop(key, None)
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(record))
    asked = []
    for task in (tasks.ConfigurableTask(config=config), make_task(name, read_items(name, str(file)))):
        task.build_all_requests()
        asked.append([instance.args for instance in task.instances])
        answers = [(-float(i), False) for i in range(len(task.instances))]
        asked[-1].append(task.process_results(task.eval_docs[0], answers)["acc"])
    assert asked[0] == asked[1]
    assert len(asked[0]) > 1


def test_results_have_the_harness_form(ours):
    items = [{"query": TEXT[:40], "choices": [" a", " mesh", " of"], "gold": gold} for gold in (0, 1, 2, 1)]
    line = [{"query": "The mesh of", "target": "devices"}]
    with warnings.catch_warnings():
        found = run_tasks(ours, {"local_choice": items, "local_line": line})
    results = found["results"]["local_choice"]
    likelihoods = np.array(
        [[total for total, _ in ask(ours, "loglikelihood", [(i["query"], c) for c in i["choices"]])] for i in items]
    )
    assert results["acc,none"] == np.mean(likelihoods.argmax(1) == [0, 1, 2, 1])
    assert 0 < results["acc_stderr,none"] < 1
    assert found["n-samples"]["local_choice"] == {"original": 4, "effective": 4}
    assert found["results"]["local_line"]["exact_match,none"] == 0.0
    assert set(TASKS["local_choice"].metrics) == {
        key.split(",")[0] for key in results if key.startswith("acc") and "err" not in key
    }


def test_training_generates_nothing(folder):
    trained = open_trained(str(folder))
    adapter = make_adapter(make_scorer(trained.engine), trained.tokenizer)
    with pytest.raises(ConfigError, match="leave such tasks out"):
        ask(adapter, "generate_until", [("a", GREEDY)])
    with pytest.raises(ConfigError, match="no tokens in the continuation"):
        ask(adapter, "loglikelihood", [("a", "")])


@pytest.mark.parametrize(("n_context", "n"), [(1, 8), (30, 8), (3, 9), (20, 30)])
def test_continuations_are_scored_once_however_long(n_context, n):
    queries = cut_continuation(range(100, 100 + n_context), range(n), 8)
    assert [token for query in queries for token in query.tokens[-query.n_scored :]] == list(range(n))
    assert all(query.n_scored < len(query.tokens) <= 9 for query in queries)
    assert len(queries) == 1 or all(len(query.tokens) - query.n_scored >= 4 for query in queries[1:])
