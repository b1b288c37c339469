# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The stress test of checkpoint verification: all damage is detected, and a trial fails if damage is not."""

import json
import random

import pytest


def test_all_damage_is_detected(load_script, capsys):
    program = load_script("stress/corruption")
    assert program.main(["--trials", "30", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["detected"], result["missed"]) == (30, [])
    tried = {(kind, damage) for kind, damage, *_ in result["table"]}
    assert tried == {(kind, damage) for kind in program.KINDS for damage in program.DAMAGES}


def test_a_restored_checkpoint_fails_the_trial(load_script, capsys, monkeypatch):
    program = load_script("stress/corruption")
    monkeypatch.setattr(program, "damage_file", lambda *args: "not damaged")
    assert program.main(["--trials", "1"]) == 1
    output = capsys.readouterr().out
    assert "MISSED" in output
    assert "not damaged: restored without an error" in output


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_within_the_given_bytes(load_script, tmp_path, damage):
    program = load_script("stress/corruption")
    path = tmp_path / "file"
    for seed in range(20):
        path.write_bytes(bytes(100))
        description = program.damage_file(path, damage, random.Random(seed), 40, 60)
        content = path.read_bytes() if path.exists() else None
        assert content != bytes(100)
        if damage == "flip":
            changed = [i for i, byte in enumerate(content) if byte]
            assert len(content) == 100
            assert changed == [int(description.split()[5])]
            assert 40 <= changed[0] < 60
        elif damage == "truncate":
            assert 40 <= len(content) < 60
        else:
            assert content is None
