# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Write the generated documentation: docs/reference, docs/families.md, and the Colab badges of the notebooks.

examples:
  python scripts/write_docs.py
      write docs/reference/{config,presets,commands}.md, docs/families.md and the badges
  python scripts/write_docs.py --check
      write nothing, and exit with 1 if a page is out of date
"""

import ast
import dataclasses
import io
import json
import re
import sys
import tokenize
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.__main__ import COMMANDS
from mesh_transformer.cli import DONE, FAILED, PROGRAM, make_parser, run_command
from mesh_transformer.config import Config, evaluation, latent_attention, model, moe, parse_model, rope, schema
from mesh_transformer.config.field_types import Resume
from mesh_transformer.config.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
GITHUB = "https://github.com/"
COLAB = "https://colab.research.google.com/github"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
RESUME_WORDS = {Resume.FIXED: "no", Resume.LOGGED: "yes, logged", Resume.FREE: "yes"}
HEADER = """# Configuration reference

This page is generated from the schema (`mesh_transformer/config/`) by `python scripts/write_docs.py`. A run is one TOML file;
every key below can also be set on the command line with `--set section.key=value`. Unknown keys, wrong types and values out
of range are errors; the message for an unknown key suggests the nearest one.

*Resume* says whether a resumed run may have another value: *no* is rejected, *yes, logged* is accepted and noted in the log,
*yes* is accepted.
"""


def main(arguments: list[str]) -> int:
    """Write or check all generated pages."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    options = parser.parse_args(arguments)
    stale = []
    for path, text in pages().items():
        name = path.relative_to(ROOT).as_posix()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if options.check and stale:
        print(f"these pages are out of date: {', '.join(stale)}; run python scripts/write_docs.py", file=sys.stderr)
        return FAILED
    return DONE


def pages() -> dict[Path, str]:
    """Return the generated files: path -> content."""
    docs = ROOT / "docs" / "reference"
    return {
        docs / "config.md": config_page(),
        docs / "presets.md": presets_page(),
        docs / "commands.md": commands_page(),
        ROOT / "docs" / "families.md": families_page(),
        **{path: notebook_with_badge(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))},
    }


def notebook_with_badge(path: Path) -> str:
    """Return a notebook whose badge and REPOSITORY follow `tool.mesh-transformer.repository` of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    repository = project["tool"]["mesh-transformer"]["repository"].rstrip("/")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = notebook["cells"][0]
    lines = [line for line in first["source"] if not line.startswith(BADGE)]
    while len(lines) > 1 and not lines[1].strip():  # blank lines after the title
        del lines[1]
    badge = [f"{BADGE}({COLAB}/{repository.removeprefix(GITHUB)}/blob/main/notebooks/{path.name})\n", "\n"]
    first["source"] = [lines[0], "\n", *(badge if repository else []), *lines[1:]]
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = [
                re.sub(r'^REPOSITORY = "[^"]*"', f'REPOSITORY = "{repository}"', line) for line in cell["source"]
            ]
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


class FieldRow(NamedTuple):
    """One field of a section: a row of its table."""

    name: str
    type: str
    default: str
    resume: str
    meaning: str


def config_page() -> str:
    """Return the configuration reference: one table per section, nested sections after their parents."""
    comments = {
        kind: _comments(module)
        for module in (schema, model, moe, rope, latent_attention, evaluation)
        for kind in _classes(module)
    }
    lines = [HEADER]
    _write_section(lines, Config, "", Resume.FIXED, comments)
    return "\n".join(lines).rstrip() + "\n"


def _write_section(lines: list[str], kind: Any, path: str, rule: Resume, comments: dict[type, dict]) -> None:
    hints = typing.get_type_hints(kind, include_extras=True)
    rows = []
    nested: list[tuple[str, Any, Resume]] = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        own = rule
        if typing.get_origin(hint) is typing.Annotated:
            own = next((marker for marker in hint.__metadata__ if isinstance(marker, Resume)), rule)
        inner, suffix = _section_in(hint)
        if inner is not None:
            nested.append((f"{path}.{field.name}{suffix}".lstrip("."), inner, own))
            if not path:
                continue
        meaning = comments[kind].get((kind.__name__, field.name), "")
        rows.append(FieldRow(field.name, _type_words(hint), _default_words(field), RESUME_WORDS[own], meaning))
    if path:
        lines.append(f"## [{path}]\n\n{(kind.__doc__ or '').splitlines()[0]}\n")
        lines.append("| key | type and range | default | resume | meaning |\n|---|---|---|---|---|")
        for row in rows:
            default = f"`{row.default}`" if row.default else "required"
            lines.append(
                f"| `{row.name}` | {_cell(row.type)} | {_cell(default)} | {row.resume} | {_cell(row.meaning)} |"
            )
        lines.append("")
    for name, inner, own in nested:
        _write_section(lines, inner, name, own, comments)


def _section_in(hint: Any) -> tuple[Any, str]:
    """Return (dataclass, path suffix) of a field that holds a section or a dictionary of sections; (None, "") otherwise."""
    if typing.get_origin(hint) is typing.Annotated:
        return _section_in(typing.get_args(hint)[0])
    if dataclasses.is_dataclass(hint):
        return hint, ""
    for argument in typing.get_args(hint):
        if dataclasses.is_dataclass(argument):
            return argument, ".NAME" if typing.get_origin(hint) is dict else ""
    return None, ""


def _type_words(hint: Any) -> str:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = [_bound_words(marker) for marker in hint.__metadata__]
        return " ".join([_type_words(arguments[0]), *(words for words in bounds if words)])
    if origin is typing.Literal:
        return ", ".join(f'`"{value}"`' for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_words(one) for one in arguments if one is not types.NoneType)
    if origin is tuple:
        return f"list of {_type_words(arguments[0])}"
    if origin is list:
        return f"list of {_type_words(arguments[0])}"
    if origin is dict:
        inner, _ = _section_in(hint)
        return f"table of sections by name ({inner.__name__})" if inner else f"table of {_type_words(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "section"
    return {int: "integer", float: "number", bool: "boolean", str: "string"}.get(hint, str(hint))


def _bound_words(marker: Any) -> str:
    signs = {"Gt": ">", "Ge": "≥", "Lt": "<", "Le": "≤"}
    parts = []
    for constraint in getattr(marker, "metadata", [marker]):
        sign = signs.get(type(constraint).__name__)
        if sign:
            parts.append(f"{sign} {getattr(constraint, type(constraint).__name__.lower())}")
    return ", ".join(parts)


def _default_words(field: dataclasses.Field) -> str:
    default: Any = field.default
    factory: Any = field.default_factory
    if hasattr(default, "default_factory"):  # pydantic's Field
        factory = default.default_factory
        default = dataclasses.MISSING if factory is not None else default.default
    if default is dataclasses.MISSING and factory in (dict, list, tuple):
        return "{}" if factory is dict else "[]"
    if default is dataclasses.MISSING or type(default).__name__ == "PydanticUndefinedType":
        return "" if factory in (dataclasses.MISSING, None) else "defaults of the section"
    if default is None:
        return "unset"
    if isinstance(default, tuple):
        return "[" + ", ".join(f'"{one}"' if isinstance(one, str) else str(one) for one in default) + "]"
    if isinstance(default, bool):
        return str(default).lower()
    return f'"{default}"' if isinstance(default, str) else f"{default}"


def _classes(module: types.ModuleType) -> list[type]:
    return [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]


def _comments(module: types.ModuleType) -> dict[tuple[str, str], str]:
    """Return the comments, (class, field) -> text: the comment lines before the field and the comment at its end."""
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    by_line = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = source.splitlines()[token.start[0] - 1].strip().startswith("#")
            by_line[token.start[0]] = (token.string.lstrip("# "), alone)
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                before = []
                line = field.lineno - 1
                while line in by_line and by_line[line][1] and not by_line[line][0].startswith("--"):
                    before.insert(0, by_line[line][0])
                    line -= 1
                after = [by_line[i][0] for i in range(field.lineno, (field.end_lineno or 0) + 1) if i in by_line]
                found[node.name, field.target.id] = " ".join([*before, *after])
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def presets_page() -> str:
    """Return the table of presets with their sizes and exact parameter counts."""
    from mesh_transformer.model.shapes import count_params

    lines = [
        "# Presets",
        "",
        '`[model] preset = "NAME"` takes a row of `mesh_transformer/config/presets.py`; other keys of `[model]` override it. This',
        "page is generated by `python scripts/write_docs.py`; parameter counts are exact.",
        "",
        "| preset | parameters | n_layers | d_model | n_heads | d_ff | n_vocab | seq_len | experts |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in PRESETS.items():
        c = parse_model(row, where=name)
        encoder = f"{c.n_encoder_layers} + " if c.n_encoder_layers else ""
        experts = str(c.experts.n_experts) if c.experts else ""
        sizes = f"{encoder}{c.n_layers} | {c.d_model} | {c.n_heads} | {c.ff_dim} | {c.n_vocab} | {c.seq_len}"
        lines.append(f"| `{name}` | {count_params(c):,} | {sizes} | {experts} |")
    return "\n".join(lines) + "\n"


FAMILIES_HEADER = """# Hugging Face families

Model folders of these families are converted in both directions by `scripts/reshard_checkpoint.py`. A family is the
`model_type` in config.json. This page is generated by `python scripts/write_docs.py` from `FAMILIES` in
`mesh_transformer/convert/huggingface/families.py` and the recorded configuration classes of transformers {version}.

An absent key has the default of that class, an alias is resolved as there, and a value of a wrong JSON type is an error. A
*published size* is a preset that computes the function of the family. *Another value refused* lists the keys of which only
the default, or the values in the error message, are supported: any other value changes the function, so that the import is
refused with the name of the key. Keys without effect on the function (dropout, initial values, losses, special token IDs)
are not listed; the token IDs and the generation settings are kept with the weights.
`python scripts/stress/differential.py` changes every key of every family and compares the logits with those of transformers.
*Logits* is the program that computes logits for the comparison besides transformers (`--verify`).

| family | class | published sizes | import | export | logits | parity test |
|---|---|---|---|---|---|---|
"""
# Keys that make the configuration of a class supported, where its default configuration is not.
EXAMPLES: dict[str, dict[str, Any]] = {
    "arcee": {"hidden_act": "silu"},
    "switch_transformers": {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6},
}
# Families whose text model has its keys in a part of config.json
TEXT_PARTS = {
    "gemma3": "In `text_config`, as of `gemma3_text`; there another value of `final_logit_softcapping` is refused as well."
}
SIZES = ("n_layers", "n_encoder_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "d_head", "n_vocab", "seq_len")


def families_page() -> str:
    """Return the table of Hugging Face families and the keys of each."""
    from mesh_transformer.convert.huggingface.families import FAMILIES
    from mesh_transformer.convert.huggingface.hf_config import recorded_version

    sizes = _sizes_by_family()
    table: list[str] = []
    details: list[str] = []
    for kind, family in FAMILIES.items():
        own = f"tests/convert/huggingface/test_{family.read_config.__module__.rpartition('.')[2]}.py"
        test = own if (ROOT / own).exists() else "tests/convert/huggingface/test_reference.py"
        logits = "NumPy reimplementation" if family.reference else "none"
        presets = ", ".join(f"`{name}`" for name in sizes.get(kind, []))
        table.append(f"| `{kind}` | `{family.architecture}` | {presets} | yes | yes | {logits} | `{test}` |")
        details += ["", f"## {kind}", "", *_list_treatment(kind, family)]
    return FAMILIES_HEADER.format(version=recorded_version()) + "\n".join([*table, *details]) + "\n"


def _list_treatment(kind: str, family: Any) -> list[str]:
    """Return the lines on the keys of a family: honored keys, and keys of which other values are refused."""
    from mesh_transformer.convert.huggingface.hf_config import HFConfig
    from mesh_transformer.storage.errors import CheckpointError

    if kind in TEXT_PARTS:
        return [TEXT_PARTS[kind]]
    s = HFConfig({"model_type": kind} | EXAMPLES.get(kind, {}), "config.json")
    try:
        family.read_config(s)
    except CheckpointError as error:
        return [f"The keys are not listed, because the default configuration of the class is not supported: `{error}`."]
    honored, refused = s.keys_by_treatment()
    return [f"Honored: {_list_keys(honored)}.", "", f"Another value refused: {_list_keys(refused)}."]


def _list_keys(keys: list[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys) or "none"


def _sizes_by_family() -> dict[str, list[str]]:
    """Return the presets of each family that computes their function."""
    from mesh_transformer.convert.huggingface.reader import find_family
    from mesh_transformer.storage.errors import CheckpointError

    found: dict[str, list[str]] = {}
    known: dict[str, str | None] = {}  # keys without sizes, which do not affect the family -> family
    for name, row in PRESETS.items():
        choices = json.dumps({key: value for key, value in row.items() if key not in SIZES})
        if choices not in known:
            try:
                known[choices] = find_family(parse_model(row, where=name))[0]
            except CheckpointError:  # no family computes it
                known[choices] = None
        if kind := known[choices]:
            found.setdefault(kind, []).append(name)
    return found


def commands_page() -> str:
    """Return the page of all commands: their docstrings, which are also their --help."""
    lines = [
        "# Commands",
        "",
        f"`{PROGRAM} COMMAND` runs from any directory once the package is installed. In a clone, the programs themselves run as",
        "well. Every program prints its options with `--help`. This page is generated by `python scripts/write_docs.py`.",
        "",
    ]
    for name, command in COMMANDS.items():
        file = Path(*command.module.removeprefix("mesh_transformer.").split(".")).with_suffix(".py")
        text = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or ""
        lines += [f"## {PROGRAM} {name}", "", f"In a clone: `python {file.as_posix()}`", "", "```text", text, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(run_command(main))
