# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""inspect_corpus.py prints documents, dropped documents and near duplicates; build_corpus.py prints a summary."""

import subprocess
import sys
from pathlib import Path

import pytest
from invented_text import prose

ROOT = Path(__file__).parents[2]


def test_building_and_inspecting(tmp_path, write_texts, load_script, capsys):
    changed = prose(1, 300).split(" ")
    changed[100] = "other"
    folder = write_texts("texts", [prose(1, 300), " ".join(changed), "short", *(prose(i) for i in range(10, 20))])
    (tmp_path / "small.toml").write_text(
        f'[corpus]\nname = "small"\n[components.a]\nkind = "text"\npaths = ["{folder}"]\nlicense = "none"\nmin_bytes = 20\n'
    )
    out = str(tmp_path / "out")
    command = [str(tmp_path / "small.toml"), out, "--workers", "1", "--set", "heldout.one_in=0"]
    assert load_script("build_corpus").main(command) == 0
    summary = capsys.readouterr().out
    assert "MB for training" in summary
    assert "digest " in summary
    assert (tmp_path / "out" / "datasheet.html").is_file()

    inspect = load_script("inspect_corpus").main
    assert inspect([out, "--n", "2", "--characters", "10"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("--- ") == 2
    assert "more characters]" in printed
    assert inspect([out, "--dropped", "min_bytes"]) == 0
    assert "reason under 20 bytes" in capsys.readouterr().out
    assert inspect([out, "--dropped", "near"]) == 0
    assert "001.txt" in capsys.readouterr().out
    assert inspect([out, "--duplicates-of", str(folder / "000.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1.000  a")
    assert lines[1].endswith("001.txt")
    assert 0.9 < float(lines[1].split()[0]) < 1
    with pytest.raises(ValueError, match="no document matches"):
        inspect([out, "--component", "b"])
    with pytest.raises(ValueError, match="elsewhere: no filtered document has this id"):
        inspect([out, "--duplicates-of", "elsewhere"])
    with pytest.raises(ValueError, match=r"no manifest.json: not a corpus, or incomplete"):
        inspect([str(tmp_path), "--n", "1"])


def test_an_invalid_recipe_is_wrong_usage(tmp_path):
    (tmp_path / "small.toml").write_text('[corpus]\nnmae = "small"\n')
    command = [sys.executable, "scripts/build_corpus.py", str(tmp_path / "small.toml"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "corpus.nmae is not a field; did you mean 'name'?" in done.stderr


def test_renamed_flags_are_refused():
    command = [sys.executable, "scripts/inspect_corpus.py", "corpus", "--near", "a"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--near was renamed: use --duplicates-of" in done.stderr
