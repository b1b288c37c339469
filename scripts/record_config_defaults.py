# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Record the fields and defaults of the configuration classes of transformers, which the import of config.json applies.

A key that is absent from a config.json has the default of the class. The result is package data, so that importing a model
does not need transformers.

examples:
  python scripts/record_config_defaults.py
      write mesh_transformer/convert/huggingface/config_defaults.jsonc from the installed transformers
"""

import dataclasses
import json
import logging
import sys
import types
import typing
from pathlib import Path
from typing import Any

from mesh_transformer.cli import make_parser, run_command

OUTPUT = Path(__file__).resolve().parents[1] / "mesh_transformer/convert/huggingface/config_defaults.jsonc"
MODEL_TYPES = (
    "gpt2", "gpt_neo", "gptj", "gpt_neox", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2", "olmo3", "stablelm", "smollm3", "falcon", "opt", "bloom",
    "mpt", "gpt_bigcode", "starcoder2", "cohere", "cohere2", "granite", "deepseek_v2", "deepseek_v3", "gpt_oss", "t5", "mt5",
    "umt5", "switch_transformers", "bert", "roberta", "albert", "arcee",
)  # fmt: skip
JSON_TYPES = {int: "int", float: "float", bool: "bool", str: "str", list: "list", tuple: "list", dict: "dict"}


def main(arguments: list[str]) -> int:
    """Write the table."""
    make_parser(__doc__ or "").parse_args(arguments)
    logging.disable(logging.WARNING)  # some classes warn about their own defaults
    OUTPUT.write_text(format_table(make_table()), encoding="utf-8")
    return 0


def make_table() -> dict[str, Any]:
    """Return the version of transformers and the description of each class, by model type."""
    import transformers

    families = {kind: describe_class(transformers.CONFIG_MAPPING[kind]) for kind in MODEL_TYPES}
    return {"transformers": transformers.__version__, "model_types": families}


def describe_class(config_class: Any) -> dict[str, Any]:
    """Return the fields of a configuration class with defaults and JSON types, its aliases, and its computed keys."""
    import torch
    from transformers import PreTrainedConfig

    common = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"is_encoder_decoder"}
    fields = [field for field in dataclasses.fields(config_class) if field.name not in common]
    # The modules of transformers import torch for type checkers only, so its name is passed here.
    hints = typing.get_type_hints(config_class, localns={"torch": torch})
    instance = config_class()
    table = instance.to_dict()
    aliases = dict(config_class.attribute_map)
    names = {field.name for field in fields} | {aliases.get(field.name, field.name) for field in fields}
    computed = [key for key in table if key not in names | common | {"model_type", "output_attentions"}]
    return {
        "class": config_class.__name__,
        "aliases": aliases,
        "rope": instance.rope_parameters if "rope_parameters" in names else None,
        "computed": sorted(key for key in computed if not key.startswith("_")),
        "fields": {field.name: [field.default, json_types(hints[field.name])] for field in fields},
    }


def json_types(hint: Any) -> str:
    """Return the JSON types that a type annotation allows, such as "int|null"; "any" if it names a type without JSON form."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        found = [json_types(argument) for argument in typing.get_args(hint)]
        return "any" if "any" in found else "|".join(dict.fromkeys("|".join(found).split("|")))
    if origin is typing.Literal:
        return "|".join(dict.fromkeys(JSON_TYPES[type(value)] for value in typing.get_args(hint)))
    if hint is type(None):
        return "null"
    if typing.is_typeddict(hint):
        return "dict"
    return JSON_TYPES.get(origin or hint, "any")


def format_table(table: dict[str, Any]) -> str:
    """Return the table as JSON with one line per field, so that a diff shows the changes of a version."""
    lines = [f'{{"transformers": {json.dumps(table["transformers"])}, "model_types": {{']
    for kind, entry in table["model_types"].items():
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items() if key != "fields")
        lines.append(f'"{kind}": {{{head}, "fields": {{')
        fields = [f" {json.dumps(name)}: {json.dumps(field)}" for name, field in entry["fields"].items()]
        lines.append(",\n".join(fields) + "\n}},")
    lines[-1] = lines[-1].removesuffix(",")
    return "\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    sys.exit(run_command(main))
