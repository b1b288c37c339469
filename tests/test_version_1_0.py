# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Runs that version 1.0 wrote still open: verified, sampled and resumed, with the results that version 1.0 had."""

import json
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from mesh_transformer.checkpoint.store import find_checkpoint
from mesh_transformer.config import config_to_toml, parse_stored
from mesh_transformer.reports.metrics_log import FILE, read_metrics

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "version_1_0.json").read_text())
pytestmark = pytest.mark.parametrize("name", sorted(EXPECTED))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The folder in which version 1.0 trained two runs."""
    folder = tmp_path_factory.mktemp("version_1_0")
    with tarfile.open(GOLDEN / "version_1_0.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(folder: Path, program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_checkpoint_verifies_and_samples(stored, name):
    store, step = find_checkpoint(str(stored / name))
    assert store.verify(step) == []
    expected = EXPECTED[name]
    out = run(
        stored, "device_sample.py", name, "--prompt", expected["prompt"], "--max-tokens", str(expected["max_tokens"]),
        "--temperature", "0", "--json",
    )  # fmt: skip
    (sample,) = [json.loads(line) for line in out.splitlines()]
    assert sample["tokens"] == expected["tokens"]
    assert sample["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)


def test_run_resumes_with_the_same_losses(stored, name):
    table = tomllib.loads((stored / name / "config.toml").read_text())
    before = find_checkpoint(str(stored / name))[1]
    table["train"]["steps"] = EXPECTED[name]["continued_to"]
    (stored / f"{name}_now.toml").write_text(config_to_toml(parse_stored(table, where=name)))
    run(stored, "device_train.py", f"{name}_now.toml")
    losses = {line["step"]: line["loss"] for line in read_metrics(stored / name / FILE) if line["kind"] == "train"}
    expected = {int(step): loss for step, loss in EXPECTED[name]["loss"].items()}
    assert losses.keys() == expected.keys()
    assert min(expected) < before < max(expected), "some steps are of version 1.0, some are of this one"
    assert losses == pytest.approx(expected, rel=1e-5)
