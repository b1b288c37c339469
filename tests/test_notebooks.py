# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from its first cell to its last, at a reduced size, and computes what its text says; in git it is clean."""

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WORDS = ["the", "mesh", "of", "devices", "holds", "every", "layer", "and", "each", "token", "knows", "its", "place"]
# What a kernel inherits: the project without an installation, and programs compiled as quickly as everywhere in the suite.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)


def find_parameters(notebook: nbformat.NotebookNode) -> int:
    (index,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    return index


def execute(
    name: str, folder: Path, parameters: dict[str, Any], found: str, *, then: str = ""
) -> tuple[dict[str, Any], str, int]:
    """What the expression `found` is behind the last cell and `then`; all text that was printed; the number of pictures.

    The cell tagged "parameters" is followed by one that sets others, as papermill does.
    """
    notebook = read(name)
    lines = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(find_parameters(notebook) + 1, nbformat.v4.new_code_cell(lines))
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\n\n{then}\nprint(json.dumps({found}))"))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env={key: value for key, value in os.environ.items() if key != "MPLBACKEND"} | ENVIRONMENT)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = ["".join(o.text for o in cell.get("outputs", []) if o.output_type == "stream") for cell in notebook.cells]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return json.loads(texts[-1].splitlines()[-1]), "\n".join(texts[:-1]), pictures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_clean_in_git(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    text = "\n".join(cell.source for cell in notebook.cells)
    assert not re.search(r"jax(lib)?(\[\w+\])?\s*(==|<|~=|>)", text), "a version of JAX is asked for"
    assert not re.search(r"/(work|tmp|home|root|Users)/", text), "a place on one machine"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_opens_in_colab_and_finds_the_project(path):
    """The badge opens this very file, of the repository that the notebook clones; all set themselves up alike."""
    notebook = nbformat.read(path, 4)
    first, at = notebook.cells[0], find_parameters(notebook)
    badge = re.search(
        r"\[!\[Open in Colab\]\([^)]+\)\]\(https://colab\.research\.google\.com/github/([^)]+)\)", first.source
    )
    cloned = re.search(r'^REPOSITORY = "https://github\.com/([^"]+)"', notebook.cells[at].source, re.MULTILINE)
    assert first.source.startswith("# ")
    assert badge
    assert cloned
    assert badge[1] == f"{cloned[1]}/blob/main/notebooks/{path.name}"
    others = [nbformat.read(other, 4) for other in NOTEBOOKS]
    assert {other.cells[find_parameters(other) + 1].source for other in others} == {notebook.cells[at + 1].source}
    for other in re.findall(r"\]\((\w+\.ipynb)\)", "\n".join(cell.source for cell in notebook.cells)):
        assert (path.parent / other).is_file(), f"a link to {other}, which is not there"


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["sample_gptj", "sharding_explained", "token_journey"]


def test_token_journey(tmp_path):
    found, text, pictures = execute(
        "token_journey",
        tmp_path,
        {
            "RUN_DIR": str(tmp_path / "run"),
            "SETTINGS": ["train.steps=40", "train.grad_accum_steps=1", "model.dropout=0.0"],
        },
        """dict(
            documents=len(documents), held_out=len(held_out), round_trip=tokenizer.decode(tokens) == text,
            in_pieces=list(in_pieces.values()), nothing=float(np.log(c.n_vocab)), grad_accum_steps=accumulation_error,
            norms=norms, future=float(np.abs(np.triu(weights, 1)).max()), sums=np.asarray(weights.sum(-1)).ravel().tolist(),
            trained=float(np.abs(trained_weights - weights).max()), losses=losses, nats=float(nats.mean()),
            problems=problems, original=run.store.verify(run.step), drawn=len(completion.tokens), step=ready.step,
            expected=float(expected.sum()), prompt=completion.prompt)""",
    )
    assert found["documents"] > 100
    assert 5 < found["held_out"] < found["documents"] / 4
    assert found["round_trip"]
    # Untrained, the model knows nothing, in however many pieces it is scored.
    assert found["in_pieces"] == pytest.approx([found["in_pieces"][0]] * 3, rel=1e-5)
    assert found["in_pieces"][0] == pytest.approx(found["nothing"], abs=0.1)
    assert 0 < found["accumulation"] < 1e-5
    norms = {name.rpartition("/")[2]: norm for name, norm in found["norms"].items()}
    assert norms["b_k"] < 1e-4 * norms["w_k"]
    assert found["future"] == 0
    assert found["sums"] == pytest.approx([1.0] * len(found["sums"]), abs=1e-5)
    assert found["trained"] > 1e-3
    assert len(found["losses"]) == found["step"] == 40
    assert np.mean(found["losses"][-10:]) < found["losses"][0] - 1
    assert found["nats"] < found["losses"][0] - 1
    assert found["problems"]
    assert found["original"] == []
    assert 1 <= found["drawn"] <= 24
    assert found["prompt"] == "def "
    assert found["expected"] == pytest.approx(1, abs=1e-5)
    assert "did you mean 'n_layers'?" in text
    assert pictures == 8


def test_sharding_explained(tmp_path):
    mesh = "fsdp=2 context=2 tensor=2"
    found, text, pictures = execute(
        "sharding_explained",
        tmp_path,
        {"RUNS": str(tmp_path / "runs"), "STEPS": 3, "MESHES": [mesh]},
        """dict(
            shares={mesh: {name: str(share) for name, share in own.items()} for mesh, own in shares.items()},
            ring={device: own.tolist() for device, own in ring.items()}, seen=list(seen.values()), losses=losses,
            state_bytes=state_bytes, moved=moved, same_bits=same_bits, step=restored.step, next_losses=next_losses,
            notes=restored.notes)""",
    )
    # Of w_in, w_tokens, tokens, stream and queries.
    assert {mesh: " ".join(own.values()) for mesh, own in found["shares"].items()} == {
        "data": "1 1 1/8 1/8 1/8",
        "fsdp": "1/8 1/8 1/8 1/8 1/8",
        "tensor": "1/4 1/4 1/2 1/2 1/8",
        "sequence_parallel": "1/4 1/4 1/2 1/8 1/8",
        "context": "1 1 1/8 1/8 1/8",
        "pipeline": "1/4 1/4 1/2 1/8 1/8",
        "mixed": "1/8 1/8 1/2 1/4 1/8",
    }
    assert sorted(place for own in found["ring"].values() for place in own) == list(range(32))
    assert len(set(found["seen"])) == 1
    # Cut in eight, and the same numbers.
    alone, cut = found["losses"]["data=1"], found["losses"][mesh]
    assert cut == pytest.approx(alone, abs=1e-5)
    assert alone[-1] < alone[0] - 0.1
    assert 0.25 <= found["state_bytes"][mesh] / found["state_bytes"]["data=1"] * 2 < 1.1
    assert found["same_bits"]
    assert found["moved"] > 20
    assert found["step"] == 4
    assert found["next_losses"][0] == pytest.approx(found["next_losses"][1], abs=1e-5)
    assert any("resumed from" in note for note in found["notes"])
    assert "queries: heads = 4 is not divisible by tensor = 8" in text
    assert pictures == 10


def test_sample(tmp_path):
    """A model trained on the spot, continued by the cell and, with the same seed, by the form; and GPT-J's files of it."""
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
        {"RUNS": str(tmp_path / "runs"), "TRAINING": training},
        """dict(
            text=completion.text.translate(VISIBLE), tokens=len(completion.tokens), form=answer.value, status=status.value,
            prompt=completion.prompt, logprobs=completion.logprobs, vocabulary=model.n_vocab,
            types=sorted({record.dtype for record in theirs.read_manifest(at).arrays.values()}), equal=equal)""",
        then="""
import jax.numpy as jnp
import numpy as np

go.click()
export = [sys.executable, "scripts/reshard_checkpoint.py", run, f"{RUNS}/gptj", "--format", "huggingface"]
subprocess.run(export, check=True, capture_output=True)
TOKENIZER = "bytes"
theirs, at = find_checkpoint(convert(f"{RUNS}/gptj"))
equal = {}
for name, record in theirs.read_manifest(at).arrays.items():
    everything = tuple(slice(0, dim) for dim in record.shape)
    ours = store.read_slice(step, name, everything).astype(jnp.bfloat16)
    equal[name] = bool(np.array_equal(ours, theirs.read_slice(at, name, everything)))
""",
    )
    assert "runs on 1 x cpu (CPU)" in text
    assert found["prompt"] == "def main("
    assert 1 <= found["tokens"] <= 64
    assert found["form"] == found["text"]
    assert found["status"].startswith(("length", "stop"))
    assert found["types"] == ["bfloat16"]
    assert len(found["equal"]) > 10
    assert all(found["equal"].values()), found["equal"]
    # It learned something: better than a guess among all tokens.
    assert np.mean(found["logprobs"]) > -np.log(found["vocabulary"]) + 1
