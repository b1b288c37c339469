# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Load the configuration of a run from a TOML file, with `--set` overrides, and write it as TOML.

The schema is in schema.py. Other packages import both from `mesh_transformer.config`.
"""

import dataclasses
import datetime
import difflib
import functools
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mesh_transformer.config.presets import PRESETS
from mesh_transformer.config.renamed import RUN, find_renamed, translate_stored
from mesh_transformer.config.schema import (
    Config,
    ModelConfig,
)

SHOWN_PRESETS = 30  # in an error message


class ConfigError(ValueError):
    """An invalid configuration. The message has one line per error, with the field, its value and the allowed values."""


Table = typing.TypeVar("Table")
_adapt = functools.cache(TypeAdapter)  # cached, because creating a TypeAdapter takes longer than validating with it

PACKAGE = Path(__file__).parents[1]
# configs/ is installed inside the package; in a clone, configs/ is next to the package
SHIPPED_CONFIGS = (PACKAGE / "configs", PACKAGE.parent / "configs")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Return the configuration in a TOML file, with `overrides` ("train.steps=20") merged before validation.

    `path` may also be the name of a shipped configuration ("quickstart"). Raises ConfigError with one line per error:
    file, field, value and allowed values.
    """
    path = find_config(path)
    return parse_config(read_toml(path, overrides), where=str(path), run_dir=f"runs/{path.stem}")


def find_config(path: str | Path) -> Path:
    """Return the path of a configuration file: `path` itself if it exists, otherwise the shipped file with that name.

    "quickstart", "quickstart.toml" and "configs/quickstart.toml" all name the shipped configs/quickstart.toml if the
    working directory has no such file.
    """
    path = Path(path)
    if path.exists():
        return path
    name = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    for folder in SHIPPED_CONFIGS:
        shipped = folder / name.with_name(name.name if name.suffix == ".toml" else f"{name.name}.toml")
        if shipped.is_file():
            return shipped
    return path


def read_toml(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return the tables of a TOML file with `overrides` merged in, not yet validated.

    Raises ConfigError if the file cannot be read or is not TOML.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = (
            f"did you mean {path.parent / near[0]}?"
            if near
            else "give a TOML file or the name of a shipped configuration"
        )
        raise ConfigError(f"{path}: no such file; {hint}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: this is a folder; give the path of a .toml file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        merge_override(table, override)
    return table


def parse_config(table: Mapping[str, Any], *, where: str, run_dir: str = "runs/unnamed") -> Config:
    """Return the validated configuration of a run from nested dictionaries.

    Every error message begins with `where`, such as the file name. `run_dir` is the run folder if `table` sets none.
    Raises ConfigError for invalid values and for unknown or renamed keys.
    """
    if renamed := find_renamed(table, RUN):
        raise ConfigError("\n".join(f"{where}: {line}" for line in renamed))
    table = {key: dict(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    model = table.get("model")
    if isinstance(model, dict) and isinstance(model.get("preset"), str):
        preset = _preset(model["preset"], where)
        experts = model.get("experts")
        if isinstance(experts, dict):
            experts = {**preset.get("experts", {}), **experts}
        table["model"] = preset | model | ({} if experts is None else {"experts": experts})
    run = table.setdefault("run", {})
    if isinstance(run, dict) and not run.get("dir"):
        run["dir"] = run_dir
    return check_table(Config, table, where=where)


def check_table(kind: type[Table], table: Mapping[str, Any], *, where: str, prefix: str = "") -> Table:
    """Return a dataclass of type `kind` from nested dictionaries.

    Raises ConfigError with one line per error, which begins with `where`. `prefix` precedes the path of the field.
    """
    _reject_dates_and_infinities(table, where, ())
    try:
        return _adapt(kind).validate_json(json.dumps(table))
    except ValidationError as error:
        problems = [f"{prefix}{_explain(problem, kind, table)}" for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in dict.fromkeys(problems))) from None


def parse_stored(table: Mapping[str, Any], *, where: str, run_dir: str = "runs/unnamed") -> Config:
    """Return the validated configuration that this version or an older one stored in a run or checkpoint."""
    return parse_config(translate_stored(table), where=where, run_dir=run_dir)


def parse_model(table: Mapping[str, Any], *, where: str) -> ModelConfig:
    """Return the validated [model] section that this version or an older one stored in a checkpoint."""
    return check_table(ModelConfig, translate_stored(table, prefix=("model",)), where=where, prefix="model.")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return a section as nested plain values for TOML or JSON, without unset (None) fields."""
    return TypeAdapter(type(config)).dump_python(config, mode="json", exclude_none=True)


def config_to_toml(config: Config, *, mark_changes: bool = False) -> str:
    """Return a configuration as TOML; with `mark_changes`, a comment shows the default of each value that differs from it."""
    lines: list[str] = []
    for name, table in config_to_dict(config).items():
        defaults = _defaults(type(getattr(config, name)))
        _write_table(lines, (name,), table, defaults if mark_changes else None)
    return "\n".join(lines).strip() + "\n"


def find_preset_changes(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of `model` that differ from its preset; empty without a preset."""
    table = config_to_dict(model)
    changes = {}
    for key, value in PRESETS.get(model.preset or "", {}).items():
        current = table.get(key)
        if isinstance(value, dict) and isinstance(current, dict):  # experts: only the fields that the preset sets
            current = {inner: current.get(inner) for inner in value}
        if current != value:
            changes[key] = current
    return changes


def _preset(name: str, where: str) -> dict[str, Any]:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f" did you mean {near[0]!r}?" if near else ""
        listed = ", ".join([*PRESETS][:SHOWN_PRESETS])
        more = f", and {len(PRESETS) - SHOWN_PRESETS} more in docs/reference/presets.md"
        raise ConfigError(f"{where}: model.preset = {json.dumps(name)} is not a preset;{hint} presets: {listed}{more}")
    return dict(PRESETS[name])


def merge_override(table: dict[str, Any], override: str) -> None:
    """Merge "section.field=value" (value in TOML syntax) into nested dictionaries; raise ConfigError if malformed."""
    _merge(table, *_parse_override(override))


def _parse_override(override: str) -> tuple[list[str], Any]:
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(re.fullmatch(r"[A-Za-z0-9_-]+", part) for part in path):
        raise ConfigError(f"--set {override}: expected section.field=value, for example train.steps=20")
    try:
        (parsed,) = tomllib.loads(f"value = {value}").values()  # exactly one value
        return path, parsed
    except ValueError:
        quoted = f"'{key.strip()}=\"{value.strip()}\"'"
        raise ConfigError(
            f"--set {override}: {value.strip()!r} is not a TOML value; strings need quotes: --set {quoted}"
        ) from None


def _merge(table: dict[str, Any], path: list[str], value: Any) -> None:
    for depth, part in enumerate(path[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            parent = ".".join(path[: depth + 1])
            shown = json.dumps(table, default=str)
            raise ConfigError(f"--set {'.'.join(path)}: {parent} = {shown} is not a section; set {parent} itself")
    table[path[-1]] = value


def _reject_dates_and_infinities(value: Any, where: str, path: tuple[str, ...]) -> None:
    """Raise ConfigError for values that TOML can represent and JSON cannot."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _reject_dates_and_infinities(inner, where, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _reject_dates_and_infinities(inner, where, (*path, str(i)))
    elif isinstance(value, datetime.date | datetime.time) or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(
            f"{where}: {'.'.join(path)} = {value}: dates, nan and inf are not supported; use a finite number or a string"
        )


def _explain(problem: Mapping[str, Any], root: Any, table: Mapping[str, Any]) -> str:
    """Return one line for a pydantic error in `table`: field, value, allowed values, and the nearest name."""
    location = [str(part) for part in problem["loc"]]
    value = problem.get("input")
    kind = problem["type"]
    if location[:2] == ["mesh", "rules"] and len(location) > 3:  # one error for each type of the union
        rule = table["mesh"]["rules"][location[2]]
        return f"{'.'.join(location[:3])} = {json.dumps(rule)}: must be the name of a mesh axis or a list of names"
    path = ".".join(location)
    if kind == "unexpected_keyword_argument":
        fields = _fields_at(root, location[:-1])
        hint = _nearest(location[-1], fields)
        return (
            f"{path} is not a field; {hint}" if hint else f"{path} is not a field; expected one of: {', '.join(fields)}"
        )
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path} is missing; set it, because it has no default"
    if kind == "union_tag_not_found":
        return f"{path}.kind is missing; set it, because it has no default"
    if kind == "union_tag_invalid":
        tag, known = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
        hint = _nearest(tag, re.findall(r"'([^']+)'", known))
        return f"{path}.kind = {json.dumps(tag)}: must be one of {known}" + (f"; {hint}" if hint else "")
    if kind == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{path}: {message}" if path else message
    message = (
        problem["msg"].replace("an object", "a table").replace("a valid array", "a list").replace("Input", "must", 1)
    )
    message = message.replace("must should be", "must be", 1)
    if kind == "literal_error" and isinstance(value, str):
        hint = _nearest(value, re.findall(r"'([^']+)'", problem["ctx"]["expected"]))
        message += f"; {hint}" if hint else ""
    shown = json.dumps(value, ensure_ascii=False)
    return f"{path} = {shown if len(shown) <= 60 else shown[:57] + '...'}: {message}"


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""


def _fields_at(kind: Any, path: list[str]) -> list[str]:
    """Return the field names of the section at `path` below `kind`.

    Dictionary keys and list indices on the way are skipped. For a union that is discriminated by a field `kind`, `path`
    has the tag after the index.
    """
    for part in path:
        arguments = typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(part)
        elif typing.get_origin(kind) in (dict, tuple):
            kind = arguments[1 if typing.get_origin(kind) is dict else 0]
        elif isinstance(kind, types.UnionType):
            kind = next(item for item in arguments if part in typing.get_args(typing.get_type_hints(item)["kind"]))
        if isinstance(kind, types.UnionType) and types.NoneType in typing.get_args(kind):
            kind = next(iter(typing.get_args(kind)))
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _defaults(kind: type) -> dict[str, Any]:
    """Return the defaults of a section's fields by name, without the required fields."""
    defaults = {}
    for field in dataclasses.fields(kind):
        default: Any = field.default
        if hasattr(default, "default_factory") and default.default_factory is not None:
            default = default.default_factory()
        elif hasattr(default, "default"):
            default = default.default
        if default is not dataclasses.MISSING:
            defaults[field.name] = _plain(default)
    return defaults


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _write_table(
    lines: list[str], path: tuple[str, ...], table: Mapping[str, Any], defaults: Mapping[str, Any] | None
) -> None:
    scalars = {key: value for key, value in table.items() if not isinstance(value, dict)}
    if scalars or not table:
        lines.append(f"\n[{'.'.join(_toml_key(part) for part in path)}]")
    for key, value in scalars.items():
        line = f"{_toml_key(key)} = {_toml_value(value)}"
        if defaults is not None and key in defaults and defaults[key] != value:
            line = f"{line:<44}  # default: {format_value(defaults[key])}"
        lines.append(line)
    for key, value in table.items():
        if isinstance(value, dict) and value:
            _write_table(lines, (*path, key), value, None)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def format_value(value: Any) -> str:
    """Return a value of a configuration in TOML syntax for a message; "unset" for null."""
    if value is None:
        return "unset"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {format_value(inner)}" for key, inner in value.items()) + "}"
    return _toml_value(value)


def _toml_value(value: Any) -> str:
    """Return a string, number, boolean or list in TOML syntax, which differs from JSON only in the escape of DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
