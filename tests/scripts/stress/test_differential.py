# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A sample of the differential test of imports for every family. `python scripts/stress/differential.py` runs all of it."""

import pytest

from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.storage.errors import CheckpointError

pytestmark = pytest.mark.slow
pytest.importorskip("transformers", reason="needs pip install transformers torch")
pytest.importorskip("torch", reason="needs pip install transformers torch")


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_sampled_change_is_misread(kind, load_script):
    differential = load_script("stress/differential")
    outcomes = differential.run_family(kind, sample=3)
    assert [outcome for outcome in outcomes if outcome.name in differential.FAILURES] == []
    assert (outcomes[0].cell.key, outcomes[0].name) == ("model_type", "equal")


def test_a_misreading_is_found(monkeypatch, load_script):
    differential = load_script("stress/differential")
    read = HFConfig.rope_parameters
    monkeypatch.setattr(HFConfig, "rope_parameters", lambda self: read(self) | {"rope_theta": 100.0})
    monkeypatch.setattr(differential, "list_cells", lambda kind: [differential.Cell("model_type", kind, built=False)])
    assert [outcome.name for outcome in differential.run_family("llama")] == ["silent"]


def test_a_refusal_without_the_key_is_found(monkeypatch, load_script):
    differential = load_script("stress/differential")
    cell = differential.Cell("head_dim", 5, built=False)
    monkeypatch.setattr(differential, "list_cells", lambda kind: [cell])
    monkeypatch.setattr(differential.Bench, "_generate", lambda self, folder, digest: (self.tokens, None))
    outcomes = []
    for message in ("attention_head_dim = 5 is not supported", "head_dim = 5 is not supported"):

        def refuse(folder, message=message):
            raise CheckpointError(f"{folder}: {message}")

        monkeypatch.setattr(differential, "open_huggingface", refuse)
        outcomes += [outcome.name for outcome in differential.run_family("llama")]
    assert outcomes == ["unnamed", "refused"]


def test_an_export_that_lost_a_key_is_found(monkeypatch, load_script):
    differential = load_script("stress/differential")
    monkeypatch.setattr(differential, "list_cells", lambda kind: [differential.Cell("eos_token_id", 7, built=True)])
    monkeypatch.setattr(differential, "read_text_files", lambda folder, table: {"special_ids": {}})
    (outcome,) = differential.run_family("llama")
    assert outcome.name == "export"
    assert "'eos_token_id': (7, 2)" in outcome.detail


def test_every_field_is_varied(load_script):
    differential = load_script("stress/differential")
    for kind in FAMILIES:
        cells = list(differential.list_cells(kind))
        for key in differential.list_fields(kind):
            changes = {repr(cell.value) for cell in cells if cell.key == key}
            assert changes > {"None", repr(differential.ABSENT)}, (kind, key)
