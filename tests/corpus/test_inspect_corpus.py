# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""look.py shows documents, what was dropped, and near duplicates; build_corpus.py says what came out."""

import subprocess
import sys
from pathlib import Path

import pytest
from invented_text import prose

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(monkeypatch):
    """A program of scripts/, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import importlib

    return importlib.import_module


def test_building_and_looking(tmp_path, write_texts, program, capsys):
    changed = prose(1, 300).split(" ")
    changed[100] = "other"
    folder = write_texts("texts", [prose(1, 300), " ".join(changed), "short", *(prose(i) for i in range(10, 20))])
    (tmp_path / "small.toml").write_text(
        f'[corpus]\nname = "small"\n[components.a]\nkind = "text"\npaths = ["{folder}"]\nlicense = "none"\nmin_bytes = 20\n'
    )
    out = str(tmp_path / "out")
    command = [str(tmp_path / "small.toml"), out, "--workers", "1", "--set", "heldout.one_in=0"]
    assert program("build_corpus").main(command) == 0
    said = capsys.readouterr().out
    assert "MB for training" in said
    assert "digest " in said
    assert (tmp_path / "out" / "datasheet.html").is_file()

    look = program("look").main
    assert look([out, "--n", "2", "--characters", "10"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- ") == 2
    assert "more characters]" in shown
    assert look([out, "--dropped", "min_bytes"]) == 0
    assert "reason under 20 bytes" in capsys.readouterr().out
    assert look([out, "--dropped", "near"]) == 0
    assert "001.txt" in capsys.readouterr().out
    assert look([out, "--near", str(folder / "000.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1.000  a")
    assert lines[1].endswith("001.txt")
    assert 0.9 < float(lines[1].split()[0]) < 1
    with pytest.raises(ValueError, match="nothing there that fits"):
        look([out, "--component", "b"])
    with pytest.raises(ValueError, match="no such document after the steps"):
        look([out, "--near", "elsewhere"])
    with pytest.raises(ValueError, match=r"no manifest.json: no corpus"):
        look([str(tmp_path), "--n", "1"])


def test_a_mistake_in_the_file_is_wrong_usage(tmp_path):
    (tmp_path / "small.toml").write_text('[corpus]\nnmae = "small"\n')
    command = [sys.executable, "scripts/build_corpus.py", str(tmp_path / "small.toml"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "corpus.nmae is not a field; did you mean 'name'?" in done.stderr
