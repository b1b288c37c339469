# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""One TOML file -> one run: read strictly, overridden in TOML's own grammar, explained when wrong, and printed back.

The sections themselves are in schema.py; this module is where everything else takes them from.
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
from mesh_transformer.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SampleConfig,
    ServeConfig,
    SourceConfig,
    TrackConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "SampleConfig",
    "ServeConfig",
    "SourceConfig",
    "TrackConfig",
    "TrainConfig",
    "check_table",
    "config_to_dict",
    "config_to_toml",
    "find_preset_changes",
    "load_config",
    "parse_config",
    "parse_model",
    "read_toml",
]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the path, the value and the remedy."""


Table = typing.TypeVar("Table")
_adapt = functools.cache(TypeAdapter)  # making one takes longer than using it


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The run that `path` describes, with `overrides` ("train.steps=20", TOML on the right) merged before validation.

    Raises ConfigError, naming the file, the path in it, the value and what would be allowed.
    """
    path = Path(path)
    return parse_config(read_toml(path, overrides), where=str(path), run_dir=f"runs/{path.stem}")


def read_toml(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The tables of a file with `overrides` merged in, not yet checked; ConfigError, naming the file, if it has none."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a .toml file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        merge_override(table, override)
    return table


def parse_config(table: Mapping[str, Any], *, where: str, run_dir: str = "runs/unnamed") -> Config:
    """A validated run from nested dictionaries; `where` begins every error message, `run_dir` is used if none is set."""
    table = {key: dict(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    model = table.get("model")
    if isinstance(model, dict) and isinstance(model.get("preset"), str):
        row = _preset(model["preset"], where)
        experts = {**row.get("experts", {}), **inner} if isinstance(inner := model.get("experts"), dict) else inner
        table["model"] = row | model | ({} if experts is None else {"experts": experts})
    run = table.setdefault("run", {})
    if isinstance(run, dict) and not run.get("dir"):
        run["dir"] = run_dir
    return check_table(Config, table, where=where)


def check_table(kind: type[Table], table: Mapping[str, Any], *, where: str, prefix: str = "") -> Table:
    """A record of `kind` (a strict dataclass) from nested dictionaries; ConfigError with a line for every mistake.

    Every line begins with `where`; `prefix` is put before the path of what is wrong.
    """
    _refuse_dates_and_infinities(table, where, ())
    try:
        return _adapt(kind).validate_json(json.dumps(table))
    except ValidationError as error:
        problems = [f"{prefix}{_explain(problem, kind)}" for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in dict.fromkeys(problems))) from None


def parse_model(table: Mapping[str, Any], *, where: str) -> ModelConfig:
    """A validated [model] section from a dictionary, such as a checkpoint carries."""
    return check_table(ModelConfig, table, where=where, prefix="model.")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a section, as TOML and JSON hold them; unset (None) fields are left out."""
    return TypeAdapter(type(config)).dump_python(config, mode="json", exclude_none=True)


def config_to_toml(config: Config, *, mark_changes: bool = False) -> str:
    """The resolved run as TOML that loads to the same run; `mark_changes` notes every default that was changed."""
    lines: list[str] = []
    for name, table in config_to_dict(config).items():
        defaults = _defaults(type(getattr(config, name)))
        _write_table(lines, (name,), table, defaults if mark_changes else None)
    return "\n".join(lines).strip() + "\n"


def find_preset_changes(model: ModelConfig) -> dict[str, Any]:
    """Fields of `model` that differ from its preset's row (empty without a preset)."""
    own, changes = config_to_dict(model), {}
    for key, value in PRESETS.get(model.preset or "", {}).items():
        found = own.get(key)
        if isinstance(value, dict) and isinstance(found, dict):  # of experts: as far as the row says
            found = {inner: found.get(inner) for inner in value}
        if found != value:
            changes[key] = found
    return changes


def _preset(name: str, where: str) -> dict[str, Any]:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        every = ", ".join(PRESETS)
        raise ConfigError(
            f"{where}: model.preset = {json.dumps(name)} is not in families.py{hint} all presets: {every}"
        )
    return dict(PRESETS[name])


def merge_override(table: dict[str, Any], override: str) -> None:
    """Put "section.field=value" (TOML on the right) into nested dictionaries; ConfigError if it is no such thing."""
    _merge(table, *_parse_override(override))


def _parse_override(override: str) -> tuple[list[str], Any]:
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(re.fullmatch(r"[A-Za-z0-9_-]+", part) for part in path):
        raise ConfigError(f"--set {override}: expected section.field=value, for example train.steps=20")
    try:
        (parsed,) = tomllib.loads(f"value = {value}").values()  # one value: no second line slips in
        return path, parsed
    except ValueError:
        quoted = f"'{key.strip()}=\"{value.strip()}\"'"
        raise ConfigError(
            f"--set {override}: {value.strip()!r} is not a TOML value; text needs quotes: --set {quoted}"
        ) from None


def _merge(table: dict[str, Any], path: list[str], value: Any) -> None:
    for depth, part in enumerate(path[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {'.'.join(path)}: {'.'.join(path[: depth + 1])} is a value, not a section")
    table[path[-1]] = value


def _refuse_dates_and_infinities(value: Any, where: str, path: tuple[str, ...]) -> None:
    """TOML has them, runs and JSON do not."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_dates_and_infinities(inner, where, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _refuse_dates_and_infinities(inner, where, (*path, str(i)))
    elif isinstance(value, datetime.date | datetime.time) or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{where}: {'.'.join(path)} = {value}: dates, nan and inf are not allowed")


def _explain(problem: Mapping[str, Any], root: Any) -> str:
    """One line for one pydantic error: path, value, what is allowed, nearest name."""
    location, value, kind = [str(part) for part in problem["loc"]], problem.get("input"), problem["type"]
    if location[:2] == ["mesh", "rules"] and len(location) > 3:  # one error for each alternative
        return f"{'.'.join(location[:3])} must be a mesh axis or a list of them"
    path = ".".join(location)
    if kind == "unexpected_keyword_argument":
        fields = _fields_at(root, location[:-1])
        hint = _nearest(location[-1], fields)
        return f"{path} is not a field; {hint}" if hint else f"{path} is not a field; fields there: {', '.join(fields)}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path} is missing and has no default"
    if kind == "union_tag_not_found":
        return f"{path}.kind is missing and has no default"
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
    """Field names of the section at `path` of `kind`; names in a dictionary and places in a list are skipped over.

    Of a union that a field `kind` tells apart, `path` has the tag after the place.
    """
    for part in path:
        arguments = typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(part)
        elif typing.get_origin(kind) in (dict, tuple):
            kind = arguments[1 if typing.get_origin(kind) is dict else 0]
        elif isinstance(kind, types.UnionType):
            kind = next(one for one in arguments if part in typing.get_args(typing.get_type_hints(one)["kind"]))
        if isinstance(kind, types.UnionType) and types.NoneType in typing.get_args(kind):
            kind = next(iter(typing.get_args(kind)))
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _defaults(kind: type) -> dict[str, Any]:
    """Default of every field of a section that has one."""
    found = {}
    for field in dataclasses.fields(kind):
        default: Any = field.default
        if hasattr(default, "default_factory") and default.default_factory is not None:
            default = default.default_factory()
        elif hasattr(default, "default"):
            default = default.default
        if default is not dataclasses.MISSING:
            found[field.name] = _plain(default)
    return found


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
            shown = "unset" if defaults[key] is None else _toml_value(defaults[key])
            line = f"{line:<44}  # default: {shown}"
        lines.append(line)
    for key, value in table.items():
        if isinstance(value, dict) and value:
            _write_table(lines, (*path, key), value, None)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    """Text, numbers and lists are written alike in JSON and TOML, but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
