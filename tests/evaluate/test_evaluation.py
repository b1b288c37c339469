# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation: device_evaluate.py, evaluation during training, the report, synthetic tasks, and invalid configurations."""

import json
import math
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard
from tiny_run import write_tiny_run

import device_evaluate
import mesh_transformer.evaluate.checkpoint_eval as evaluate_module
from mesh_transformer.config import Config, load_config
from mesh_transformer.data.errors import DataError, Document
from mesh_transformer.data.readers import read_documents
from mesh_transformer.data.tokenizers import ByteTokenizer
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.evaluate.callback import make_measure
from mesh_transformer.evaluate.evaluation import check_tasks
from mesh_transformer.evaluate.published import find_published, pile_components, read_published
from mesh_transformer.evaluate.synthetic_tasks import CONTEXT, END, make_choices, make_clozes, make_lines
from mesh_transformer.evaluate.tasks import TASKS, read_examples
from mesh_transformer.evaluate.texts import read_texts
from mesh_transformer.mesh import make_layout
from mesh_transformer.reports.evaluation_results import (
    draw_evaluations,
    make_tables,
    metrics_of,
    read_evaluations,
    write_evaluation,
)
from mesh_transformer.reports.metrics_log import read_metrics
from mesh_transformer.train.session import train_config

HAS_HARNESS = True
try:
    import lm_eval  # noqa: F401
except ImportError:
    HAS_HARNESS = False
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="the harness needs pip install 'mesh-transformer[evaluate]'")


def write_config(folder: Path) -> Path:
    for i in range(12):
        path = folder / "texts" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"Text {i} of a few.\n" + " ".join(f"word{chr(97 + (i * j) % 7)}" for j in range(300)) + "\n")
    path = folder / "small.toml"
    write_tiny_run(
        path,
        folder / "texts",
        folder / "run",
        model=dict(seq_len=64),
        data=dict(holdout_one_in=4),
        train=dict(steps=4, batch_size=8),
        evaluate=dict(tasks=["text"], every=2),
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Config]:
    """A run that was evaluated at steps 2 and 4."""
    config = load_config(write_config(tmp_path_factory.mktemp("evaluate")))
    train_config(config, make_layout(config.mesh), StopRequest(message=""), measure=make_measure(config))
    return Path(config.run.dir), config


def run_program(capsys, *arguments: str) -> tuple[dict, str]:
    assert device_evaluate.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_training_and_the_program_give_the_same_results(trained, capsys):
    run_dir, _ = trained
    evaluations = read_evaluations(run_dir)
    assert list(evaluations) == [2, 4]
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "benchmark"]
    assert [line["step"] for line in lines] == [2, 4]
    bits = [metrics_of(evaluation)["text:texts.bits_per_byte"] for evaluation in evaluations.values()]
    assert [line["text:texts.bits_per_byte"] for line in lines] == bits
    assert bits[0] != bits[1]
    found, err = run_program(capsys, str(run_dir))
    assert metrics_of(found)["text:texts.bits_per_byte"] == pytest.approx(bits[1], rel=1e-5)
    assert "evaluation_4.json" in err
    page = (run_dir / "report.html").read_text()
    assert "Evaluation, step 4" in page
    assert "Bits per byte of texts" in page, "two steps make a curve"


def test_held_out_text_is_that_of_the_validation_loss(trained):
    """Validation packs documents and counts end-of-text tokens, but scores the same bytes."""
    run_dir, config = trained
    documents = list(read_texts(config, ByteTokenizer(), []))
    assert {name for name, _ in documents} == {"texts"}
    n_bytes = read_evaluations(run_dir)[4]["results"]["text:texts"]["bytes,none"]
    assert n_bytes == sum(len(document.text.encode()) for _, document in documents) > 0
    assert len(documents) < 12


def test_components_are_scored_separately_and_weighted(trained, tmp_path, capsys):
    run_dir, _ = trained
    records = [{"text": "one " * n, "meta": {"pile_set_name": name}} for name, n in (("A", 30), ("B", 9), ("A", 4))]
    file = tmp_path / "part.jsonl.zst"
    file.write_bytes(zstandard.compress("\n".join(map(json.dumps, records)).encode()))
    found, _ = run_program(
        capsys, str(run_dir), "--data", f"pile={file}", "--set", 'evaluate.group_key="meta.pile_set_name"'
    )
    results = found["results"]
    a, b, total = (results[name]["bits_per_byte,none"] for name in ("text:A", "text:B", "text"))
    assert results["text:A"]["documents,none"] == 2
    assert total == pytest.approx((a * 4 * 34 + b * 4 * 9) / (4 * 43))
    file.write_bytes(zstandard.compress(b'{"text": "a", "meta": {}}'))
    with pytest.raises(DataError, match=r"part\.jsonl\.zst:1: .*pile_set_name"):
        run_program(capsys, str(run_dir), "--data", f"pile={file}", "--set", 'evaluate.group_key="meta.pile_set_name"')


@needs_harness
@pytest.mark.filterwarnings("default")
def test_synthetic_tasks_need_no_data_set(trained, capsys):
    run_dir, _ = trained
    arguments = [str(run_dir), "--task", "local", "--task", "wikitext2", "--limit", "3"]
    corpus = run_dir / "wiki.txt"
    corpus.write_text(" = Title = \n A b , c . \n = Other = \n D . \n")
    found, _ = run_program(capsys, *arguments, "--data", f"wikitext2={corpus}")
    assert found["results"].keys() == {"local_choice", "local_cloze", "wikitext2"}
    assert found["n-samples"]["local_choice"]["effective"] == 3
    wiki = found["results"]["wikitext2"]
    assert wiki["words,none"] == 3 + 1 + 5 + 1 + 3 + 1 + 2 + 1
    assert math.log(wiki["word_perplexity,none"]) * wiki["words,none"] == pytest.approx(
        wiki["nats_per_token,none"] * wiki["tokens,none"]
    )
    assert [row["model"] for row in found["published"]][:1] == ["GPT-2 117M"]
    kept = json.loads((run_dir / "evaluation_4.json").read_text())
    assert kept["results"].keys() >= found["results"].keys() | {"text:texts"}, "what was measured before stays"


@needs_harness
@pytest.mark.filterwarnings("default")
def test_training_and_the_program_generate_the_same_answers(tmp_path, capsys):
    """A few-shot generation task, run twice during training and once more on the checkpoint."""
    tasks = [
        'evaluate.tasks=["local_line", "local_choice"]',
        "evaluate.limit=4",
        "evaluate.num_fewshot_by_task.local_line=1",
    ]
    config = load_config(write_config(tmp_path), [*tasks, "model.seq_len=256", "data.holdout_one_in=2"])
    for file in (tmp_path / "texts").iterdir():
        file.write_text("".join(line + "\n" for line in re.findall(r"(?:\S+\s+){10}", file.read_text())))
    train_config(config, make_layout(config.mesh), StopRequest(message=""), measure=make_measure(config))
    evaluations = read_evaluations(Path(config.run.dir))
    assert list(evaluations) == [2, 4]
    capsys.readouterr()
    arguments = ["--task", "local_line", "--task", "local_choice", "--limit", "4", "--num-fewshot", "local_line=1"]
    found, _ = run_program(capsys, config.run.dir, *arguments)
    for name in ("results", "n-shot", "n-samples"):
        assert found[name].keys() == {"local_line", "local_choice"}
    assert found["n-shot"] == {"local_line": 1, "local_choice": 0} == evaluations[2]["n-shot"]
    assert found["results"] == evaluations[4]["results"]
    row = next(row for row in make_tables(found)[0].rows if row[0] == "local_line")
    assert row[1:3] == ["exact_match", "0"]
    assert row[5] == "1"


@needs_harness
@pytest.mark.filterwarnings("default")
def test_an_interrupted_evaluation_resumes(trained, tmp_path, capsys, monkeypatch):
    """Finished results of text, choices and lines are reused; the final results equal an uninterrupted evaluation."""
    run_dir = Path(shutil.copytree(trained[0], tmp_path / "run"))
    (tmp_path / "lines.txt").write_text("".join(f"line {i} is a line of {i % 7} words or so\n" for i in range(200)))
    arguments = ["--task", "text", "--task", "local_choice", "--task", "local_line", "--limit", "3"]
    arguments += ["--data", f"lines={tmp_path / 'lines.txt'}", "--set", "evaluate.batch_tokens=64"]
    expected, _ = run_program(capsys, str(run_dir), *arguments)
    partial = run_dir / "evaluation_4.partial.jsonl"
    assert not partial.exists()

    @contextmanager
    def stop_at(task: str, done: int):
        def on_progress(name: str, n: int, total: int | None) -> None:
            if name == task and n >= done:
                raise KeyboardInterrupt

        yield on_progress

    counts = [0]
    for task, done in (("text: bytes", 500), ("log-likelihoods", 2), ("answers", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate_module, "show_progress", lambda task=task, done=done: stop_at(task, done))
            with pytest.raises(KeyboardInterrupt):
                device_evaluate.main([str(run_dir), *arguments])
        counts.append(len(partial.read_bytes().splitlines()) - 1)
        assert counts[-1] > counts[-2]
    with open(partial, "ab") as file:
        file.write(b'{"key": "half a li')
    capsys.readouterr()
    found, err = run_program(capsys, str(run_dir), *arguments)
    assert f"resuming an interrupted evaluation with {counts[-1]:,} results" in err
    assert metrics_of(found) == pytest.approx(metrics_of(expected), rel=1e-5)
    assert not partial.exists()
    for text in ('{"model": "another"}\n{"key": "a", "is": [0.0, true]}\n', "no JSON\n", '{"model": "another"}\n[]\n'):
        partial.write_text(text)
        found, err = run_program(capsys, str(run_dir), *arguments)
        assert "resuming" not in err
        assert metrics_of(found) == pytest.approx(metrics_of(expected), rel=1e-6)


DOCUMENTS = [
    Document(
        "\n".join(" ".join(f"w{(i * j) % 90} and{j}" for j in range(line, line + 9)) for line in range(90)), f"{i}"
    )
    for i in range(8)
]


def test_synthetic_examples_depend_on_the_documents_only():
    choices = make_choices(DOCUMENTS, 5)
    assert choices == make_choices(DOCUMENTS[::-1], 5)
    assert choices[:3] == make_choices(DOCUMENTS, 3)
    for item in choices:
        whole = item["query"] + item["choices"][item["gold"]]
        assert any(whole in document.text for document in DOCUMENTS)
        assert len(item["query"].split()) == CONTEXT
        assert all(len(choice.split()) == END for choice in item["choices"])
        wrong = [c for i, c in enumerate(item["choices"]) if i != item["gold"]]
        assert not any(item["query"] + choice in document.text for choice in wrong for document in DOCUMENTS)
    assert {item["gold"] for item in make_choices(DOCUMENTS, 30)} == {0, 1, 2, 3}


def test_clozes_and_lines_come_from_the_text():
    prose = [Document("The cat saw a dog. " * 40 + "\n", "prose")]
    for item in make_clozes(prose, 4):
        assert item["query"] + item["target"] in prose[0].text
        assert item["target"].strip() in item["query"].split()
    for item in make_lines(DOCUMENTS, 4):
        assert any(f"{item['query']}{item['target']}\n" in document.text for document in DOCUMENTS)
        assert "\n" not in item["target"]
    for make in (make_choices, make_clozes, make_lines):
        with pytest.raises(DataError, match="add text"):
            make([Document("too short", "0")], 3)


def test_synthetic_examples_of_source_code():
    documents = list(read_documents(Path(__file__).parents[2] / "mesh_transformer" / "model"))
    assert all(len(make(documents, 10)) == 10 for make in (make_choices, make_clozes, make_lines))


FEWGLUE = Path(__file__).parents[3] / "shared" / "data" / "fewglue"


@pytest.mark.parametrize(
    ("name", "count"),
    [("boolq", 32), ("cb", 32), ("copa", 32), ("rte", 32), ("wic", 32), ("wsc", 32), ("record", 32), ("multirc", 0)],
)
def test_fewglue_records_are_read(name, count):
    """Records in their published format; a MultiRC passage has several examples."""
    files = {path.parent.name.lower(): path for path in FEWGLUE.glob("*/train.jsonl")}
    if name not in files:
        pytest.skip("FewGLUE is not in ../shared/data")
    items = read_examples(name, str(files[name]))
    assert len(items) == count or (not count and len(items) > 32)
    records = [item.record for item in items]
    if name == "record":
        assert all(set(record["answers"]) <= set(record["entities"]) for record in records)
    elif name != "wsc":  # FewGLUE has only the correct ones
        assert {record["label"] for record in records} == set(range(3 if name == "cb" else 2))
    if name == "wsc":
        assert all(record[f"span{i}_text"] in record["text"] for record in records for i in (1, 2))
    assert items[1].location.endswith("train.jsonl:2") or not count
    assert read_examples(name, str(files[name]), limit=3) == items[:3]


def test_bad_records_are_errors_with_their_line(tmp_path):
    file = tmp_path / "copa.jsonl"
    good = dict(premise="It broke.", choice1="It fell.", choice2="It flew.", question="cause", label=0)
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | {"label": 2}) + "\n")
    with pytest.raises(DataError, match=r"copa\.jsonl:2: not a record of copa .*label 2"):
        read_examples("copa", str(file))
    with pytest.raises(DataError, match=r"copa\.jsonl:1: not a record of piqa .*goal.*its fields: premise"):
        read_examples("piqa", str(file))
    assert len(read_examples("copa", str(file), limit=1)) == 1
    file.write_text("not JSON\n")
    with pytest.raises(DataError, match=r"copa\.jsonl:1: not JSON"):
        read_examples("copa", str(file))
    file.write_text("\n")
    with pytest.raises(DataError, match="no records"):
        read_examples("copa", str(file))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ['evaluate.tasks=["hellaswg"]'],
            r"unknown task 'hellaswg'; choose from text, wikitext2, local, superglue, lambada",
        ),
        (['evaluate.tasks=["hellaswag"]'], "'hellaswag' has no data file; add --data hellaswag=PATH"),
        (['evaluate.tasks=["wikitext2"]'], "'wikitext2' has no data file"),
        (["evaluate.fewshot_data.piqa='x'"], r"evaluate\.fewshot_data\.piqa: 'piqa' is not one of the tasks text"),
        (["evaluate.num_fewshot_by_task.local_line=1"], r"evaluate\.num_fewshot_by_task\.local_line"),
        (
            ['evaluate.tasks=["absent.yaml"]', 'evaluate.data.absent="x"'],
            r"absent\.yaml nor .*absent\.yaml exists",
        ),
        (
            ['evaluate.tasks=["rte"]', 'evaluate.data.rte="x"', "evaluate.num_fewshot=4"],
            "4-shot evaluation needs 4 examples, got 0",
        ),
        (['evaluate.tasks=["local_line"]', 'evaluate.fewshot_data.local_line="/absent"'], "/absent: no such file"),
        (['evaluate.tasks=["a/x.yaml", "b/x.yaml"]'], "two tasks are named 'x'"),
        (['evaluate.data.piqa="x"'], r"evaluate\.data\.piqa is not used by the tasks text; add --task piqa"),
        (['evaluate.data.mine="x"', 'evaluate.tasks=["wikitext2"]', 'evaluate.data.wikitext2="y"'], "add --task text"),
        (["data.holdout_one_in=0"], "the run has no held-out text"),
        (['evaluate.data.mine="/absent"'], "/absent: no such file or folder"),
        (["evaluate.limit=0"], "evaluate.limit = 0"),
        (['evaluate.tasks="text"'], "evaluate.tasks"),
    ],
)
def test_invalid_configurations_are_errors(tmp_path, overrides, words):
    with pytest.raises(ValueError, match=words):
        check_tasks(load_config(write_config(tmp_path), overrides))


def test_invalid_usage(trained, tmp_path):
    run_dir, _ = trained
    for arguments, words in (
        (["--data", "hellaswag"], "expected NAME=PATH"),
        (["--data", "a b=c"], "expected NAME=PATH"),
        (["--fewshot-data", "rte"], "--fewshot-data rte: expected NAME=PATH"),
        (["--num-fewshot", "rte=many"], "--num-fewshot rte=many: expected N or NAME=N"),
        (["--num-fewshot", "-1"], "--num-fewshot -1: expected N or NAME=N"),
        (["--set", "train.steps=3"], "of a trained model cannot be changed; only"),
        (["--set", "evaluate.context=65"], r"evaluate\.context=65: must be between 1 and model\.seq_len=64"),
        (["--data", f"mine={tmp_path}"], "this folder has no files"),
        (["--data", f"mine={tmp_path / 'absent'}"], "no such file or folder"),
    ):
        with pytest.raises(ValueError, match=words):
            device_evaluate.main([str(run_dir), *arguments])


def test_published_rows_are_complete():
    rows = read_published()
    assert len(rows) > 50
    assert len(pile_components()) == 22
    for row in rows:
        assert row["model"]
        assert row["source"]
        for name, value in row["scores"].items():
            task, metric = name.rsplit(".", 1)
            assert task in TASKS or re.fullmatch(r"text:.*|pile|wikitext2?|wsc", task), name
            assert value > 0
            assert value < 1 or metric not in ("acc", "acc_norm"), f"{row['model']} {name} = {value} is no share"
    davinci = next(row for row in find_published(["pile.bits_per_byte"]) if row["model"] == "GPT-3 davinci")
    assert davinci["scores"] == {"pile.bits_per_byte": 0.7177}


def test_results_of_several_evaluations_are_merged(tmp_path):
    first = {
        "results": {"a": {"acc,none": 0.5}},
        "published": [{"model": "m", "source": "s", "scores": {"a.acc": 0.6}}],
    }
    second = {"results": {"b": {"acc,none": 0.25, "acc_stderr,none": 0.1}}, "n-samples": {"b": {"effective": 8}},
              "published": [{"model": "m", "source": "s", "scores": {"b.acc": 0.7}}]}  # fmt: skip
    write_evaluation(tmp_path, 3, first)
    write_evaluation(tmp_path, 3, second)
    kept = read_evaluations(tmp_path)[3]
    assert metrics_of(kept) == {"a.acc": 0.5, "b.acc": 0.25}
    tasks, published = make_tables(kept)
    assert tasks.rows == [["a", "acc", "0.5", "", "", "0"], ["b", "acc", "0.25", "0.1", "8", "0"]]
    assert published.rows == [["this model", "0.5", "0.25", ""], ["m", "0.6", "0.7", "s"]]
    (tmp_path / "evaluation_4.json").write_text("{}")
    with pytest.raises(ValueError, match=r'evaluation_4\.json: no table "results"'):
        read_evaluations(tmp_path)


def test_every_line_of_a_plot_has_its_own_style():
    results = {f"text:{i}": {"bits_per_byte,none": 1.0 + i} for i in range(12)}
    drawn = draw_evaluations({step: {"results": results} for step in (1, 2)})
    looks = re.findall('class="key ([^"]+)"', drawn)
    assert len(looks) == len(set(looks)) == 12


def test_answers_of_several_filters_are_reported_separately():
    results = {"sums": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "exact_match,loose": 0.75}}
    evaluation = {"results": results, "n-shot": {"sums": 5}, "n-samples": {"sums": {"effective": 8, "cut": 2}}}
    assert metrics_of(evaluation) == {"sums.exact_match_strict": 0.5, "sums.exact_match_loose": 0.75}
    (table,) = make_tables(evaluation)
    assert table.headings[-3:] == ["examples", "few-shot", "truncated prompts"]
    assert table.rows[0] == ["sums", "exact_match (strict)", "0.5", "0.1", "8", "5", "2"]
