# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A sample of the differential test of imports, for every family; all cells are run nightly."""

import pytest

from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.huggingface.hf_config import HFConfig, recorded_classes

pytestmark = pytest.mark.slow
pytest.importorskip("transformers", reason="needs pip install transformers torch")
pytest.importorskip("torch", reason="needs pip install transformers torch")


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind in recorded_classes()])
def test_no_sampled_change_is_misread(kind, load_script):
    differential = load_script("stress/differential")
    outcomes = differential.run_family(kind, sample=8)
    failures = [(cell, outcome, detail) for cell, outcome, detail in outcomes if outcome in differential.FAILURES]
    assert failures == []
    assert any(outcome == "equal" for _, outcome, _ in outcomes)


def test_a_misreading_is_found(monkeypatch, load_script):
    differential = load_script("stress/differential")
    read = HFConfig.rope_parameters
    monkeypatch.setattr(HFConfig, "rope_parameters", lambda self: read(self) | {"rope_theta": 100.0})
    monkeypatch.setattr(differential, "list_cells", lambda kind: [differential.Cell("model_type", kind, built=False)])
    assert [outcome for _, outcome, _ in differential.run_family("llama")] == ["silent"]


def test_every_field_is_varied(load_script):
    differential = load_script("stress/differential")
    for kind in differential.list_families():
        cells = list(differential.list_cells(kind))
        for key in differential.recorded_classes()[kind]["fields"]:
            changes = {repr(cell.value) for cell in cells if cell.key == key}
            assert changes >= {"None", repr(differential.ABSENT)}, key
