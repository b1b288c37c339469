# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules of the codebase that a machine can check: import directions, sizes, headers, packaging, and no unread config field."""

import ast
import configparser
import dataclasses
import itertools
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

# Packages from the bottom up: a module imports from its own package and from the packages in its row. There are no
# exceptions; a new edge belongs here only if it makes no cycle (test_the_map_has_no_cycle).
BASE = {"cli", "config", "distributed", "host_memory", "mesh", "storage"}
MAY_IMPORT = {
    "config": set(),
    "host_memory": set(),
    "cli": {"config"},
    "storage": {"config"},
    "distributed": {"cli", "config", "storage"},
    "mesh": {"config", "host_memory"},
    "data": {"cli", "config", "host_memory", "storage"},
    "model": {"config", "mesh"},
    "checkpoint": BASE | {"model"},
    "reports": {"config", "distributed", "storage"},
    "corpus": {"cli", "config", "data", "host_memory", "reports", "storage"},
    "convert": BASE | {"checkpoint", "data", "model"},
    "train": BASE | {"checkpoint", "data", "model", "reports"},
    "sample": BASE | {"checkpoint", "data", "model", "reports", "train"},
    "serve": BASE | {"data", "sample"},
    "evaluate": BASE | {"checkpoint", "convert", "data", "model", "reports", "sample", "train"},
    "plan": BASE | {"data", "model", "reports", "sample", "train"},
    "library": BASE | {"convert", "data", "evaluate", "sample", "train"},
    "__main__": {"cli"},
}
CONFIG_LEAVES = {
    "evaluation",
    "field_types",
    "model",
    "moe",
    "presets",
    "renamed",
}  # of config/: import no other package


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
    package = path.relative_to(ROOT / "mesh_transformer").with_suffix("").parts[0]
    if package == "__init__":
        assert {other.split(".")[0] for other in imported(path)} <= {"config", "library"}, "lazily, for type checkers"
        return
    assert package in MAY_IMPORT, f"{name_of(path)}: give the package {package!r} a row in MAY_IMPORT"
    for other in imported(path) - {"__version__"}:
        assert other.split(".")[0] in MAY_IMPORT[package] | {package}, f"{name_of(path)} imports {other}"


def test_the_map_has_no_cycle():
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        free = [name for name, below in MAY_IMPORT.items() if name not in order and below <= set(order)]
        assert free, f"a cycle among {sorted(set(MAY_IMPORT) - set(order))}"
        order += free


def test_data_does_not_import_jax_models():
    """Data is prepared on machines without accelerators, where Haiku and optax need not be installed."""
    for path in (ROOT / "mesh_transformer" / "data").rglob("*.py"):
        modules = [
            n.module if isinstance(n, ast.ImportFrom) else n.names[0].name
            for n in ast.walk(parse(path))
            if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        assert not any((module or "").split(".")[0] in ("haiku", "optax") for module in modules), name_of(path)


def test_no_drawers():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "base", "core", "lib", "stuff"}
    assert [name_of(p) for p in SOURCES if drawers & set(p.stem.replace("out_of_core", "").split("_"))] == []


@every_source
def test_header_docstring_and_length(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith(
        "# SPDX-FileCopyrightText: Mesh Transformer contributors\n# SPDX-License-Identifier: Apache-2.0\n"
    ) or (text.startswith("#!") and "# SPDX-License-Identifier: Apache-2.0\n" in text[:200])
    assert ast.get_docstring(parse(path)), "no docstring"
    assert len(text.splitlines()) <= 500


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


def sections(kind=Config, name: str = "") -> dict[str, type]:
    """Every section of the schema by the name of its field, sections in dictionaries and nested ones included."""
    found = {name: kind} if name else {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                found |= sections(inner, field.name)
    return found


def attribute_chains(paths: list[Path]) -> set[tuple[str, ...]]:
    """Names of attributes that are read one after another: `config.model.n_layers` gives ("config", "model", "n_layers")."""
    found = set()
    for path in paths:
        for node in ast.walk(parse(path)):
            chain: list[str] = []
            inner: ast.AST = node
            while isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Load):
                chain.insert(0, inner.attr)
                inner = inner.value
            if chain and isinstance(inner, ast.Name):
                found.add((inner.id, *chain))
    return found


# Names that functions give to a section which they receive; the section's own name always counts.
SECTION_NAMES = {
    "model": {"c", "config"},
    "rope_scaling": {"scaling"},
    "experts": {"e"},
    "mesh": {"config"},
    "optimizer": {"config"},
    "sample": {"options"},
    "serve": {"limits"},
    "train": {"source"},  # a dataset of data.train
    "validation": {"source"},
}
# Fields that the schema's own properties and methods turn into something else, which is read instead.
READ_THROUGH = {
    "d_head": "head_dim",
    "n_kv_heads": "kv_heads",
    "d_ff": "ff_dim",
    "rope_dims": "rope_dim",
    "preset": "load_config",  # while loading
    "noise_density": "measure_spans",
    "mean_noise_span_length": "measure_spans",
}


def test_every_config_field_is_read():
    """Outside config/, as an attribute of its section."""
    chains = attribute_chains([path for path in SOURCES if "config" not in path.relative_to(ROOT).parts])
    names = {name for path in SOURCES for node in ast.walk(parse(path)) for name in [getattr(node, "id", "")]}
    unread = []
    for section, kind in sections().items():
        owners = {section} | SECTION_NAMES.get(section, set())
        read = {name for chain in chains for owner, name in itertools.pairwise(chain) if owner in owners}
        for field in dataclasses.fields(kind):
            if READ_THROUGH.get(field.name, field.name) not in read | names:
                unread.append(f"{section}.{field.name}")
    assert {"experts", "rope_scaling", "optimizer", "train"} <= sections().keys()
    assert unread == []


def test_an_unread_field_is_found():
    chains = attribute_chains([ROOT / "mesh_transformer" / "train" / "optimizer.py"])
    assert ("config", "weight_decay") in chains
    assert not any("max_minutes" in chain for chain in chains)


def test_setup_lists_every_package():
    """The wheel holds what setup.cfg lists, so every folder with modules, configurations or scripts must be there."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    package = {".".join(path.relative_to(ROOT).parent.parts) for path in PACKAGE}
    for folder, kind in (("configs", "toml"), ("scripts", "py")):
        package |= {
            f"mesh_transformer.{'.'.join(p.relative_to(ROOT).parent.parts)}" for p in (ROOT / folder).rglob(f"*.{kind}")
        }
    assert listed == package
    assert set(config["options"]["py_modules"].split()) == {path.stem for path in ROOT.glob("device_*.py")}
    for path in (ROOT / "mesh_transformer").rglob("*"):
        if path.is_dir() and path.name != "__pycache__" and any(path.glob("*.py")):
            assert (path / "__init__.py").is_file(), f"{path.relative_to(ROOT)} is not a package"


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
