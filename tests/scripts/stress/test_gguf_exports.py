# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""scripts/stress/gguf_exports.py: the native model chooses the tokens that llama.cpp chose from the exported files."""

import importlib.util
import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[2] / "golden" / "llama_cpp.json"
NAMES = sorted(json.loads(GOLDEN.read_text())["tiny"])


@pytest.fixture
def program(load_script):
    return load_script("stress/gguf_exports")


def test_every_small_model_is_recorded(program):
    assert sorted(program.TABLES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_llama_cpp(name, program, tmp_path):
    (answer,) = program.read_answers(json.loads(GOLDEN.read_text())["tiny"])[name]
    assert answer.prompt == program.make_prompt(name)
    assert len(set(answer.tokens)) > program.N_NEW // 2, "a repeated token would say little"
    path = program.export_tiny(name, "F16", tmp_path / name)
    wrong, _ = program.compare(path, [answer])
    assert wrong == 0
    other = answer._replace(prompt=answer.prompt[::-1])
    assert program.compare(path, [other])[0] > program.N_NEW // 4, "the tokens depend on the prompt"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_live(program):
    assert program.main([]) == 0


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed")
def test_without_llama_cpp(program):
    with pytest.raises(ValueError, match="pip install llama-cpp-python"):
        program.main([])
