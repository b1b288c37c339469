# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The house rules that a machine can check: who imports whom, sizes, headers, and no drawers, traps or dead fields."""

import ast
import dataclasses
import re
import typing
from pathlib import Path

import pytest

from mesh_transformer.config import Config

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "mesh_transformer").rglob("*.py"))
PROGRAMS = sorted([*ROOT.glob("device_*.py"), *(ROOT / "scripts").rglob("*.py")])
SOURCES = PACKAGE + PROGRAMS
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


every_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)

# Rooms from the ground up: a module imports from its own room and from what its line names.
GROUND = {"agreement", "command", "config", "files", "memory", "mesh"}
MAY_IMPORT = {
    "field_types": set(),
    "schema": {"field_types", "model.families", "model.choices", "evaluate.choices"},
    "config": {"schema", "model.families"},
    "files": set(),
    "memory": set(),
    "command": {"config"},
    "mesh": {"config", "memory"},
    "agreement": set(),
    "processes": {"agreement", "command", "config"},
    "corpus": GROUND | {"data", "field_types"},
    "data": GROUND | {"checkpoint.failures", "checkpoint.objects", "checkpoint.places"},  # what reaches object stores
    "model": GROUND | {"field_types"},
    "checkpoint": GROUND | {"model"},
    "convert": GROUND | {"model", "checkpoint"},
    "train": GROUND | {"data", "model", "checkpoint"},
    "sample": GROUND | {"data", "model", "checkpoint", "train"},
    "serve": GROUND | {"data", "sample"},
    "evaluate": GROUND | {"field_types", "data", "model", "checkpoint", "convert", "train", "sample"},
    "plan": GROUND | {"data", "model", "checkpoint", "train", "sample"},
}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it, relative to the package."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            if node.module == "mesh_transformer":
                found |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("mesh_transformer."):
                found.add(node.module.removeprefix("mesh_transformer."))
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("mesh_transformer.")
                for alias in node.names
                if alias.name.startswith("mesh_transformer.")
            }
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_go_down(path):
    module = ".".join(path.relative_to(ROOT / "mesh_transformer").with_suffix("").parts)
    room = module.split(".")[0]
    if room == "__init__":
        assert not imported(path)
        return
    assert room in MAY_IMPORT, f"{name_of(path)}: give the room {room!r} a line in MAY_IMPORT"
    if module in ("model.families", "model.choices", "model.expert_choices", "evaluate.choices"):
        assert imported(path) <= {"field_types", "model.expert_choices"}, (
            "configuration reads it, so it imports nothing that needs configuration"
        )
    for other in imported(path):
        allowed = MAY_IMPORT[room]
        assert other.split(".")[0] == room or other in allowed or other.split(".")[0] in allowed, (
            f"{name_of(path)} imports {other}"
        )


def test_data_does_not_import_jax_models():
    """Corpora are prepared on machines without accelerators: reading and packing text is numpy's work."""
    for path in (ROOT / "mesh_transformer" / "data").rglob("*.py"):
        modules = [
            n.module if isinstance(n, ast.ImportFrom) else n.names[0].name
            for n in ast.walk(parse(path))
            if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        assert not any((module or "").split(".")[0] in ("haiku", "optax") for module in modules), name_of(path)


def test_no_drawers():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "base", "core", "lib", "stuff"}
    assert [name_of(path) for path in SOURCES if drawers & set(path.stem.split("_"))] == []


@every_source
def test_header_docstring_and_length(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith(
        "# SPDX-FileCopyrightText: Mesh Transformer contributors\n# SPDX-License-Identifier: Apache-2.0\n"
    ) or (text.startswith("#!") and "# SPDX-License-Identifier: Apache-2.0\n" in text[:200])
    assert ast.get_docstring(parse(path)), "no docstring"
    limit = 80 if path.name.startswith("device_") else 350
    assert len(text.splitlines()) <= limit


@every_source
def test_functions_are_short(path):
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {
        f"{node.name}: {node.end_lineno - node.lineno + 1}"
        for node in functions
        if (node.end_lineno or 0) - node.lineno >= 100
    }
    assert not long


# A subclass of Unpickler that refuses all but tensors; the safe loader, for GPT-NeoX's configurations.
ALLOWED = {"convert/huggingface/tensor_files.py": {"pickle"}, "scripts/import_config.py": {"yaml"}}


@every_source
def test_no_traps(path):
    """No bare except, no pickle, no evaluation of text, no YAML, no stub, no later."""
    allowed = next((names for end, names in ALLOWED.items() if name_of(path).endswith(end)), set())
    for node in ast.walk(parse(path)):
        place = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{place}: bare except"
            assert (
                not all(isinstance(inner, ast.Pass) for inner in node.body) or ast.unparse(node.type) != "Exception"
            ), place
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            trapped = {"pickle", "cPickle", "dill", "marshal", "shelve", "yaml"} - allowed
            assert not trapped & {module.split(".")[0] for module in modules}, place
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {
                "eval",
                "exec",
                "compile",
                "__import__",
                "yaml.load",
                "pickle.load",
                "pickle.loads",
                "os.system",
            }, place
            for keyword in node.keywords:
                trap = {"allow_pickle", "shell", "trust_remote_code"}
                assert not (keyword.arg in trap and ast.unparse(keyword.value) == "True"), (
                    f"{place}: {keyword.arg}=True"
                )
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text(encoding="utf-8"))


def test_few_suppressions():
    pattern = re.compile(r"#\s*(type|pyright):\s*ignore")
    found = [
        f"{name_of(path)}:{i}"
        for path in SOURCES
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert len(found) <= 10, found


def config_fields(kind=Config) -> set[str]:
    """Names of all fields of all sections, those of dictionaries of sections included."""
    found = set()
    for field in dataclasses.fields(kind):
        found.add(field.name)
        hint = typing.get_type_hints(kind)[field.name]
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                found |= config_fields(inner)
    return found


def read_attributes(paths: list[Path]) -> set[str]:
    nodes = [node for path in paths for node in ast.walk(parse(path))]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def test_every_config_field_is_read():
    """Outside the schema; a field that the schema's own properties turn into another is read through that property."""
    through = {"d_head": "head_dim", "n_kv_heads": "kv_heads", "d_ff": "ff_dim", "rope_dims": "rope_dim"}
    through |= dict.fromkeys(("noise_density", "mean_noise_span_length"), "measure_spans")
    schema = ROOT / "mesh_transformer" / "schema.py"
    read = read_attributes([path for path in SOURCES if path != schema])
    assert {"n_layers", "learning_rate", "path"} <= config_fields()
    assert sorted(field for field in config_fields() if through.get(field, field) not in read) == []


def test_tests_mirror_the_tree():
    """tests/<room>/test_<module>.py: a newcomer finds the proof of a module where its name says."""
    assert all(
        path.name.startswith("test_")
        or path.name in ("conftest.py", "faulty_proxy.py", "invented_text.py", "reference_models.py")
        for path in TESTS
    ), [name_of(path) for path in TESTS]
    for path in TESTS:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# SPDX-FileCopyrightText"), name_of(path)
        assert not re.search(r"/(work|tmp)/[a-z]", text), f"{name_of(path)} names a place on one machine"
